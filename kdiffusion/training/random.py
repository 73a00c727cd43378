"""Random numbers that are functions of (seed, step, sample, purpose), so there is no state to keep.

Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
has the seed and the step as its key, and counts elements, purposes and samples. It is made of
whole numbers, and normals come from a table whose interpolation is exact, so the values have the
same bits on TensorFlow and JAX, compiled or not, however a batch is cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from keras import ops

# Purposes of random numbers; numbers of different purposes are independent.
(
    NOISE,
    TIMESTEP,
    POSTERIOR,
    CAPTION_DROPOUT,
    OFFSET,
    PERTURBATION,
) = range(6)

# A step has at most so many samples; the counter's other 6 bits are the purpose.
MAX_SAMPLES = 1 << 26

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

# 2**32 / golden ratio: multiples of it fill the circle evenly (Weyl 1916).
_GOLDEN = 0x9E3779B9

# Each level of the normal table has 2**12 cells and refines the lowest 16th of the level before it.
# 12 more bits are the position in a cell: their product with a slope of 12 bits is exact.
_CELL_BITS = 12
_LEVEL_BITS = 4
_LEVELS = 4


def uniform(seed: Any, step: Any, index: Any, shape: Sequence[int], purpose: int) -> Any:
    """Draw numbers that are uniform on [0, 1).

    Args:
        seed: int or uint32 scalar, of the whole run.
        step: int32 scalar, the optimizer step.
        index: (batch,) int32, the index of each sample in the step's global batch, from 0 to
            `MAX_SAMPLES - 1`.
        shape: shape of one sample's numbers.
        purpose: one of this module's constants.

    Returns:
        (batch, *shape) float32, multiples of 2**-24.

    Example:

    >>> uniform(seed=0, step=7, index=np.arange(2), shape=(3,), purpose=CAPTION_DROPOUT).shape
    (2, 3)
    """
    return _to_unit(_words(seed, step, index, shape, purpose))


def normal(seed: Any, step: Any, index: Any, shape: Sequence[int], purpose: int) -> Any:
    """Draw unit normals, by the inverse of their distribution function.

    The function is a table, linear between its knots. It is within 1e-5 of the true one up to 4.6,
    and within 0.25 in the tails beyond, where one number in 250,000 falls.

    Args:
        seed, step, index, shape, purpose: see `uniform`.

    Returns:
        (batch, *shape) float32, between -6.4 and 6.4.
    """
    words = _words(seed, step, index, shape, purpose)
    # One bit is the sign, the other 31 the probability of the tail.
    tail = words & np.uint32(0x7FFFFFFF)
    level = sum(
        ops.cast(tail < np.uint32(1 << (31 - _LEVEL_BITS * (i + 1))), "uint32")
        for i in range(_LEVELS - 1)
    )
    scaled = ops.left_shift(tail, level * np.uint32(_LEVEL_BITS))
    cell = level * np.uint32(1 << _CELL_BITS) + _right(scaled, 31 - _CELL_BITS)
    position = _right(scaled, 31 - 2 * _CELL_BITS) & np.uint32((1 << _CELL_BITS) - 1)
    knots, slopes = (ops.take(part, ops.cast(cell, "int32")) for part in _normal_table())
    magnitude = knots + slopes * ops.cast(position, "float32")
    return ops.where(words > np.uint32(0x7FFFFFFF), -magnitude, magnitude)


def stratified(seed: Any, step: Any, index: Any, purpose: int = TIMESTEP) -> Any:
    """Draw one number for each sample of a batch, spread evenly over [0, 1).

    All samples of a step share one uniform offset, to which sample i adds i times the golden
    ratio, modulo 1. Each number alone is uniform, and the numbers of any batch size leave no
    large gap (the Kronecker sequence; Kingma et al. 2021, appendix I.1, likewise share an offset).

    Args:
        seed, step, index, purpose: see `uniform`.

    Returns:
        (batch,) float32, multiples of 2**-24.
    """
    offset = _words(seed, step, np.zeros(1, np.int32), (), purpose)
    return _to_unit(offset + ops.cast(index, "uint32") * np.uint32(_GOLDEN))


def threefry(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Encrypt counters: Threefry-2x32-20 of Salmon et al. 2011, section 3.

    Args:
        key: two uint32 tensors.
        counter: two uint32 tensors.

    Returns:
        Two uint32 tensors of the arguments' common shape.
    """
    keys = (*key, key[0] ^ key[1] ^ np.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (ops.left_shift(y, np.uint32(rotation)) | _right(y, 32 - rotation))
        x = x + keys[(group + 1) % 3]
        y = y + (keys[(group + 2) % 3] + np.uint32(group + 1))
    return x, y


def _words(seed, step, index, shape, purpose):
    """Draw random bits, (batch, *shape) uint32."""
    size = math.prod(shape)
    pairs = ops.cast(ops.arange((size + 1) // 2), "uint32")[None, :]
    sample = ops.cast(index, "uint32")[:, None] + np.uint32(purpose * MAX_SAMPLES)
    both = threefry((_key(seed), _key(step)), (pairs, sample))
    words = ops.concatenate(both, axis=1)[:, :size]
    return ops.reshape(words, (-1, *shape))


def _to_unit(words):
    # float32 holds the upper 24 bits exactly.
    return ops.cast(_right(words, 8), "float32") * np.float32(2.0**-24)


def _right(words, bits):
    return ops.right_shift(words, np.uint32(bits))


def _key(number):
    """Return a seed or a step as a tensor."""
    if isinstance(number, (int, np.integer)):
        number = np.uint32(int(number) % 2**32)
    return ops.cast(number, "uint32")


@functools.lru_cache(maxsize=1)
def _normal_table():
    """Return the normal at each knot and the slope to the next, (levels * 2**12,) float32 each."""
    inverse = NormalDist().inv_cdf
    cells = 1 << _CELL_BITS
    knots, ends = [], []
    for level in range(_LEVELS):
        size = 2.0 ** -(1 + _CELL_BITS + _LEVEL_BITS * level)
        values = [-inverse(max(size * i, 2.0**-33)) for i in range(cells + 1)]
        knots += values[:-1]
        ends += values[1:]
    mantissa, exponent = np.frexp((np.array(ends) - np.array(knots)) / cells)
    slopes = np.ldexp(np.rint(mantissa * cells) / cells, exponent)
    return np.array(knots, np.float32), slopes.astype(np.float32)
