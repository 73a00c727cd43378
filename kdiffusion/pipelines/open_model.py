"""Open a model of any kind with the class that generates with it."""

from __future__ import annotations

import os
from typing import Any

from kdiffusion.pipelines.base import Pipeline
from kdiffusion.pipelines.latent_diffusion import LatentDiffusion, PixelDiffusion
from kdiffusion.pipelines.stable_diffusion import StableDiffusion
from kdiffusion.weights.find import open_source
from kdiffusion.weights.sources import Source

# By the names that rows of `weights_conversion.FAMILIES` give in `pipeline`.
PIPELINES: dict[str, type[Pipeline]] = {
    "LatentDiffusion": LatentDiffusion,
    "PixelDiffusion": PixelDiffusion,
    "StableDiffusion": StableDiffusion,
}


def open_model(
    preset: str | os.PathLike,
    img_height: int | None = None,
    img_width: int | None = None,
    jit_compile: bool | str = "auto",
    *,
    dtype: Any = None,
    **settings: Any,
) -> Pipeline:
    """Open a model with the class that generates with it.

    Args:
        preset: see `weights.find.open_source`. It is looked up, and downloaded if need be, at
            once.
        img_height: int, or `None` for the checkpoint's own.
        img_width: int, or `None` for the checkpoint's own.
        jit_compile: `True`, `False` or `"auto"`, see `StableDiffusion`.
        dtype: Keras dtype policy, or `None` for the global one.
        **settings: of a single file, see `StableDiffusion.from_preset`.

    Returns:
        A `StableDiffusion`, `LatentDiffusion` or `PixelDiffusion`.

    Raises:
        ValueError: If there is no such preset, folder or repository.

    Example:

    ```python
    model = open_model("hf://organisation/repository")
    ```
    """
    source = open_source(preset, **settings)
    model = class_of(source).from_source(source, img_height, img_width, jit_compile, dtype=dtype)
    model.preset = preset
    return model


def class_of(source: Source) -> type[Pipeline]:
    """Return the class that generates with a source's parts.

    Args:
        source: see `weights.find.open_source`.

    Raises:
        ValueError: If its parts make no model that generates.
    """
    family = source.family
    if family.pipeline is None:
        raise ValueError(
            f"{source.name} is {family.title}, which generates nothing by itself. "
            f"{family.use or 'Name a whole model.'}"
        )
    return PIPELINES[family.pipeline]
