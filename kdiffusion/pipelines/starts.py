"""Where a run starts: from noise, from a picture, or from a picture with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdiffusion import images
from kdiffusion.pipelines.base import LatentComponents
from kdiffusion.sampling.noise import NoiseStream
from kdiffusion.sampling.table import Table


class Start(NamedTuple):
    """What a run starts from, for a batch of images.

    Args:
        noise: (batch, height, width, channels) float32, unit normal.
        known: latents of a picture, like `noise`, or `None`.
        strength: float in (0, 1], share of the noise range that is run.
        mask: (batch, height, width, 1) float32, 1 where the latents are drawn, 0 where they are
            to stay as `known`; or `None`.
        conditioning: further channels of the network's input, or `None`.
    """

    noise: np.ndarray
    known: np.ndarray | None = None
    strength: float = 1.0
    mask: np.ndarray | None = None
    conditioning: np.ndarray | None = None

    def latents(self, tables: Sequence[Table]) -> np.ndarray:
        """x at the first row of each image's table.

        A mask at full strength forgets the picture, as in diffusers; image_to_image at full
        strength still starts from what little of it the first level holds.
        """
        if self.known is None or (self.mask is not None and self.strength == 1.0):
            return _per_image([table.start_scale for table in tables]) * self.noise
        a = _per_image([table.a[0] for table in tables])
        s = _per_image([table.s[0] for table in tables])
        return a * self.known + s * self.noise

    @property
    def constraint(self) -> dict[str, np.ndarray]:
        """The inputs of `generation.denoise` that keep what is known."""
        if self.mask is None or self.known is None:
            return {}
        return {"mask": self.mask, "known": self.known, "known_noise": self.noise}


def unit_noise(streams: Sequence[NoiseStream], shape: tuple[int, int, int]) -> np.ndarray:
    """The start noise of each stream, (batch, height, width, channels)."""
    return np.stack([stream.draw(*shape) for stream in streams])


def noise_start(
    streams: Sequence[NoiseStream],
    shape: tuple[int, int, int],
    diffusion_noise: Any = None,
    seed: Any = None,
) -> Start:
    """Where drawing from noise alone starts.

    Args:
        streams: a noise stream for each image.
        shape: (height, width, channels).
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


def image_start(
    components: LatentComponents,
    pictures: np.ndarray,
    strength: float,
    streams: Sequence[NoiseStream],
) -> Start:
    """A start from pictures: a sample of their latents is drawn first, then the start noise.

    Args:
        components: the model.
        pictures: (batch, height, width, 3) float32 in [-1, 1].
        strength: float in (0, 1].
        streams: one for each picture.
    """
    known = components._encode_pictures(pictures, streams)
    return Start(unit_noise(streams, known.shape[1:]), known, strength)


def inpainting_start(
    components: LatentComponents,
    pictures: np.ndarray,
    masks: np.ndarray,
    strength: float,
    streams: Sequence[NoiseStream],
) -> Start:
    """A start for repainting; draws in the order of diffusers' inpainting pipeline.

    An inpainting network is conditioned on mask and masked picture; for any other the latents
    outside the mask are kept.

    Args:
        components: the model.
        pictures: (batch, height, width, 3) float32 in [-1, 1].
        masks: (batch, height, width, 1) float32, 1 where to repaint.
        strength: float in (0, 1].
        streams: one for each picture.
    """
    conditioned = _is_inpainting(components)
    codec = components.decoder.architecture
    known = None
    if not conditioned or strength < 1.0:
        known = components._encode_pictures(pictures, streams)
    height, width = (side // codec.downsampling for side in pictures.shape[1:3])
    noise = unit_noise(streams, (height, width, codec.latent_channels))
    masked = components._encode_pictures(images.masked_image(pictures, masks), streams)
    mask = images.latent_mask(masks, codec.downsampling)
    if conditioned:
        conditioning = np.concatenate([mask, masked], axis=-1)
        return Start(noise, known, strength, conditioning=conditioning)
    return Start(noise, known, strength, mask)


def conditioning_of(components: LatentComponents, start: Start) -> np.ndarray | None:
    """What an inpainting network is told: mask and masked latents, (batch, height, width, 5).

    Without a mask everything is to be painted. `None` for any other network.
    """
    if not _is_inpainting(components) or start.conditioning is not None:
        return start.conditioning
    count, height, width, _ = start.noise.shape
    downsampling = components.decoder.architecture.downsampling
    grey = np.zeros((1, height * downsampling, width * downsampling, 3), np.float32)
    mask = np.ones((1, height, width, 1), np.float32)
    everything = np.concatenate([mask, components._encode_pictures(grey, None)], axis=-1)
    return np.repeat(everything, count, axis=0)


def _is_inpainting(components):
    architecture = components._architecture("diffusion_model")
    return architecture.in_channels > architecture.out_channels


def _per_image(values):
    return np.array(values, np.float32).reshape(-1, 1, 1, 1)
