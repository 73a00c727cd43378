"""The five networks of latent diffusion as Keras models, their layers and kernels."""
