"""Our own small model: its scenes, its training and its evaluation."""
