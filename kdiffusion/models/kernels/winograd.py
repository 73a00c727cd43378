"""Winograd's 3x3 convolution, with a quarter of the multiplications (Lavin & Gray 2016).

F(4x4, 3x3) makes a tile of 4x4 outputs of 6x6 inputs. Inputs and kernel are polynomials whose
values at six points of each axis are multiplied: 36 products of each pair of channels take the
place of 144. With the points 0, 5/8, -5/8, 3/2, -3/2 and infinity float32 results are off by 1.2e-6
to 2e-6 (relative L2), where plain convolutions are off by 0.9e-6 to 1.9e-6 (TensorFlow with AVX512,
PyTorch with AVX2) or, PyTorch with AVX512, by 0.3e-6; with the usual 1, -1, 2, -2 it would be twice
as much (Barabasz et al. 2020, arXiv:1803.10986, choose points for that).

Tiles of 2x4 outputs, 24 products in the place of 72, are more exact, 1.2e-6 to 1.6e-6. Their
kernels are two thirds as large, which counts where there are few tiles.

Half precision would round the transformed inputs, so they are float32 in any case; bfloat16 goes
this way only where a processor has no arithmetic of it.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from kdiffusion.models.kernels.parts import num_parts
from kdiffusion.runtime import backend, processor, tracing

# Positions, in all images of a batch, from which on transforming the kernel is repaid.
_MIN_POSITIONS = 512
# Channels of input and output, and floating-point operations of the plain convolution, some 10 to
# 30 milliseconds, from which on transforming is repaid, and its compilation soon.
_MIN_CHANNELS = 128
_WORTH_COMPILING = 2**31

# Bytes: of transformed inputs and products up to which all rows of tiles go through at once, and of
# those of a strip of rows otherwise; of a transformed kernel that all strips may share.
_MAX_TILES, _STRIP, _MAX_KERNEL = 2**27, 2**25, 2**27

# Channels above which tiles are of 2x4 outputs with AVX512: oneDNN's kernels sum any number one
# after the other there, and 4x4 outputs of 1280 channels would be off by 2.6e-6.
_MAX_CHANNELS = 640


class _Axis(NamedTuple):
    """F(size, 3) of one axis: Lavin & Gray's Bᵀ, G and Aᵀ.

    Args:
        size: int, outputs of a tile.
        inputs: (points, size + 2).
        weights: (points, 3).
        outputs: (size, points).
    """

    size: int
    inputs: np.ndarray
    weights: np.ndarray
    outputs: np.ndarray


def _axis(points):
    """Return the `_Axis` of 0, of pairs of points and of infinity, the last (Cook & Toom).

    The divisor of the products at 0 is left to the inputs, so the kernel's value there is a weight.
    """
    count, size = len(points) + 1, len(points) - 1
    others = [[p for p in points if p != point] for point in points]
    inputs = np.array([[*np.poly(other)[::-1], 0.0] for other in others] + [np.poly(points)[::-1]])
    weights = np.array([*np.vander(points, 3, increasing=True), [0, 0, 1]])
    scales = np.array([*(np.prod(p - np.array(o)) for p, o in zip(points, others)), 1.0])
    inputs[0] /= scales[0]
    weights[1:] /= scales[1:, None]
    outputs = np.column_stack([np.vander(points, size, increasing=True).T, np.eye(count)[-1, 2:]])
    return _Axis(size, inputs, weights, outputs)


# By the number of outputs.
_AXES = {2: _axis((0.0, 1.0, -1.0)), 4: _axis((0.0, 0.625, -0.625, 1.5, -1.5))}


def pays(x, kernel):
    """Return whether this is known to be faster than the plain convolution.

    XLA multiplies batches of matrices too slowly on a CPU for any gain under JAX.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
    """
    if backend.name() != "tensorflow" or backend.on_accelerator() or None in x.shape:
        return False
    positions = math.prod(x.shape[:3])
    channels, filters = kernel.shape[2:]
    dtype = keras.backend.standardize_dtype(x.dtype)
    return (
        (dtype == "float32" or backend.prefers_float32(dtype))
        and positions >= _MIN_POSITIONS
        and min(channels, filters) >= _MIN_CHANNELS
        and 2 * 9 * positions * channels * filters >= _WORTH_COMPILING
    )


def convolve(x, kernel, bias=None, prologue=None):
    """Convolve 3x3, with a stride of 1 and keeping the size.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
        bias: (filters,), or `None`.
        prologue: `Elementwise` that x goes through first, strip by strip, or `None`.

    Returns:
        (batch, height, width, filters).
    """
    function, values = prologue or (None, ())
    bias = ops.zeros(kernel.shape[-1], x.dtype) if bias is None else bias

    def plain(x, kernel, bias, *values):
        x = x if function is None else function(x, *values)
        return ops.conv(x, kernel, padding="same", data_format="channels_last") + bias

    def fast(x, kernel, bias, *values):
        return _convolve(x, kernel, bias, function, *values)

    # By gradients of its own it would have to keep three feature maps for each.
    return backend.with_gradient_of(plain, fast)(x, kernel, bias, *values)


def _convolve(x, kernel, bias, function, *values):
    batch, height, width, channels = x.shape
    filters = kernel.shape[-1]
    axes = _AXES[_size_of_rows(channels)], _AXES[4]
    size, points = axes[0].size, 6 * (axes[0].size + 2)
    high, wide = size * -(-height // size), 4 * -(-width // 4)
    sides = (1, 1 + wide - width)
    kernel = ops.cast(tracing.after_computing(kernel, x), "float32")
    bias = ops.cast(bias, x.dtype)

    tiles = batch * high * wide // (size * 4)
    strips = _num_strips(4 * tiles * points * (channels + filters), high // size)
    in_turn = strips == 1 or 4 * points * channels * filters > _MAX_KERNEL
    multiply = _multiplication(kernel, *axes, in_turn)
    surround = tracing.fuse(_surround)
    if strips == 1:
        rows = (1, 1 + high - height)
        strip = surround(x, None, rows, sides, function, *values)
        result = _convolve_strip(strip, multiply, bias, size)
    else:
        rows = high // strips

        def convolve_strip(i):
            places = rows * i + ops.arange(-1, rows + 1)
            inside = ops.cast(places == ops.clip(places, 0, height - 1), "float32")
            strip = ops.take(x, ops.clip(places, 0, height - 1), axis=1)
            strip = surround(strip, inside, (0, 0), sides, function, *values)
            return _convolve_strip(strip, multiply, bias, size)

        shape = (batch, rows, wide, filters)
        result = tracing.stack_in_turn(convolve_strip, strips, shape, x.dtype, first=x)
        result = ops.reshape(ops.moveaxis(result, 0, 1), (batch, high, wide, filters))
    return result[:, :height, :width]


def _size_of_rows(channels):
    """Return the rows of outputs of a tile; columns are four."""
    return 2 if channels > _MAX_CHANNELS and "avx512f" in processor.flags() else 4


def _surround(x, inside, rows, columns, function, *values):
    """Apply a function to rows, and set to zero whatever is around the map."""
    if function is not None:
        x = function(x, *values)
    x = ops.cast(x, "float32")
    if inside is not None:
        x = x * inside[:, None, None]
    return ops.pad(x, ((0, 0), rows, columns, (0, 0)))


def _num_strips(size, tiles_high):
    """Return the number of equal parts that the rows of tiles are split into."""
    return 1 if size <= _MAX_TILES else num_parts(tiles_high, size, _STRIP)


def _convolve_strip(padded, multiply, bias, size):
    """Convolve a strip of rows, with a row and a column of others on every side."""
    batch, height, width, _ = padded.shape
    products = multiply(tracing.fuse(_transform_input)(padded, size))
    shape = (*products.shape[:2], batch, (height - 2) // size, (width - 2) // 4, -1)
    return tracing.fuse(_transform_products)(ops.reshape(products, shape), bias)


def _multiplication(kernel, rows, columns, in_turn):
    """Return the function that multiplies the values of tiles by those of a kernel, G g Gᵀ.

    Args:
        kernel: (3, 3, channels, filters).
        rows, columns: `_Axis`.
        in_turn: bool, whether it transforms the kernel itself, for one row of points after the
            other, which is less memory to go through, but repeated in each call.

    Returns:
        Function of (points, points, tiles, channels) to (points, points, tiles, filters).
    """
    _, _, channels, filters = kernel.shape
    first, second = (axis.weights.astype(np.float32) for axis in (rows, columns))

    # One axis after the other: as one product of both it takes five times as long.
    if not in_turn:
        factors = ops.reshape(ops.matmul(first, ops.reshape(kernel, (3, -1))), (len(first), 3, -1))
        factors = ops.matmul(second, factors)
        factors = ops.reshape(factors, (*factors.shape[:2], channels, filters))
        return lambda values: ops.matmul(values, factors)

    def multiply(values):
        products: list[Any] = []
        combined: list[Any] = []
        for i, points in enumerate(ops.unstack(values)):
            before = products[-1] if products else values
            if not combined:
                combined = _combined(first[i:], tracing.after_computing(kernel, before))
            row = ops.reshape(tracing.after_computing(combined.pop(0), before), (3, -1))
            factors = ops.reshape(ops.matmul(second, row), (len(second), channels, filters))
            products.append(ops.matmul(points, factors))
        return ops.stack(products)

    return multiply


def _combined(weights, kernel):
    """Combine a kernel's rows by the first of weights, or the first two, in one reading."""
    if np.count_nonzero(weights[0]) == 1:
        return [kernel[np.argmax(weights[0])]]
    return list(ops.unstack(ops.matmul(weights[:2], ops.reshape(kernel, (3, -1)))))


