"""3x3 convolution with a quarter of the multiplications: F(4x4, 3x3) of Lavin & Gray 2016.

A tile of 4x4 outputs is made of 6x6 inputs. Both they and the kernel are polynomials of which the
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
import itertools
import math
import operator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from kdiffusion import backend, compilation, processor
from kdiffusion.models import kernels

# Positions, in all images of a batch, from which on transforming the kernel is repaid; for doubled
# maps, whose kernel becomes three times as large.
_MIN_POSITIONS, _MIN_POSITIONS_DOUBLED = 512, 2048
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


class _Kernel(NamedTuple):
    """What makes the outputs along one axis, or those of one parity on a doubled map.

    Args:
        points: slice of all of them, those at which the kernel is not zero.
        weights: (points, 3), Lavin & Gray's G.
        outputs: (size, points), their Aᵀ.
    """

    points: slice
    weights: np.ndarray
    outputs: np.ndarray


class _Axis(NamedTuple):
    """The F(size, 3) of one axis.

    Args:
        size: int, outputs of a tile.
        inputs: (points, size + 2), Lavin & Gray's Bᵀ.
        plain: `_Kernel`s, one.
        doubled: `_Kernel`s of even and odd outputs.
    """

    size: int
    inputs: np.ndarray
    plain: tuple[_Kernel, ...]
    doubled: tuple[_Kernel, ...]


def _axis(points):
    """The `_Axis` of 0, of pairs of such points (Cook & Toom) and of infinity, which is the last.

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
    # An even output sees the input before its own and, by two weights, its own; an odd one its own
    # and the next. A kernel that ends with zero is zero at infinity, one that begins with it at 0.
    even = (weights @ [[1, 0, 0], [0, 1, 1], [0, 0, 0]])[:-1]
    odd = (weights @ [[0, 0, 0], [1, 1, 0], [0, 0, 1]])[1:]
    return _Axis(
        size,
        inputs,
        (_Kernel(slice(0, count), weights, outputs),),
        (
            _Kernel(slice(0, count - 1), even, outputs[:, :-1]),
            _Kernel(slice(1, count), odd, outputs[:, 1:]),
        ),
    )


# By their numbers of outputs.
_AXES = {2: _axis((0.0, 1.0, -1.0)), 4: _axis((0.0, 0.625, -0.625, 1.5, -1.5))}


def pays(x, kernel, doubled=False):
    """Whether this is faster than the plain convolution, as far as the shapes are known.

    XLA multiplies batches of matrices too slowly on a CPU for any gain under JAX.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
        doubled: bool, whether it is `convolve_doubled` that is asked about.
    """
    if backend.name() != "tensorflow" or backend.on_accelerator() or None in x.shape:
        return False
    positions = math.prod(x.shape[:3])
    channels, filters = kernel.shape[2:]
    dtype = keras.backend.standardize_dtype(x.dtype)
    return (
        (dtype == "float32" or backend.prefers_float32(dtype))
        and positions >= (_MIN_POSITIONS_DOUBLED if doubled else _MIN_POSITIONS)
        and min(channels, filters) >= _MIN_CHANNELS
        and 2 * 9 * positions * channels * filters >= _WORTH_COMPILING
    )


def convolve(x, kernel, bias, finish=None, *values):
    """3x3 convolution of stride 1 that keeps the size.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
        bias: (filters,).
        finish: elementwise function `(x, *values) -> x`, at the top level of a module, that is
            applied before, strip by strip, or `None`.
        values: tensors, its other arguments.

    Returns:
        (batch, height, width, filters).
    """

    def plain(x, kernel, bias, *values):
        finished = finish(x, *values) if finish else x
        return ops.conv(finished, kernel, padding="same", data_format="channels_last") + bias

    def fast(x, kernel, bias, *values):
        return _convolve(x, kernel, bias, False, finish, *values)

    # By gradients of its own it would have to keep three feature maps for each.
    return backend.with_gradient_of(plain, fast)(x, kernel, bias, *values)


def convolve_doubled(x, kernel, bias):
    """What `kernels.convolve_doubled` computes, 25 products taking the place of its 64.

    The 6x6 inputs of a tile are transformed once for the four parities of its 8x8 outputs.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
        bias: (filters,).

    Returns:
        (batch, 2 * height, 2 * width, filters).
    """
    computed = backend.with_gradient_of(
        kernels.convolve_doubled, lambda x, kernel, bias: _convolve(x, kernel, bias, True)
    )
    return computed(x, kernel, bias)


