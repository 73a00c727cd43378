"""A diffusion model that is trained from scratch, as a source of its parts."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import keras

from kdiffusion.models.architectures import TextEncoderArchitecture
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.records import fields
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.training.config.sections import DiffusionParts
from kdiffusion.training.trainers import clip_initialization
from kdiffusion.weights import variables
from kdiffusion.weights.find import open_source
from kdiffusion.weights.sources import Built, PartsSource, Source
from weights_conversion import Family, family_of


class NewModel(PartsSource):
    """New networks, and parts of other models; architectures are known before a network is made.

    Args:
        parts: `DiffusionParts`.
        size: default (height, width) of an image in pixels.
        seed: int, of the new weights.
    """

    name = "a new model"

    def __init__(self, parts: DiffusionParts, size: tuple[int, int], seed: int):
        super().__init__({}, parts.schedule, size)
        self._parts = parts
        self._seed = seed

    @cached_property
    def _autoencoder(self) -> Source:
        return open_source(self._parts.autoencoder or "")

    @cached_property
    def _text_encoder(self) -> Source | None:
        """The model whose text encoder is used; `None` for a new text encoder."""
        name = self._parts.text_encoder
        return open_source(name) if isinstance(name, str) else None

    @property
    def family(self) -> Family:
        """See `Source`."""
        return family_of(
            lambda part: self.has(part.name), lambda part: fields(self.architecture(part.name))
        )

    def has(self, kind: str) -> bool:
        """See `Source`."""
        given = {
            "diffusion_model": self._parts.diffusion_model,
            "text_encoder": self._parts.text_encoder,
            "image_encoder": self._parts.autoencoder,
            "image_decoder": self._parts.autoencoder,
        }
        return given.get(kind) is not None

    def architecture(self, kind: str) -> Any:
        """See `Source`."""
        if kind == "diffusion_model":
            return self._parts.diffusion_model
        if kind != "text_encoder":
            return self._autoencoder.architecture(kind)
        if self._text_encoder is None:
            return self._parts.text_encoder
        architecture = self._text_encoder.architecture(kind)
        return dataclasses.replace(architecture, projection_width=None)

    def model(self, kind: str, dtype: Any, built: Built | None = None) -> ArchitectureModel:
        """See `Source`."""
        if kind == "diffusion_model":
            # Keras draws new weights from the process's own generators.
            keras.utils.set_random_seed(self._seed)
            return DiffusionModel(self._parts.diffusion_model, dtype=dtype, name=kind)
        if kind != "text_encoder":
            return self._autoencoder.model(kind, dtype, built)
        if self._text_encoder is not None:
            return variables.without_projection(self._text_encoder.model(kind, dtype))
        encoder = TextEncoder(self._parts.text_encoder, dtype=dtype, name=kind)
        clip_initialization.initialize(encoder, self._seed)
        return encoder

    @cached_property
    def _tokenizer_of_texts(self) -> SimpleTokenizer:
        if self._text_encoder is not None:
            return self._text_encoder.tokenizer()
        assert isinstance(self._parts.text_encoder, TextEncoderArchitecture)
        return open_tokenizer(self._parts.tokenizer, self._parts.text_encoder)

    def tokenizer(self, name: str = "text_encoder") -> SimpleTokenizer:
        """See `Source`."""
        return self._tokenizer_of_texts


def open_tokenizer(name: str, architecture: TextEncoderArchitecture) -> SimpleTokenizer:
    """Open the tokenizer of a new text encoder; may download.

    Args:
        name: see `DiffusionParts`.
        architecture: of the text encoder.
    """
    if name == "byte_level":
        return SimpleTokenizer.byte_level(max_length=architecture.max_length)
    if name == "clip":
        return SimpleTokenizer.default(max_length=architecture.max_length)
    return open_source(name).tokenizer()
