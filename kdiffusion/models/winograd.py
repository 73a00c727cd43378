"""3x3 convolution with 4/9 of the multiplications: F(2x2, 3x3) of Lavin & Gray 2016, section 4.1.

A tile of 2x2 outputs is made of 4x4 inputs. Both they and the kernel are brought into a form in
which 16 products of each pair of channels take the place of 36; the sums of these products are
brought back. Multiplications by 1/2 and additions are all that either way takes, so float32
results are as exact as those of the plain sum; half precision would round the transformed inputs.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kdiffusion import backend

# Floating-point operations of the plain convolution, some 40 milliseconds, and channels of input
# and output, from which on transforming is repaid, and its compilation soon.
_WORTH_COMPILING = 2**33
_MIN_CHANNELS = 256

# Bytes of transformed inputs that are computed at a time. Above, the rows of tiles go through in
# strips, as the queries of attention do.
_MAX_TILES = 2**27


def pays(x, kernel):
    """Whether this is faster than the plain convolution, as far as the shapes are known.

    XLA multiplies batches of matrices too slowly on a CPU for any gain under JAX.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
    """
    if backend.name() != "tensorflow" or backend.on_accelerator() or None in x.shape:
        return False
    batch, height, width, channels = x.shape
    operations = 2 * 9 * batch * height * width * channels * kernel.shape[-1]
    return (
        keras.backend.standardize_dtype(x.dtype) == "float32"
        and height % 2 == width % 2 == 0
        and min(channels, kernel.shape[-1]) >= _MIN_CHANNELS
        and operations >= _WORTH_COMPILING
    )


def convolve(x, kernel):
    """3x3 convolution of stride 1 that keeps the size.

    Args:
        x: (batch, height, width, channels), height and width even.
        kernel: (3, 3, channels, filters).

    Returns:
        (batch, height, width, filters).
    """
    # By gradients of its own it would have to keep four feature maps for each.
    return backend.with_gradient_of(_plain, _convolve)(x, kernel)


def _plain(x, kernel):
    return ops.conv(x, kernel, padding="same", data_format="channels_last")


def _convolve(x, kernel):
    batch, height, width, channels = x.shape
    kernel = _transform_kernel(backend.after(kernel, x))
    padded = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    strips = _num_strips(x.shape)
    if strips == 1:
        return _convolve_strip(padded, kernel)
    rows = height // strips
    shape = (batch, rows + 2, width + 2, channels)
    filters = kernel.shape[-1]
    outputs = backend.map_in_turn(
        lambda start: _convolve_strip(ops.slice(padded, (0, start, 0, 0), shape), kernel),
        ops.arange(0, height, rows),
        (batch, rows, width, filters),
        x.dtype,
    )
    return ops.reshape(ops.moveaxis(outputs, 0, 1), (batch, height, width, filters))


def _num_strips(shape):
    """How many equal parts the rows of tiles are split into."""
    batch, height, width, channels = shape
    strips = -(-4 * batch * height * width * channels * 4 // _MAX_TILES)
    tiles = height // 2
    return next(n for n in range(min(strips, tiles), tiles + 1) if tiles % n == 0)


def _convolve_strip(padded, kernel):
    """`padded` has a row and a column more on every side than the result."""
    batch, height, width, _ = padded.shape
    products = ops.matmul(backend.fuse(_transform_input)(padded), kernel)
    tiles = (4, 4, batch, height // 2 - 1, width // 2 - 1, kernel.shape[-1])
    return backend.fuse(_transform_output)(ops.reshape(products, tiles))


def _transform_kernel(kernel):
    """G g Gᵀ: (3, 3, channels, filters) → (16, channels, filters)."""
    rows = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
    _, _, channels, filters = kernel.shape
    tiles = ops.matmul(np.kron(rows, rows), ops.reshape(kernel, (9, -1)))
    return ops.reshape(tiles, (16, channels, filters))


def _transform_input(padded):
    """Bᵀ d B of each tile: (batch, height, width, channels) → (16, tiles, channels)."""
    columns = ops.stack(_differences(padded, axis=1))
    tiles = ops.stack(_differences(columns, axis=3), axis=1)
    return ops.reshape(tiles, (16, -1, padded.shape[-1]))


def _differences(x, axis):
    """Rows of Bᵀ times the tiles of four that begin at every second place of an axis."""
    length = x.shape[axis] - 3
    before = (slice(None),) * axis
    first, second, third, fourth = (x[(*before, slice(i, i + length, 2))] for i in range(4))
    return first - third, second + third, third - second, second - fourth


def _transform_output(products):
    """Aᵀ m A: (4, 4, batch, rows, columns, filters) → (batch, 2 * rows, 2 * columns, filters)."""
    _, _, batch, rows, columns, filters = products.shape
    lines = [ops.stack(_sums(line), axis=3) for line in _sums(products)]
    return ops.reshape(ops.stack(lines, axis=2), (batch, 2 * rows, 2 * columns, filters))


def _sums(x):
    """Rows of Aᵀ times the first axis."""
    return x[0] + x[1] + x[2], x[1] - x[2] - x[3]
