"""Describe a run as JSON and build it."""
