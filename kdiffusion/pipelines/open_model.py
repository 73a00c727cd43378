"""Whole models of any kind, by the class that draws with them."""

from __future__ import annotations

import os
from typing import Any

from kdiffusion.pipelines.base import Components
from kdiffusion.pipelines.latent_diffusion import LatentDiffusion, PixelDiffusion
from kdiffusion.pipelines.stable_diffusion import StableDiffusion
from kdiffusion.weights.sources import Source, open_source


def open_model(
    preset: str | os.PathLike,
    img_height: int | None = None,
    img_width: int | None = None,
    *,
    dtype: Any = None,
) -> Components:
    """Make a model of the class that the preset was made for.

    Args:
        preset: see `sources.open_source`.
        img_height: int, or `None` for the checkpoint's own.
        img_width: int, or `None` for the checkpoint's own.
        dtype: Keras dtype policy, or `None` for the global one.

    Returns:
        A `StableDiffusion`, `LatentDiffusion` or `PixelDiffusion`.

    Raises:
        ValueError: If there is no such preset, folder or repository.
    """
    model_class = class_of(open_source(preset))
    return model_class.from_preset(preset, img_height, img_width, dtype=dtype)


def class_of(source: Source) -> type[Components]:
    """The class that draws with a source's parts.

    Args:
        source: see `sources.open_source`.
    """
    if source.architecture("diffusion_model").context_width is not None:
        return StableDiffusion
    return LatentDiffusion if source.has("image_decoder") else PixelDiffusion
