"""The inputs of every peer."""

from __future__ import annotations

import numpy as np

PROMPT = "a lighthouse at dawn"
SCALE = 7.5
TIMESTEP = 981.0
TOKENS = 77


def latents(side: int) -> np.ndarray:
    """Draw unit noise for an image of `side` pixels: (1, side / 8, side / 8, 4) float32."""
    return np.random.default_rng(0).normal(size=(1, side // 8, side // 8, 4)).astype("float32")


def context(batch: int, width: int) -> np.ndarray:
    """Draw text states: (batch, 77, width) float32."""
    return np.random.default_rng(1).normal(size=(batch, TOKENS, width)).astype("float32")


def attention_shapes(side: int) -> list[tuple[int, int, int, int]]:
    """Return (batch, tokens, heads, head_dim) of the self-attentions of a guided step of SDXL."""
    return [(2, (side // 16) ** 2, 10, 64), (2, (side // 32) ** 2, 20, 64)]


def attention(side: int) -> list[np.ndarray]:
    """Draw an array for each of `attention_shapes`, which is query, key and value at once."""
    rng = np.random.default_rng(2)
    return [rng.normal(size=shape).astype("float32") for shape in attention_shapes(side)]
