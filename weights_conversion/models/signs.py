"""Signs by which a single file is recognised: names and shapes of its tensors, never guesses.

Sources: the detection of diffusers, ComfyUI, AUTOMATIC1111 and stable-diffusion.cpp, which all
agree on these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]  # by name, in CompVis style
Sign = Callable[[Shapes], bool]

_UNET = "model.diffusion_model."


class UNet(NamedTuple):
    """The U-Net of a file, as far as families differ in it.

    Attributes:
        inputs: channels of its input.
        context: width of the text states; None if it attends to none.
        has_labels: whether a vector is added to the time embedding.
        is_deep: whether its second level has two transformer blocks in a row, as in XL.
    """

    inputs: int
    context: int | None
    has_labels: bool
    is_deep: bool


def begins(*beginnings: str) -> Sign:
    """Return the sign that a name begins so, once `model.diffusion_model.` is taken off."""
    return lambda shapes: any(name.removeprefix(_UNET).startswith(beginnings) for name in shapes)


def contains(*parts: str) -> Sign:
    """Return the sign that a name contains one of these parts."""
    return lambda shapes: any(part in name for part in parts for name in shapes)


def either(*signs: Sign) -> Sign:
    """Return the sign that one of some signs is there."""
    return lambda shapes: any(sign(shapes) for sign in signs)


def unet(test: Callable[[UNet], bool]) -> Sign:
    """Return the sign that there is a U-Net in CompVis names that passes a test."""

    def sign(shapes: Shapes) -> bool:
        found = _unet(shapes)
        return found is not None and test(found)

    return sign


def without_unet(beginning: str) -> Sign:
    """Return the sign that a name begins so and that there is no U-Net in CompVis names."""
    is_there = begins(beginning)
    return lambda shapes: _unet(shapes) is None and is_there(shapes)


def _unet(shapes: Shapes) -> UNet | None:
    first = shapes.get(f"{_UNET}input_blocks.0.0.weight")
    if first is None:
        return None
    contexts = (
        shape[1]
        for name, shape in shapes.items()
        if name.startswith(_UNET) and name.endswith("attn2.to_k.weight") and len(shape) > 1
    )
    return UNet(
        inputs=(*first, 0, 0)[1],
        context=next(contexts, None),
        has_labels=any(name.startswith(f"{_UNET}label_emb.") for name in shapes),
        is_deep=f"{_UNET}input_blocks.4.1.transformer_blocks.1.norm1.weight" in shapes,
    )
