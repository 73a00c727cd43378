"""The two halves of the autoencoder."""

import dataclasses

import numpy as np
from tiny_networks import AUTOENCODER, call

from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder


def test_autoencoder_shapes_follow_the_downsampling_factor():
    assert AUTOENCODER.downsampling == 2
    encoded = call(ImageEncoder(AUTOENCODER), np.zeros((1, 8, 12, 3), "float32"))
    assert encoded["mean"].shape == encoded["logvar"].shape == (1, 4, 6, 4)
    assert call(ImageDecoder(AUTOENCODER), encoded["mean"]).shape == (1, 8, 12, 3)


def test_the_latent_scale_is_inside_the_autoencoder():
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype("float32")
    plain = ImageEncoder(dataclasses.replace(AUTOENCODER, latent_scale=1.0))
    scaled = ImageEncoder(dataclasses.replace(AUTOENCODER, latent_scale=0.5, latent_shift=0.25))
    scaled.set_weights(plain.get_weights())
    before, after = call(plain, picture), call(scaled, picture)
    np.testing.assert_allclose(after["mean"], (before["mean"] - 0.25) * 0.5, atol=1e-6)
    np.testing.assert_allclose(np.exp(after["logvar"]), np.exp(before["logvar"]) * 0.25, rtol=1e-5)
    decoder = ImageDecoder(dataclasses.replace(AUTOENCODER, latent_scale=1.0))
    unscaled = ImageDecoder(dataclasses.replace(AUTOENCODER, latent_scale=0.5, latent_shift=0.25))
    unscaled.set_weights(decoder.get_weights())
    np.testing.assert_allclose(
        call(unscaled, after["mean"]), call(decoder, before["mean"]), atol=1e-5
    )


def test_logvar_is_clipped_as_in_the_original():
    encoder = ImageEncoder(dataclasses.replace(AUTOENCODER, latent_scale=1.0))
    bias = [v for v in encoder.variables if v.path == "quant_conv/bias"][0]
    bias.assign(np.array([0, 0, 0, 0, 99, -99, 0, 0], "float32"))
    logvar = call(encoder, np.zeros((1, 4, 4, 3), "float32"))["logvar"]
    assert logvar[..., 0].max() == 20.0
    assert logvar[..., 1].min() == -30.0
