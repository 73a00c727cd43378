"""A tiny model of each family; `pipelines/test_families.py` tests what all of them share.

A new family adds a record to `FAMILIES`.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import keras
import numpy as np

from kdiffusion import LatentDiffusion, PixelDiffusion, Schedule, SimpleTokenizer, StableDiffusion
from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.weights.variables import MODELS

V = Schedule(prediction="v")
QUIET = {"num_steps": 2, "seed": 7, "verbose": 0}

NETWORK = DiffusionArchitecture(
    channels=(8, 16),
    layers_per_level=1,
    depths=(1, 0),
    num_heads=(2, 2),
    context_width=16,
    num_groups=4,
)
CODEC = AutoencoderArchitecture(channels=(8, 8, 16), layers_per_level=1, num_groups=4)
TEXT = TextEncoderArchitecture(
    vocabulary_size=514, width=16, depth=2, num_heads=2, mlp_width=32, end_id=513
)
WITHOUT_TEXT = replace(NETWORK, context_width=None)


class Family(NamedTuple):
    """A pipeline and what it is made of.

    Args:
        pipeline: class of the whole model.
        parts: architecture of each part, by kind.
        generate: function of the model and settings of a call, which returns images.
        schedule: noise levels and prediction.
        size: default height and width.
        tokenizer: of a family that is prompted by text.
    """

    pipeline: type
    parts: dict[str, Any]
    generate: Callable[..., np.ndarray]
    schedule: Schedule = Schedule()
    size: tuple[int, int] = (16, 24)
    tokenizer: SimpleTokenizer | None = None


def from_text(model, **settings):
    return model.text_to_image("a red circle", **QUIET | settings)


def from_mask(model, **settings):
    size = settings.get("height", model.img_height), settings.get("width", model.img_width)
    image, mask = np.full((*size, 3), 99, np.uint8), np.ones(size, bool)
    return model.inpaint(image, mask, "a red circle", **QUIET | settings)


def from_label(model, **settings):
    return model.generate_image(3, **QUIET | settings)


def from_nothing(model, **settings):
    return model.generate_image(**QUIET | settings)


def _text_family(network, generate=from_text, text=TEXT, schedule=Schedule()):
    parts = {"text_encoder": text, "diffusion_model": network, **_codec(CODEC)}
    tokenizer = SimpleTokenizer.byte_level()
    return Family(StableDiffusion, parts, generate, schedule, tokenizer=tokenizer)


def _codec(architecture):
    return dict.fromkeys(("image_encoder", "image_decoder"), architecture)


_SECOND = replace(NETWORK, linear_projection=True, num_heads=(2, 4))
_OF_CLASSES = replace(WITHOUT_TEXT, num_classes=5)
_PIXELS = replace(_OF_CLASSES, in_channels=3, out_channels=3)
FAMILIES = {
    "text": _text_family(NETWORK),
    "text, v": _text_family(_SECOND, text=replace(TEXT, activation="gelu"), schedule=V),
    "inpainting": _text_family(replace(NETWORK, in_channels=9), from_mask),
    "latents": Family(
        LatentDiffusion, {"diffusion_model": WITHOUT_TEXT, **_codec(CODEC)}, from_nothing
    ),
    "latents of classes": Family(
        LatentDiffusion, {"diffusion_model": _OF_CLASSES, **_codec(CODEC)}, from_label, V
    ),
    "pixels of classes": Family(
        PixelDiffusion, {"diffusion_model": _PIXELS}, from_label, V, (12, 10)
    ),
}


@functools.cache
def model_of(name: str) -> Any:
    """Return the model of a family, with random weights; do not change it."""
    family = FAMILIES[name]
    keras.utils.set_random_seed(0)
    parts = {kind: MODELS[kind](record, name=kind) for kind, record in family.parts.items()}
    texts = {} if family.tokenizer is None else {"tokenizer": family.tokenizer}
    return family.pipeline.from_parts(
        parts, family.schedule, family.size, jit_compile=False, **texts
    )
