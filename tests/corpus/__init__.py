"""Checkpoint files that tests build: sound, odd, broken and hostile."""
