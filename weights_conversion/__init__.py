"""Public checkpoint layouts in and out, without any deep-learning framework."""
