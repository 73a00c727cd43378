"""The initial weights of CLIP's two networks."""

from __future__ import annotations

import math
import zlib

import numpy as np
from keras import ops

from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder


def initialize(model: ImageTower | TextEncoder, seed: int) -> None:
    """Draw a network's weights as CLIP's authors did, the same for a seed on both backends.

    Weights are normals whose deviation depends on width and depth only, biases are 0 and gains 1
    (`initialize_parameters` in model.py of openai/CLIP). Both towers follow the rules of the text
    tower, as they do in transformers.

    Args:
        model: `ImageTower` or `TextEncoder`; its weights are replaced.
        seed: int, from 0.
    """
    for variable in model.variables:
        variable.assign(_weight(model, variable.path, tuple(variable.shape), seed))


def separate_embeddings(image_tower: ImageTower, text_encoder: TextEncoder) -> None:
    """Start the embeddings of words and positions far apart, for small networks and few words.

    With CLIP's own start, what captions have in common soon outgrows the difference of two words,
    and colours outweigh the position of a patch. An image and its mirror image are then the same to
    CLIP, and so are "left" and "right". Here the embeddings of texts are longer, and positions
    start as sines and cosines of row and column (Beyer et al. 2022, arXiv:2205.01580). Call it
    after `initialize`.

    Args:
        image_tower: `ImageTower` whose width is a multiple of 4.
        text_encoder: `TextEncoder`.
    """
    for variable in text_encoder.variables:
        if variable.path.split("/")[-1] in _EMBEDDINGS:
            variable.assign(_LONGER * variable.value)
    architecture = image_tower.architecture
    side = architecture.image_size // architecture.patch_size
    embedding = image_tower.get_layer("embedding").position_embedding
    positions = ops.convert_to_numpy(embedding.value).copy()
    positions[1:] = _sines_and_cosines(side, architecture.width)  # the first is the class token's
    embedding.assign(positions)


def _sines_and_cosines(side, width):
    """Return (side * side, width) for the cells of a square from the top left, row by row."""
    waves = width // 4
    frequencies = _LONGEST_WAVE ** -np.linspace(0, 1, waves)
    angles = np.arange(side)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns = np.broadcast_to(line[None, :], (side, side, 2 * waves))
    rows = np.broadcast_to(line[:, None], (side, side, 2 * waves))
    return np.concatenate([columns, rows], axis=2).reshape(side * side, width)


def _weight(model, path, shape, seed):
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
    # The two layers that end a residual branch are smaller the more branches there are.
    return width**-0.5 * ((2 * depth) ** -0.5 if layer in ("out", "fc2") else 1.0)


_EMBEDDINGS = {"token_embedding": 0.02, "position_embedding": 0.01}
_LONGER = 25.0
_LONGEST_WAVE = 100.0  # patches a radian: more than an image has
