"""Losses of each kind of model, as pure functions."""
