"""3x3 convolution with a quarter of the multiplications: F(4x4, 3x3) of Lavin & Gray 2016.

A tile of 4x4 outputs is made of 6x6 inputs. Both they and the kernel are polynomials of which the
values at six points of each axis are multiplied: 36 products of each pair of channels take the
place of 144. With the points 0, 5/8, -5/8, 3/2, -3/2 and infinity float32 results are off by 1.2e-6
to 1.7e-6 (relative L2), where plain convolutions are off by 0.9e-6 to 1.9e-6 (TensorFlow with
AVX512, PyTorch with AVX2) or, PyTorch with AVX512, by 0.3e-6; with the usual 1, -1, 2, -2 it would
be twice as much (Barabasz et al. 2020, arXiv:1803.10986, choose points for that).

Half precision would round the transformed inputs, so they are float32 in any case; bfloat16 goes
this way only where a processor has no arithmetic of it.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import NamedTuple

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

# Bytes that are there at a time: of a transformed kernel, above which points go through row by row,
# and of transformed inputs and products, above which rows of tiles go through in strips.
_MAX_KERNEL, _MAX_TILES = 2**27, 2**25

# Channels that are summed up at a time with AVX512. oneDNN's kernels sum any number one after the
# other there: 1280 would be off by 2.6e-6.
_MAX_SUM = 320

_SIZE, _TILE = 4, 6
_POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)


def _matrices():
    """Lavin & Gray's G, Aᵀ and Bᵀ of these points (Cook & Toom; infinity is the last row)."""
    others = [[p for p in _POINTS if p != point] for point in _POINTS]
    infinity = np.eye(_TILE)[-1]
    kernel = [np.array([1, p, p * p]) / np.prod(p - np.array(o)) for p, o in zip(_POINTS, others)]
    inputs = [[*np.poly(other)[::-1], 0.0] for other in others] + [np.poly(_POINTS)[::-1]]
    outputs = np.vander(_POINTS, _SIZE, increasing=True)
    return (
        np.array([*kernel, [0, 0, 1]]),
        np.column_stack([outputs.T, infinity[-_SIZE:]]),
        np.array(inputs),
    )


_KERNEL, _OUTPUTS, _INPUTS = _matrices()


class _Axis(NamedTuple):
    """What makes the outputs along one axis, or those of one parity on a doubled map.

    Args:
        points: slice of the six, those at which the kernel is not zero.
        kernel: (points, 3), for the weights.
        outputs: (4, points), for the products.
    """

    points: slice
    kernel: np.ndarray
    outputs: np.ndarray


_PLAIN = (_Axis(slice(0, 6), _KERNEL, _OUTPUTS),)
# An even output sees the input before its own and, by two weights, its own; an odd one its own and
# the next. A kernel that ends with a zero is zero at infinity, one that begins with it at 0.
_DOUBLED = (
    _Axis(slice(0, 5), (_KERNEL @ [[1, 0, 0], [0, 1, 1], [0, 0, 0]])[:5], _OUTPUTS[:, :5]),
    _Axis(slice(1, 6), (_KERNEL @ [[0, 0, 0], [1, 1, 0], [0, 0, 1]])[1:], _OUTPUTS[:, 1:]),
)


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
        return _convolve(x, kernel, bias, _PLAIN, finish, *values)

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
        kernels.convolve_doubled, lambda x, kernel, bias: _convolve(x, kernel, bias, _DOUBLED)
    )
    return computed(x, kernel, bias)