def _transform_input(padded, size):
    """Return Bᵀ d B of tiles: (batch, height, width, channels) → (points, 6, tiles, channels)."""
    rows = ops.stack(_sums(_AXES[size].inputs, _steps(padded, size, axis=1)))
    values = ops.stack(_sums(_AXES[4].inputs, _steps(rows, 4, axis=3)), axis=1)
    return ops.reshape(values, (size + 2, 6, -1, padded.shape[-1]))


def _steps(x, size, axis):
    """Return the first to the last place of all tiles along an axis."""
    length = x.shape[axis] - size - 1
    before = (slice(None),) * axis
    return [x[(*before, slice(i, i + length, size))] for i in range(size + 2)]


def _transform_products(products, bias):
    """Return Aᵀ m A: (points, 6, batch, rows, columns, filters) → the map of outputs."""
    points, _, batch, rows, columns, filters = products.shape
    axis = _AXES[points - 2]
    # As a matrix product it takes XLA half as long to compile as sums of both axes.
    lines = ops.matmul(axis.outputs.astype(np.float32), ops.reshape(products, (points, -1)))
    lines = ops.reshape(lines, (-1, *products.shape[1:]))
    places = [lines[:, i] for i in range(lines.shape[1])]
    outputs = ops.stack(_sums(_AXES[4].outputs, places), axis=4)
    # (rows of a tile, batch, rows, columns, columns of a tile, filters)
    outputs = ops.transpose(outputs, (1, 2, 0, 3, 4, 5))
    outputs = ops.reshape(outputs, (batch, rows * axis.size, columns * 4, filters))
    return ops.cast(outputs + ops.cast(bias, "float32"), bias.dtype)


def _sums(matrix, terms):
    """Return the rows of a matrix times tensors, leaving out zeros."""
    # Half the operations of a graph would be constants, if each product had its own.
    weights = {weight: ops.convert_to_tensor(weight, "float32") for weight in np.unique(matrix)}

    def product(weight, term):
        return term if weight == 1 else weights[weight] * term

    return [
        functools.reduce(operator.add, (product(*pair) for pair in zip(row, terms) if pair[0]))
        for row in matrix
    ]
