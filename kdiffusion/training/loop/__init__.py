"""Run a trainer: steps, checkpoints, reports."""
