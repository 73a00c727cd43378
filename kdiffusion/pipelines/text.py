"""Pipelines of texts: a text encoder and its tokenizer condition the diffusion model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from kdiffusion.pipelines.base import Component
from kdiffusion.pipelines.latent import LatentPipeline
from kdiffusion.pipelines.settings import check_count, one_each
from kdiffusion.runtime.programs import Program
from kdiffusion.text.tokenizer import SimpleTokenizer


class TextPipeline(LatentPipeline):
    """A latent diffusion model that is prompted with texts."""

    text_encoder = Component("text_encoder", "Tokens to text states, see `TextEncoder`.")

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._text_encoder: Any = None
        self._tokenizer: SimpleTokenizer | None = None
        self._encode_text_program = Program(encode_tokens, self.jit_compile)

    @property
    def tokenizer(self) -> SimpleTokenizer:
        """Texts to tokens; may be replaced by assignment."""
        if self._tokenizer is None:
            self._tokenizer = self.source.tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        self._tokenizer = tokenizer

    def _tokenizers(self):
        names = [part.name for part in self.source.family.parts if part.tokenizer is not None]
        found = {name: self.source.tokenizer(name) for name in names if name != "text_encoder"}
        return {"text_encoder": self.tokenizer, **found}

    def encode_text(self, prompt: str | Sequence[str]) -> np.ndarray:
        """Encode texts for `generate_image`.

        Args:
            prompt: str, or a list of n texts.

        Returns:
            (n, 77, width) float32; n is 1 for a single text.

        Raises:
            ValueError: If there is no text.
        """
        rows = self.tokenizer.rows([prompt] if isinstance(prompt, str) else prompt)
        if not len(rows):
            raise ValueError("`prompt` must be a text or a list of texts. Received: an empty list")
        tokens, program = ops.convert_to_tensor(rows, "int32"), self._encode_text_program
        component = self.components()["text_encoder"]
        encoder = component.load(self, lambda model: program.prepare(model, tokens))
        return ops.convert_to_numpy(program(encoder, tokens))

    def conditions(self, texts: Sequence[str], size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return the inputs that the diffusion model is given for texts.

        A family whose network takes more than a context overrides this one method.

        Args:
            texts: list of n texts.
            size: (height, width) of the images in pixels.

        Returns:
            Dictionary of arrays of n rows: `context`, (n, tokens, width) float32.
        """
        return {"context": self.encode_text(texts)}

    def negative_conditions(
        self, texts: Sequence[str | None], size: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Return the inputs that guidance moves away from.

        Args:
            texts: list of n texts; `None` where the user gave none.
            size: (height, width) of the images in pixels.

        Returns:
            Dictionary as `conditions` returns.
        """
        return self.conditions([text or "" for text in texts], size)


@dataclass(frozen=True)
class Texts:
    """The texts of a call.

    Args:
        count: int, images.
        prompts: list of n texts, each for count / n images in a row.
        negatives: list of one or n texts, likewise; `None` where the user gave none.
        context: encoded texts in place of prompts, or `None`.
    """

    count: int
    prompts: Sequence[str]
    negatives: Sequence[str | None]
    context: dict[str, np.ndarray] | None = None

    @classmethod
    def of_prompts(cls, prompt, negative_prompt, batch_size):
        """Return the texts of n * batch_size images."""
        prompts = [prompt] if isinstance(prompt, str) else _strings("prompt", prompt)
        if not prompts:
            raise ValueError("`prompt` must be a text or a list of texts. Received: an empty list")
        count = len(prompts) * check_count("batch_size", batch_size)
        return cls(count, prompts, cls._negatives(negative_prompt, len(prompts)))

    @classmethod
    def of_context(cls, context, negative_prompt):
        """Return the texts of images of which each has an encoded text."""
        negatives = cls._negatives(negative_prompt, len(context))
        return cls(len(context), [], negatives, {"context": context})

    @staticmethod
    def _negatives(negative_prompt, count):
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [negative_prompt]
        return _strings("negative_prompt", one_each("negative_prompt", negative_prompt, count))


def _strings(name, texts):
    """Return a list of texts, if it is one."""
    if not isinstance(texts, Collection) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"`{name}` must be a list of strings, or a single one. Received: {texts!r:.200}"
        )
    return list(texts)


def encode_tokens(model: Any, tokens: Any) -> Any:
    """Return the states of tokens as a `Program` computes them.

    Args:
        model: `TextEncoder`.
        tokens: (batch, n) int32.

    Returns:
        (batch, n, width) float32.
    """
    return ops.cast(model(tokens)["context"], "float32")
