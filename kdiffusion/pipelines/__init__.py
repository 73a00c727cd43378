"""Models that generate images: their parts, their methods, their settings."""
