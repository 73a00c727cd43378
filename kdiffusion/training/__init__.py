"""Training and evaluation of the parts of a latent diffusion model."""
