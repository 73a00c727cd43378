"""The four networks of Stable Diffusion as Keras models."""
