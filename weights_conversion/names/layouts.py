"""Layouts: how a Keras variable is stored in a PyTorch checkpoint, and back.

| layout    | Keras                    | file                                            |
|-----------|--------------------------|-------------------------------------------------|
| keep      | any                      | the same                                        |
| dense     | (in, out)                | (out, in); 1×1 convolutions are read too        |
| pointwise | (in, out)                | (out, in, 1, 1), a dense layer stored as a      |
|           |                          | 1×1 convolution; linear layers are read too     |
| conv      | (height, width, in, out) | (out, in, height, width)                        |

`dense[1]` and `keep[1]` are the second of three arrays stacked on the file's first axis: OpenCLIP
stores query, key and value so. Nothing here copies: the results are views where NumPy allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

STACK = 3  # arrays in a stacked tensor: query, key, value


class Layout(NamedTuple):
    """One way of storing: its two directions and the shapes that files have."""

    to_keras: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    stored_shapes: Callable[[tuple[int, ...]], tuple[tuple[int, ...], ...]]


def _dense_to_keras(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[:2]).T


def _dense_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    # The same projections are stored as linear layers, 2-D or 1-D convolutions, by different tools.
    matrix = shape[::-1]
    return matrix, (*matrix, 1, 1), (*matrix, 1)


LAYOUTS = {
    "keep": Layout(lambda array: array, lambda array: array, lambda shape: (shape,)),
    "dense": Layout(_dense_to_keras, lambda array: array.T, _dense_shapes),
    "pointwise": Layout(_dense_to_keras, lambda array: array.T[:, :, None, None], _dense_shapes),
    "conv": Layout(
        lambda array: array.transpose(2, 3, 1, 0),
        lambda array: array.transpose(3, 2, 0, 1),
        lambda shape: ((shape[3], shape[2], shape[0], shape[1]),),
    ),
}


def split(layout: str) -> tuple[str, int | None]:
    """Split "dense[1]" into "dense" and 1; a layout without a place in a stack has None.

    Raises:
        ValueError: the layout is unknown.
    """
    name, bracket, place = layout.partition("[")
    if name not in LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}. Known layouts: {', '.join(LAYOUTS)}.")
    return name, int(place.rstrip("]")) if bracket else None


def to_keras(layout: str, array: np.ndarray) -> np.ndarray:
    """Return the Keras variable that a file's tensor holds, as a view where possible."""
    name, place = split(layout)
    if place is not None:
        rows = len(array) // STACK
        array = array[place * rows : (place + 1) * rows]
    return LAYOUTS[name].to_keras(array)


def to_torch(layout: str, array: np.ndarray) -> np.ndarray:
    """Return what the file stores for a Keras variable; of a stacked tensor, its own third."""
    return LAYOUTS[split(layout)[0]].to_torch(array)


def stored_shapes(layout: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes a file may give a Keras variable of this shape, the usual one first."""
    name, place = split(layout)
    usual = to_torch(layout, np.broadcast_to(np.float32(0), shape)).shape
    shapes = (usual, *(other for other in LAYOUTS[name].stored_shapes(shape) if other != usual))
    if place is None:
        return shapes
    return tuple((STACK * rows, *rest) for rows, *rest in shapes)