def _convolve(x, kernel, bias, parities, finish=None, *values):
    batch, height, width, channels = x.shape
    filters, scale = kernel.shape[-1], len(parities)
    high, wide = (_SIZE * -(-side // _SIZE) for side in (height, width))
    sides = (1, 1 + wide - width)
    kernel = ops.cast(compilation.after(kernel, x), "float32")
    bias = ops.cast(bias, x.dtype)
    pairs = [(rows, columns) for rows in parities for columns in parities]
    multiplications = [_multiplication(kernel, *pair) for pair in pairs]

    products = sum(len(rows.kernel) * len(columns.kernel) for rows, columns in pairs)
    tiles = batch * high * wide // _SIZE**2
    strips = _num_strips(4 * tiles * (_TILE**2 * channels + products * filters), high // _SIZE)
    surround = compilation.fuse(_surround)
    if strips == 1:
        rows = (1, 1 + high - height)
        strip = surround(x, None, rows, sides, finish, *values)
        result = _convolve_strip(strip, multiplications, bias)
    else:
        rows = high // strips

        def convolve_strip(i):
            places = rows * i + ops.arange(-1, rows + 1)
            inside = ops.cast(places == ops.clip(places, 0, height - 1), "float32")
            strip = ops.take(x, ops.clip(places, 0, height - 1), axis=1)
            strip = surround(strip, inside, (0, 0), sides, finish, *values)
            return _convolve_strip(strip, multiplications, bias)

        shape = (batch, scale * rows, scale * wide, filters)
        result = compilation.stack_in_turn(convolve_strip, strips, shape, x.dtype, first=x)
        result = ops.moveaxis(result, 0, 1)
        result = ops.reshape(result, (batch, scale * high, scale * wide, filters))
    return result[:, : scale * height, : scale * width]


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
    strips = min(-(-size // _MAX_TILES), tiles_high)
    return next(n for n in range(strips, tiles_high + 1) if tiles_high % n == 0)


def _convolve_strip(padded, multiplications, bias):
    """`padded` has a row and a column more on every side than tiles of outputs."""
    batch, height, width, channels = padded.shape
    values = compilation.fuse(_transform_input)(padded, _num_sums(channels))
    products = [multiply(values) for multiply in multiplications]
    products = [
        ops.reshape(x, (*x.shape[:3], batch, height // _SIZE, width // _SIZE, -1)) for x in products
    ]
    transform = _transform_products if len(products) == 1 else _transform_products_of_parities
    return compilation.fuse(transform)(*products, bias)


def _multiplication(kernel, rows, columns):
    """The function that multiplies the values of tiles by those of a kernel, G g Gᵀ.

    Args:
        kernel: (3, 3, channels, filters).
        rows, columns: `_Axis`.

    Returns:
        Function of (6, 6, sums, tiles, channels) to (points, points, sums, tiles, filters).
    """
    _, _, channels, filters = kernel.shape
    shape = (len(rows.kernel), len(columns.kernel))
    sums = _num_sums(channels)
    first, second = (axis.kernel.astype(np.float32) for axis in (rows, columns))

    def transformed(first):
        # One axis after the other: as one product of both it takes five times as long.
        values = ops.matmul(first, ops.reshape(kernel, (3, -1)))
        values = ops.matmul(second, ops.reshape(values, (-1, 3, channels * filters)))
        return ops.reshape(values, (-1, shape[1], sums, channels // sums, filters))

    if 4 * math.prod(shape) * channels * filters <= _MAX_KERNEL:
        factors = transformed(first)
        return lambda values: ops.matmul(values[rows.points, columns.points], factors)

    def multiply(values):
        values = values[rows.points, columns.points]
        return compilation.map_in_turn(
            lambda i: ops.matmul(
                ops.take(values, i, axis=0), transformed(ops.take(first, i, axis=0)[None])[0]
            ),
            ops.arange(shape[0]),
            (shape[1], sums, values.shape[3], filters),
            "float32",
        )

    return multiply


def _num_sums(channels):
    """How many equal parts channels are summed up in; 1 where that would be far too many."""
    if "avx512f" not in processor.flags():
        return 1
    least = -(-channels // _MAX_SUM)
    return next((n for n in range(least, 4 * least) if channels % n == 0), 1)


def _transform_input(padded, sums):
    """Bᵀ d B of each tile: (batch, height, width, channels) → (6, 6, sums, tiles, channels)."""
    rows = ops.stack(_sums(_INPUTS, _every_fourth(padded, axis=1)))
    values = ops.stack(_sums(_INPUTS, _every_fourth(rows, axis=3)), axis=1)
    values = ops.reshape(values, (_TILE, _TILE, -1, sums, padded.shape[-1] // sums))
    return ops.moveaxis(values, 3, 2)


def _every_fourth(x, axis):
    """The first to the sixth place of all tiles along an axis."""
    length = x.shape[axis] - _TILE + 1
    before = (slice(None),) * axis
    return [x[(*before, slice(i, i + length, _SIZE))] for i in range(_TILE)]


def _transform_products(products, bias):
    """Aᵀ m A: (6, 6, sums, batch, rows, columns, filters) → (batch, height, width, filters)."""
    return _biased(_by_position(_transform(products, _PLAIN[0], _PLAIN[0])[None, None]), bias)


def _transform_products_of_parities(*products_and_bias):
    """The same of each pair of parities: → (batch, 8 * rows, 8 * columns, filters)."""
    *products, bias = products_and_bias
    pairs = [(rows, columns) for rows in _DOUBLED for columns in _DOUBLED]
    outputs = [_transform(part, *pair) for part, pair in zip(products, pairs)]
    outputs = ops.stack([ops.stack(outputs[:2]), ops.stack(outputs[2:])])
    return _biased(_by_position(outputs), bias)


def _biased(x, bias):
    """The sum, in the bias's dtype."""
    return ops.cast(x + ops.cast(bias, "float32"), bias.dtype)


def _transform(products, rows, columns):
    """→ (4, batch, rows, columns, 4, filters)."""
    # As a matrix product it takes XLA half as long to compile as sums of both axes.
    shape = (_SIZE, *products.shape[1:])
    flat = ops.reshape(products, (products.shape[0], -1))
    lines = ops.reshape(ops.matmul(rows.outputs.astype(np.float32), flat), shape)
    lines = functools.reduce(operator.add, (lines[:, :, i] for i in range(shape[2])))
    places = [lines[:, i] for i in range(lines.shape[1])]
    return ops.stack(_sums(columns.outputs, places), axis=4)


def _by_position(outputs):
    """(n, n, 4, batch, rows, columns, 4, filters) → (batch, 4n * rows, 4n * columns, filters)."""
    scale, _, size, batch, rows, columns, _, filters = outputs.shape
    ordered = ops.transpose(outputs, (3, 4, 2, 0, 5, 6, 1, 7))
    return ops.reshape(ordered, (batch, rows * size * scale, columns * size * scale, filters))


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