def _convolve(x, kernel, bias, doubled, finish=None, *values):
    batch, height, width, channels = x.shape
    filters, scale = kernel.shape[-1], 2 if doubled else 1
    size = _size_of_rows(channels)
    high, wide = size * -(-height // size), 4 * -(-width // 4)
    sides = (1, 1 + wide - width)
    kernel = ops.cast(compilation.after(kernel, x), "float32")
    bias = ops.cast(bias, x.dtype)

    pairs = _pairs(size, doubled)
    points = sum(len(rows.weights) * len(columns.weights) for rows, columns in pairs)
    tiles = batch * high * wide // (size * 4)
    strips = _num_strips(4 * tiles * ((size + 2) * 6 * channels + points * filters), high // size)
    in_turn = strips == 1 or 4 * points * channels * filters > _MAX_KERNEL
    multiplications = [_multiplication(kernel, rows, columns, in_turn) for rows, columns in pairs]
    surround = compilation.fuse(_surround)
    if strips == 1:
        rows = (1, 1 + high - height)
        strip = surround(x, None, rows, sides, finish, *values)
        result = _convolve_strip(strip, multiplications, bias, size)
    else:
        rows = high // strips

        def convolve_strip(i):
            places = rows * i + ops.arange(-1, rows + 1)
            inside = ops.cast(places == ops.clip(places, 0, height - 1), "float32")
            strip = ops.take(x, ops.clip(places, 0, height - 1), axis=1)
            strip = surround(strip, inside, (0, 0), sides, finish, *values)
            return _convolve_strip(strip, multiplications, bias, size)

        shape = (batch, scale * rows, scale * wide, filters)
        result = compilation.stack_in_turn(convolve_strip, strips, shape, x.dtype, first=x)
        result = ops.moveaxis(result, 0, 1)
        result = ops.reshape(result, (batch, scale * high, scale * wide, filters))
    return result[:, : scale * height, : scale * width]


def _size_of_rows(channels):
    """Rows of outputs of a tile; columns are four."""
    return 2 if channels > _MAX_CHANNELS and "avx512f" in processor.flags() else 4


def _pairs(size, doubled):
    """The `_Kernel`s of rows and columns; on a doubled map, of all four pairs of parities."""
    rows, columns = (axis.doubled if doubled else axis.plain for axis in (_AXES[size], _AXES[4]))
    return list(itertools.product(rows, columns))


def _surround(x, inside, rows, columns, finish, *values):
    """Rows of a feature map, finished, with zeros around and where they are not inside of it."""
    if finish is not None:
        x = finish(x, *values)
    x = ops.cast(x, "float32")
    if inside is not None:
        x = x * inside[:, None, None]
    return ops.pad(x, ((0, 0), rows, columns, (0, 0)))


def _num_strips(size, tiles_high):
    """How many equal parts the rows of tiles are split into."""
    if size <= _MAX_TILES:
        return 1
    strips = min(-(-size // _STRIP), tiles_high)
    return next(n for n in range(strips, tiles_high + 1) if tiles_high % n == 0)


def _convolve_strip(padded, multiplications, bias, size):
    """`padded` has a row and a column more on every side than tiles of outputs."""
    batch, height, width, _ = padded.shape
    values = compilation.fuse(_transform_input)(padded, size)
    products: list[Any] = []
    for multiply in multiplications:
        products.append(multiply(compilation.after(values, products[-1]) if products else values))
    shape = (batch, (height - 2) // size, (width - 2) // 4, -1)
    products = [ops.reshape(x, (*x.shape[:2], *shape)) for x in products]
    transform = _transform_products if len(products) == 1 else _transform_products_of_parities
    return compilation.fuse(transform)(*products, bias)


def _multiplication(kernel, rows, columns, in_turn):
    """The function that multiplies the values of tiles by those of a kernel, G g Gᵀ.

    Args:
        kernel: (3, 3, channels, filters).
        rows, columns: `_Kernel`.
        in_turn: bool, whether it transforms the kernel itself, for one row of points after the
            other, which is less memory to go through, but repeated in each call.

    Returns:
        Function of (points, points, tiles, channels), of all points, to (points, points, tiles,
        filters), of those of `rows` and `columns`.
    """
    _, _, channels, filters = kernel.shape
    first, second = (axis.weights.astype(np.float32) for axis in (rows, columns))

    # One axis after the other: as one product of both it takes five times as long.
    if not in_turn:
        factors = ops.reshape(ops.matmul(first, ops.reshape(kernel, (3, -1))), (len(first), 3, -1))
        factors = ops.matmul(second, factors)
        factors = ops.reshape(factors, (*factors.shape[:2], channels, filters))
        return lambda values: ops.matmul(values[rows.points, columns.points], factors)

    def multiply(values):
        products: list[Any] = []
        combined: list[Any] = []
        for i, points in enumerate(ops.unstack(values)[rows.points]):
            before = products[-1] if products else values
            if not combined:
                combined = _combined(first[i:], compilation.after(kernel, before))
            row = ops.reshape(compilation.after(combined.pop(0), before), (3, -1))
            factors = ops.reshape(ops.matmul(second, row), (len(second), channels, filters))
            products.append(ops.matmul(points[columns.points], factors))
        return ops.stack(products)

    return multiply


def _combined(weights, kernel):
    """A kernel's rows as the first of weights combines them, or the first two, in one reading."""
    if np.count_nonzero(weights[0]) == 1:
        return [kernel[np.argmax(weights[0])]]
    return list(ops.unstack(ops.matmul(weights[:2], ops.reshape(kernel, (3, -1)))))


def _transform_input(padded, size):
    """Bᵀ d B of each tile: (batch, height, width, channels) → (points, 6, tiles, channels)."""
    rows = ops.stack(_sums(_AXES[size].inputs, _steps(padded, size, axis=1)))
    values = ops.stack(_sums(_AXES[4].inputs, _steps(rows, 4, axis=3)), axis=1)
    return ops.reshape(values, (size + 2, 6, -1, padded.shape[-1]))


def _steps(x, size, axis):
    """The first to the last place of all tiles along an axis."""
    length = x.shape[axis] - size - 1
    before = (slice(None),) * axis
    return [x[(*before, slice(i, i + length, size))] for i in range(size + 2)]


def _transform_products(products, bias):
    """Aᵀ m A: (points, 6, batch, rows, columns, filters) → (batch, height, width, filters)."""
    (pair,) = _pairs(products.shape[0] - 2, doubled=False)
    return _biased(_by_position(_transform(products, *pair)[None, None]), bias)


def _transform_products_of_parities(*products_and_bias):
    """The same of each pair of parities: → (batch, 2 * height, 2 * width, filters)."""
    *products, bias = products_and_bias
    pairs = _pairs(products[0].shape[0] - 1, doubled=True)
    outputs = [_transform(part, *pair) for part, pair in zip(products, pairs)]
    outputs = ops.stack([ops.stack(outputs[:2]), ops.stack(outputs[2:])])
    return _biased(_by_position(outputs), bias)


def _biased(x, bias):
    """The sum, in the bias's dtype."""
    return ops.cast(x + ops.cast(bias, "float32"), bias.dtype)


def _transform(products, rows, columns):
    """→ (rows of a tile, batch, rows, columns, columns of a tile, filters)."""
    # As a matrix product it takes XLA half as long to compile as sums of both axes.
    flat = ops.reshape(products, (products.shape[0], -1))
    lines = ops.matmul(rows.outputs.astype(np.float32), flat)
    lines = ops.reshape(lines, (-1, *products.shape[1:]))
    places = [lines[:, i] for i in range(lines.shape[1])]
    return ops.stack(_sums(columns.outputs, places), axis=4)


def _by_position(outputs):
    """(n, n, size, batch, rows, columns, 4, filters) → (batch, n * height, n * width, filters)."""
    scale, _, size, batch, rows, columns, _, filters = outputs.shape
    ordered = ops.transpose(outputs, (3, 4, 2, 0, 5, 6, 1, 7))
    return ops.reshape(ordered, (batch, rows * size * scale, columns * 4 * scale, filters))


def _sums(matrix, terms):
    """Rows of a matrix times tensors, without the zeros."""
    # Half the operations of a graph would be constants, if each product had its own.
    weights = {weight: ops.convert_to_tensor(weight, "float32") for weight in np.unique(matrix)}

    def product(weight, term):
        return term if weight == 1 else weights[weight] * term

    return [
        functools.reduce(operator.add, (product(*pair) for pair in zip(row, terms) if pair[0]))
        for row in matrix
    ]
