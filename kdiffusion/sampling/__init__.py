"""Schedules, samplers as tables, guidance and the one loop that runs them."""
