"""The scale and shift that give latents unit variance, measured over images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from keras import ops

from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.weights import variables

Scale = float | tuple[float, ...]

_DIGITS = 6
_SMALLEST = 1e-6


def measure(
    image_encoder: ImageEncoder, images: np.ndarray, by_channel: bool = False, batch_size: int = 4
) -> tuple[Scale, Scale]:
    """Measure the latent scale and shift of an encoder (Rombach et al. 2022, appendix G).

    The variance is that of sampled latents: the variance of their means plus the mean of their
    variances. The scale that the encoder has already does not matter.

    Args:
        image_encoder: `ImageEncoder`.
        images: (n, height, width, 3) float32 in [-1, 1].
        by_channel: bool. `False` gives the inverse of the deviation of all numbers and no shift,
            as the paper does; `True` the inverse of the deviation of each channel, and its mean.
        batch_size: int, how many are encoded at a time.

    Returns:
        The latent scale and shift for `AutoencoderArchitecture`: numbers, or tuples of one for
        each channel. They have six digits.

    Raises:
        ValueError: If the latents do not vary, or are not finite.
    """
    count, sums = 0, np.zeros((3, image_encoder.architecture.latent_channels))
    for start in range(0, len(images), batch_size):
        mean, logvar = code(image_encoder, images[start : start + batch_size])
        mean, logvar = (ops.convert_to_numpy(x).astype(np.float64) for x in (mean, logvar))
        count += mean[..., 0].size
        sums += [x.sum(axis=(0, 1, 2)) for x in (mean, mean**2, np.exp(logvar))]
    mean, square, variance = sums / count
    if not by_channel:
        mean, square, variance = (np.mean(x, keepdims=True) for x in (mean, square, variance))
    deviation = np.sqrt(square + variance - mean**2)
    if not np.all((_SMALLEST < deviation) & (deviation < 1 / _SMALLEST)):
        raise ValueError(
            f"The latents' deviation must be above {_SMALLEST} and finite. Received: {deviation}, "
            f"of {len(images)} images. Measure it over several, with an encoder that is trained."
        )
    scales = tuple(float(f"{1.0 / x:.{_DIGITS}g}") for x in deviation)
    if not by_channel:
        return scales[0], 0.0
    return scales, tuple(float(f"{x:.{_DIGITS}g}") for x in mean)


def scaled(
    image_encoder: ImageEncoder, image_decoder: ImageDecoder, scale: Scale, shift: Scale
) -> tuple[ImageEncoder, ImageDecoder]:
    """Return a copy of an autoencoder whose latents have another scale."""
    record = replace(image_encoder.architecture, latent_scale=scale, latent_shift=shift)
    return (
        variables.rebuilt(image_encoder, architecture=record),
        variables.rebuilt(image_decoder, architecture=record),
    )


def code(image_encoder: ImageEncoder, images):
    """Compute mean and log-variance of the code: the latents without their scale and shift.

    Args:
        image_encoder: `ImageEncoder`.
        images: (batch, height, width, 3) in [-1, 1].

    Returns:
        Two tensors, (batch, height / 8, width / 8, channels) float32.
    """
    architecture = image_encoder.architecture
    scale, shift = np.float32(architecture.latent_scale), np.float32(architecture.latent_shift)
    latents = image_encoder(images)
    return latents["mean"] / scale + shift, latents["logvar"] - 2.0 * np.log(scale)
