"""The name tables: every tensor of every model under its kdiffusion, CompVis and diffusers name.

A table row names one layer in the three dialects and says what kind of layer it is and how wide:
`"conv3 inputs outputs"` is a 3×3 convolution whose sizes the generator fills in. Where the dialects
store a layer in different forms, both stand there, CompVis first: `"pointwise|dense width width"`.
The generators walk the levels of a model and count; nothing is listed by hand, and no name is ever
made from another one by replacing text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_conversion.names.autoencoder import image_decoder, image_encoder
from weights_conversion.names.diffusion_model import diffusion_model
from weights_conversion.names.image_tower import image_tower
from weights_conversion.names.table import DIALECTS, Row, Stored
from weights_conversion.names.text_encoder import text_encoder

__all__ = ["DIALECTS", "KINDS", "Row", "Stored", "rows"]

KINDS = {
    "text_encoder": text_encoder,
    "image_encoder": image_encoder,
    "image_decoder": image_decoder,
    "diffusion_model": diffusion_model,
    "image_tower": image_tower,
}


def rows(kind: str, fields: Mapping[str, Any]) -> tuple[Row, ...]:
    """Returns the name table of a model.

    Args:
        kind: "text_encoder", "image_encoder", "image_decoder", "diffusion_model" or "image_tower".
        fields: the architecture, as `configs` gives it; "image_encoder" and "image_decoder" both
            take the autoencoder's. The text encoder's activation tells which family the CompVis
            names follow: "quick_gelu" is CLIP in transformers' names, "gelu" is OpenCLIP.

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
    return tuple(KINDS[kind](fields))
