"""The kinds of networks: one row each says how files name, describe and shape it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from weights_conversion import configs
from weights_conversion.models import from_shapes
from weights_conversion.models.from_shapes import Shapes
from weights_conversion.names import autoencoder, diffusion_model, image_tower, text_encoder
from weights_conversion.names.table import Row

Fields = Mapping[str, Any]
SampleSize = int | list[int] | None  # side, or height and width, in latents


def _nothing(fields: Fields, prefix: str) -> tuple[str, ...]:
    return ()


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
        rows: makes the name table, given the fields of the architecture and, for other single
            files than Stable Diffusion's, the start of its names there.
        fields: reads the fields from a config.json.
        config: makes the config.json, given the fields, the size of the latents and the longer
            side of the images in pixels.
        from_shapes: tells the fields from the shapes in a single file, given the start of its
            names there; None if no single file holds such a network.
        unused: tells the beginnings of names that single files have and the network does not use,
            given the fields and the start of its names there.
    """

    rows: Callable[..., Iterable[Row]]
    fields: Callable[[Fields], dict[str, Any]]
    config: Callable[[Fields, SampleSize, int], dict[str, Any]]
    from_shapes: Callable[[Shapes, str], dict[str, Any]] | None = None
    unused: Callable[[Fields, str], tuple[str, ...]] = _nothing


_IMAGE_ENCODER = Kind(
    autoencoder.image_encoder,
    configs.autoencoder_fields,
    lambda fields, sample_size, pixels: configs.autoencoder_config(fields, pixels),
    from_shapes.autoencoder,
)

KINDS = {
    "text_encoder": Kind(
        text_encoder.text_encoder,
        configs.text_encoder_fields,
        lambda fields, sample_size, pixels: configs.text_encoder_config(fields),
        from_shapes.text_encoder,
        text_encoder.unused,
    ),
    "image_encoder": _IMAGE_ENCODER,
    "image_decoder": _IMAGE_ENCODER._replace(rows=autoencoder.image_decoder),
    "diffusion_model": Kind(
        diffusion_model.diffusion_model,
        configs.diffusion_model_fields,
        lambda fields, sample_size, pixels: configs.diffusion_model_config(fields, sample_size),
        from_shapes.diffusion_model,
    ),
    "image_tower": Kind(
        image_tower.image_tower,
        configs.image_tower_fields,
        lambda fields, sample_size, pixels: configs.image_tower_config(fields),
    ),
}


def rows(kind: str, fields: Fields, prefix: str | None = None) -> tuple[Row, ...]:
    """Return the name table of a network.

    Args:
        kind: a name in `KINDS`, such as "text_encoder".
        fields: the architecture, as `configs` gives it; "image_encoder" and "image_decoder" both
            take the autoencoder's. The text encoder's activation tells which family the CompVis
            names follow: "quick_gelu" is CLIP in transformers' names, "gelu" is OpenCLIP.
        prefix: the start of its names in a single file; None for that of Stable Diffusion.

    Returns:
        One `Row` per variable. Every column is unique, an OpenCLIP stack counting as three.

    Raises:
        ValueError: the kind is unknown.

    Example:

    >>> rows("image_decoder", fields)[0].kdiffusion
    'conv_in/kernel'
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of model {kind!r}. Known kinds: {', '.join(KINDS)}.")
    table = KINDS[kind].rows
    return tuple(table(fields) if prefix is None else table(fields, prefix))
