"""Where CLIP's two networks start when they are trained from nothing."""

from __future__ import annotations

import math
import zlib

import numpy as np

from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder


def initialize(model: ImageTower | TextEncoder, seed: int) -> None:
    """Draw a network's weights as CLIP's authors did, the same for a seed on both backends.

    Normals whose deviation depends on width and depth only, zero biases and unit gains
    (`initialize_parameters` in model.py of openai/CLIP, whose text tower's rules both towers follow
    here, as they do in transformers).

    Args:
        model: `ImageTower` or `TextEncoder`; its weights are replaced.
        seed: int, from 0.
    """
    for variable in model.variables:
        variable.assign(_draw(model, variable.path, tuple(variable.shape), seed))


def _draw(model, path, shape, seed):
    *parents, leaf = path.split("/")
    if leaf in ("bias", "beta", "gamma"):
        return np.full(shape, leaf == "gamma", np.float32)
    layer = parents[-1] if leaf == "kernel" else leaf
    key = zlib.crc32(f"{type(model).__name__}/{path}".encode())
    generator = np.random.default_rng([seed, key])
    deviation = _deviation(layer, shape, model)
    return (generator.standard_normal(shape) * deviation).astype(np.float32)


def _deviation(layer, shape, model):
    width, depth = model.architecture.width, model.architecture.depth
    if isinstance(model, TextEncoder) and layer in _EMBEDDINGS:
        return _EMBEDDINGS[layer]
    if layer == "patches":
        return math.prod(shape[:-1]) ** -0.5
    if layer == "fc1":
        return (2 * width) ** -0.5
    # The two that end a residual branch are smaller the more branches there are.
    return width**-0.5 * ((2 * depth) ** -0.5 if layer in ("out", "fc2") else 1.0)


_EMBEDDINGS = {"token_embedding": 0.02, "position_embedding": 0.01}
