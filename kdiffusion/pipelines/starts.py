"""Starts of a run: noise, an image's latents, or an image's latents with a mask.

Pure functions of latents, masks and noise streams. The order in which they read the streams is
diffusers', so that a seed gives the same image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdiffusion.sampling.noise import NoiseStream
from kdiffusion.sampling.table import Table


class Posterior(NamedTuple):
    """The autoencoder's normal distribution of the latents of images (Kingma & Welling 2014).

    Args:
        mean: (batch, height, width, channels) float32.
        deviation: likewise, the standard deviation.
    """

    mean: np.ndarray
    deviation: np.ndarray

    def sample(self, streams: Sequence[NoiseStream]) -> np.ndarray:
        """Draw the latents of each image with its stream."""
        return self.mean + self.deviation * unit_noise(streams, self.mean.shape[1:])


class Start(NamedTuple):
    """The start of a run, for a batch of images.

    Args:
        noise: (batch, height, width, channels) float32, unit normal.
        known: latents of an image, like `noise`, or `None`.
        strength: float in (0, 1], share of the noise range that is run.
        mask: (batch, height, width, 1) float32, 1 where latents are generated, 0 where they stay
            as `known`; or `None`.
        conditioning: (batch, height, width, n) float32, further channels of the network's input,
            or `None`.
    """

    noise: np.ndarray
    known: np.ndarray | None = None
    strength: float = 1.0
    mask: np.ndarray | None = None
    conditioning: np.ndarray | None = None

    def latents(self, tables: Sequence[Table]) -> np.ndarray:
        """Return x at the first row of each image's table.

        A mask at full strength forgets the image, as in diffusers; image_to_image at full
        strength still starts from what little of it the first level holds.
        """
        if self.known is None or (self.mask is not None and self.strength == 1.0):
            return _per_image([table.start_scale for table in tables]) * self.noise
        a = _per_image([table.a[0] for table in tables])
        s = _per_image([table.s[0] for table in tables])
        return a * self.known + s * self.noise

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The inputs of `sampling.run.denoise` that keep known latents and condition on them."""
        inputs = {}
        if self.mask is not None and self.known is not None:
            inputs = {"mask": self.mask, "known": self.known, "known_noise": self.noise}
        if self.conditioning is not None:
            inputs["conditioning"] = self.conditioning
        return inputs


def unit_noise(streams: Sequence[NoiseStream], shape: tuple[int, int, int]) -> np.ndarray:
    """Draw the start noise from each stream, (batch, height, width, channels)."""
    return np.stack([stream.draw(*shape) for stream in streams])


def noise_start(
    streams: Sequence[NoiseStream],
    shape: tuple[int, int, int],
    diffusion_noise: Any = None,
    seed: Any = None,
) -> Start:
    """Start from noise alone.

    Args:
        streams: a noise stream for each image.
        shape: (height, width, channels) of the latents.
        diffusion_noise: the user's own noise for all images or for each, in place of the streams'.
        seed: the user's seed, which must be `None` where there is such noise.

    Raises:
        ValueError: If there are both, or the shape is another one.
    """
    if diffusion_noise is None:
        return Start(unit_noise(streams, shape))
    if seed is not None:
        raise ValueError(
            "`diffusion_noise` and `seed` both say where to start. Received: both. Give one."
        )
    noise, batch = np.asarray(diffusion_noise, np.float32), (len(streams), *shape)
    if noise.shape not in (batch, shape, (1, *shape)):
        raise ValueError(
            f"`diffusion_noise` must have the shape {shape} or {batch}. "
            f"Received: shape {noise.shape}"
        )
    return Start(np.broadcast_to(noise, batch))


def image_start(known: Posterior, strength: float, streams: Sequence[NoiseStream]) -> Start:
    """Start from images: their latents are sampled first, then the start noise.

    Args:
        known: `Posterior` of the images.
        strength: float in (0, 1].
        streams: a noise stream for each image.
    """
    latents = known.sample(streams)
    return Start(unit_noise(streams, latents.shape[1:]), latents, strength)


def inpainting_start(
    known: Posterior | None,
    masked: Posterior | None,
    mask: np.ndarray,
    strength: float,
    streams: Sequence[NoiseStream],
) -> Start:
    """Start to repaint; the streams are read in the order of diffusers' inpainting pipeline.

    An inpainting network is conditioned on the mask and the masked image; for any other the
    latents outside the mask are kept.

    Args:
        known: `Posterior` of the images; `None` if nothing of them is kept.
        masked: `Posterior` of the images without what is masked, for an inpainting network; else
            `None`.
        mask: (batch, height, width, 1) float32, of the latents, 1 where to repaint.
        strength: float in (0, 1].
        streams: a noise stream for each image.
    """
    seen = [posterior for posterior in (known, masked) if posterior is not None]
    latents = None if known is None else known.sample(streams)
    noise = unit_noise(streams, seen[0].mean.shape[1:])
    if masked is None:
        # diffusers samples the masked image's latents for every network.
        unit_noise(streams, noise.shape[1:])
        return Start(noise, latents, strength, mask)
    return Start(noise, latents, strength, conditioning=conditioning(mask, masked.sample(streams)))


def conditioning(mask: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Join the further channels of an inpainting network's input.

    Args:
        mask: (batch, height, width, 1) float32, 1 where to repaint.
        masked: (batch, height, width, channels) float32, latents of the masked image.

    Returns:
        (batch, height, width, 1 + channels) float32.
    """
    return np.concatenate([mask, masked], axis=-1)


def _per_image(values):
    return np.array(values, np.float32).reshape(-1, 1, 1, 1)
