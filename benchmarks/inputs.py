"""What every peer is given."""

from __future__ import annotations

import numpy as np

PROMPT = "a lighthouse at dawn"
SCALE = 7.5
TIMESTEP = 981.0
TOKENS = 77


def latents(side: int) -> np.ndarray:
    """Unit noise for a picture of `side` pixels: (1, side / 8, side / 8, 4) float32."""
    return np.random.default_rng(0).normal(size=(1, side // 8, side // 8, 4)).astype("float32")


def context(batch: int, width: int) -> np.ndarray:
    """Text states: (batch, 77, width) float32."""
    return np.random.default_rng(1).normal(size=(batch, TOKENS, width)).astype("float32")
