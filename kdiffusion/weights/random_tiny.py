"""A tiny model of random numbers, for whatever needs no trained weights."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights.variables import MODELS, assign
from weights_conversion import FAMILIES

NAME = "random-tiny"

_AUTOENCODER = AutoencoderArchitecture(channels=(16, 16, 32, 32), layers_per_level=1, num_groups=8)


class RandomSource:
    """A tiny Stable Diffusion whose weights are random numbers from a fixed seed.

    It has learned nothing and generates coloured noise. It exists so that everything around the
    weights can be tried, tested and timed offline within seconds.
    """

    name = NAME
    height = 64
    width = 64

    architectures: Mapping[str, Any] = {
        "text_encoder": TextEncoderArchitecture(
            vocabulary_size=514, width=32, depth=2, num_heads=2, mlp_width=64, end_id=513
        ),
        "image_encoder": _AUTOENCODER,
        "image_decoder": _AUTOENCODER,
        "diffusion_model": DiffusionArchitecture(
            channels=(16, 32),
            layers_per_level=1,
            depths=(1, 0),
            num_heads=(2, 2),
            context_width=32,
            num_groups=8,
        ),
    }

    @property
    def family(self):
        """See `Source`."""
        return FAMILIES["sd1"]

    def has(self, name):
        """See `Source`."""
        return name in self.architectures

    def architecture(self, name):
        """See `Source`."""
        return self.architectures[name]

    def model(self, name, dtype, built=None):
        """See `Source`."""
        model = MODELS[name](self.architecture(name), initialize=False, dtype=dtype, name=name)
        if built is not None:
            built(model)
        assign(model, [(v.path, _random_weight(name, v.path, v.shape)) for v in model.variables])
        return model

    def tokenizer(self, name="text_encoder"):
        """See `Source`."""
        return SimpleTokenizer.byte_level()

    def schedule(self):
        """See `Source`."""
        return Schedule()

    def sampling(self):
        """See `Source`."""
        return "ddim", Spacing()


def _random_weight(name, path, shape):
    leaf = path.split("/")[-1]
    if leaf == "gamma":
        return np.ones(shape, np.float32)
    if leaf in ("beta", "bias"):
        return np.zeros(shape, np.float32)
    generator = np.random.default_rng(zlib.crc32(f"{name}/{path}".encode()))
    deviation = 1.0 if leaf.endswith("embedding") else np.prod(shape[:-1]) ** -0.5
    return (generator.standard_normal(tuple(shape)) * deviation).astype(np.float32)
