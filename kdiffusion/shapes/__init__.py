"""Our own small model: its scenes, its training and how it is measured."""
