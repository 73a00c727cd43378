"""Pipelines without a text: unconditional, or of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from kdiffusion import images
from kdiffusion.models.architectures import DiffusionArchitecture
from kdiffusion.pipelines.base import Pipeline
from kdiffusion.pipelines.latent import LatentPipeline
from kdiffusion.pipelines.settings import (
    DrawSettings,
    Settings,
    check_count,
    shares_settings,
)
from kdiffusion.pipelines.starts import noise_start


class LabelledDiffusion(Pipeline):
    """A diffusion model without a text, of classes or unconditional."""

    @shares_settings
    def generate_image(
        self,
        label: int | Sequence[int] | None = None,
        batch_size: int = 1,
        num_steps: int | Sequence[int] = 50,
        unconditional_guidance_scale: float | Sequence[float] = 1.0,
        diffusion_noise: Any = None,
        seed: int | Sequence[int] | None = None,
        **settings: Unpack[DrawSettings],
    ) -> np.ndarray:
        """Generate images, of a class if the model knows classes.

        Args:
            label: int, the class, or a list of n of them, each for `batch_size` images; `None`
                is no class in particular, the only choice of an unconditional model.
            batch_size: int, images of each class.
            num_steps: int, steps of the sampler.
            unconditional_guidance_scale: float, how strongly the class is followed; at most 1 is
                off and takes half the time.
            diffusion_noise: unit noise to start from, as the network sees it: (height, width,
                channels) for all images or with a leading batch axis; in place of `seed`.
            seed: int; image i of the result is the one that `seed + i` gives alone. `None` takes
                a random one.

        Returns:
            (n * batch_size, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, or if the result is not finite.

        Example:

        ```python
        model = LatentDiffusion.from_preset("flowers")
        images = model.generate_image(label=[3, 7], batch_size=2, seed=42)
        ```
        """
        labels = self._labels(label, check_count("batch_size", batch_size))
        call = Settings(
            num_steps=num_steps, guidance_scale=unconditional_guidance_scale, seed=seed, **settings
        )
        num_classes = self.architecture("diffusion_model").num_classes
        conditions, negatives = {}, None
        if num_classes is not None:
            conditions = {"label": labels}
        if call.is_guided(len(labels)):
            if num_classes is None:
                raise ValueError(
                    "An unconditional model has nothing to be guided to. Received: "
                    f"unconditional_guidance_scale={unconditional_guidance_scale!r}. Use 1."
                )
            negatives = {"label": np.full_like(labels, num_classes)}
        streams = call.streams(len(labels))
        shape = self.latent_shape(call.height, call.width)
        start = noise_start(streams, shape, diffusion_noise, seed)
        return self.decode(self.denoise(start, conditions, negatives, call, streams))

    def _labels(self, label, batch_size):
        """Return the label of each image, (count,) int32; any number where there are no classes."""
        num_classes = self.architecture("diffusion_model").num_classes
        if label is None:
            return np.full(batch_size, num_classes or 0, np.int32)
        if num_classes is None:
            raise ValueError(
                f"An unconditional model knows no classes. Received: label={label!r}. Use None."
            )
        labels = np.atleast_1d(np.asarray(label))
        whole = labels.ndim == 1 and labels.size and np.issubdtype(labels.dtype, np.integer)
        if not whole or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"`label` must be a whole number from 0 to {num_classes - 1}, or a list of them. "
                f"Received: label={label!r}"
            )
        return np.repeat(labels, batch_size).astype(np.int32)

    @classmethod
    def _check_architecture(cls, architecture: DiffusionArchitecture) -> None:
        if architecture.context_width is not None:
            raise ValueError(
                f"{cls.__name__} draws without a text. Received: a network with "
                f"context_width={architecture.context_width}. Use StableDiffusion."
            )
        if architecture.in_channels != architecture.out_channels:
            raise ValueError(
                f"{cls.__name__} gives its network nothing beside what it draws. Received: "
                f"a network with in_channels={architecture.in_channels}, "
                f"out_channels={architecture.out_channels}."
            )


class LatentDiffusion(LatentPipeline, LabelledDiffusion):
    """A diffusion model of latents, unconditional or of classes (Rombach et al. 2022).

    Args:
        img_height: int, default height of a picture in pixels, a multiple of the autoencoder's
            downsampling factor.
        img_width: int, default width of a picture in pixels, likewise.
        jit_compile: `True`, `False` or `"auto"`, see `StableDiffusion`.
        preset: the path of a folder in diffusers' layout, or `"hf://organisation/repository"`.
        dtype: Keras dtype policy of all networks, or `None` for the global one.

    Raises:
        ValueError: If a size is out of range or the backend cannot compute in `dtype`.

    Example:

    ```python
    model = LatentDiffusion.from_preset("flowers")  # a folder that `save` wrote
    images = model.generate_image(label=3, batch_size=4, seed=42)
    ```
    """


class PixelDiffusion(LabelledDiffusion):
    """A diffusion model of pixels, unconditional or of classes (Ho et al. 2020).

    Args:
        img_height: int, default height of a picture in pixels.
        img_width: int, default width of a picture in pixels.
        jit_compile: `True`, `False` or `"auto"`, see `StableDiffusion`.
        preset: the path of a folder in diffusers' layout, or `"hf://organisation/repository"`.
        dtype: Keras dtype policy of the network, or `None` for the global one.

    Raises:
        ValueError: If a size is out of range or the backend cannot compute in `dtype`.

    Example:

    ```python
    network = DiffusionModel({"in_channels": 3, "out_channels": 3, "context_width": None})
    schedule = Schedule(prediction="v")
    model = PixelDiffusion.from_parts({"diffusion_model": network}, schedule, (32, 32))
    ```
    """

    def decode(self, latents: Any) -> np.ndarray:
        """Turn the network's values into pixels.

        Args:
            latents: (batch, height, width, 3) float, about [-1, 1].

        Returns:
            (batch, height, width, 3) uint8.
        """
        return images.to_uint8(latents)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """See `Pipeline.latent_shape`."""
        height = self.img_height if height is None else height
        width = self.img_width if width is None else width
        channels = self.architecture("diffusion_model").out_channels
        return (*images.check_size(height, width, 1), channels)
