"""Stable Diffusion, native to Keras."""
