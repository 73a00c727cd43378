"""Convolutions of feature maps, each in the form that is fastest for its shapes."""

from __future__ import annotations

import functools
import itertools
import math
import operator

import keras
from keras import ops

from kdiffusion.models.kernels import winograd
from kdiffusion.models.kernels.parts import num_parts
from kdiffusion.runtime import backend, tracing

# Positions of a feature map, in all images of a batch, up to which a 3x3 convolution is limited by
# reading its kernel, not by arithmetic. There, one matrix product is up to three times as fast on
# a CPU as the convolutions of oneDNN and XLA, which first bring the kernel into another order.
_FEW_POSITIONS = 128

# Bytes, in float32, of the products from which a doubled feature map is summed up at a time.
_MAX_PRODUCTS = 2**26


def convolve(x, kernel, bias=None, strides=(1, 1), padding="same", prologue=None):
    """Convolve a feature map.

    Args:
        x: (batch, height, width, channels).
        kernel: (rows, columns, channels, filters).
        bias: (filters,), or `None`.
        strides: pair of int.
        padding: `"same"` or `"valid"`.
        prologue: `Elementwise` that x goes through first, such as a `normalizer`, or `None`.

    Returns:
        (batch, output height, output width, filters).
    """
    if prologue is not None:
        keeps_size = _keeps_size(kernel, strides, padding)
        if keeps_size and winograd.pays(x, kernel):
            return winograd.convolve(x, kernel, bias, prologue)
        x = prologue(x)
    x = _convolve(x, kernel, strides, padding)
    return x if bias is None else ops.add(x, ops.reshape(bias, (1, 1, 1, bias.shape[0])))


def convolve_doubled(x, kernel, bias, like=None):
    """Convolve, 3x3 and keeping the size, a feature map doubled by its nearest neighbours.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
        bias: (filters,).
        like: (batch, rows, columns, ...), whose height and width the doubled map is cropped to, or
            `None`.

    Returns:
        (batch, 2 * height, 2 * width, filters), or cropped.
    """
    if None not in x.shape and _is_double(like, x) and not backend.on_accelerator():
        return _convolve_doubled(x, *map(ops.convert_to_tensor, (kernel, bias)))
    x = ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2)
    if like is not None:
        height, width = ops.shape(like)[1:3]
        x = x[:, :height, :width, :]
    return convolve(x, kernel, bias)


def _convolve(x, kernel, strides, padding):
    """Convolve in the form that is fastest, as far as the shapes are known."""
    size = tuple(kernel.shape[:2])
    if size == strides == (1, 1):
        return ops.matmul(x, kernel[0, 0])
    if size == (3, 3) and padding == "valid" and strides[0] == strides[1]:
        sides = (None if n is None else (n - 3) // strides[0] + 1 for n in x.shape[1:3])
        if _is_small(x.shape[0], *sides):
            return _convolve_small(x, kernel, strides[0])
    if _keeps_size(kernel, strides, padding):
        if _is_small(*x.shape[:3]):
            return _convolve_small(ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), kernel)
        if _yields_few(x, kernel):
            return _convolve_to_few(x, kernel)
        if winograd.pays(x, kernel):
            return winograd.convolve(x, kernel)
    return ops.conv(x, kernel, strides, padding, data_format="channels_last")


def _keeps_size(kernel, strides, padding):
    return (tuple(kernel.shape[:2]), strides, padding) == ((3, 3), (1, 1), "same")


def _is_small(batch, height, width):
    """Return whether a 3x3 convolution is one for `_convolve_small`.

    Args:
        batch, height, width: of the results, each int, or `None` where it is not known.
    """
    known = None not in (batch, height, width)
    return known and 0 < batch * height * width <= _FEW_POSITIONS and not backend.on_accelerator()


def _convolve_small(x, kernel, stride=1):
    """Convolve 3x3 without padding, by one matrix product.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
        stride: int.

    Returns:
        (batch, (height - 3) // stride + 1, (width - 3) // stride + 1, filters).
    """
    height, width, channels = x.shape[1:]
    # In two steps, which are fewer operations to trace than nine slices.
    rows = ops.concatenate([x[:, :, j : width - 2 + j : stride] for j in range(3)], axis=-1)
    patches = ops.concatenate([rows[:, i : height - 2 + i : stride] for i in range(3)], axis=-1)
    product = ops.matmul(
        ops.reshape(patches, (-1, 9 * channels)), ops.reshape(kernel, (9 * channels, -1))
    )
    return ops.reshape(product, (-1, *patches.shape[1:3], kernel.shape[-1]))


def _yields_few(x, kernel):
    """Return whether `_convolve_to_few` pays: it has nine products for each filter.

    They would be rounded one by one in half precision.
    """
    channels, filters = kernel.shape[2:]
    return (
        None not in x.shape[1:3]
        and 9 * filters <= channels
        and keras.backend.standardize_dtype(x.dtype) == "float32"
        and not backend.on_accelerator()
    )


def _convolve_to_few(x, kernel):
    """Convolve 3x3, keeping the size, many channels to the few of an image.

    Each position is multiplied by all nine parts of the kernel, as one matrix product, and the
    products are summed where they belong. Convolutions of oneDNN copy each position nine times.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).

    Returns:
        (batch, height, width, filters).
    """
    parts = ops.reshape(ops.transpose(kernel, (2, 0, 1, 3)), (kernel.shape[2], -1))
    return tracing.fuse(_sum_of_neighbours)(ops.matmul(x, parts))


def _sum_of_neighbours(products):
    """Sum (batch, height, width, 9 * filters) to (batch, height, width, filters)."""
    _, height, width, channels = products.shape
    padded = ops.pad(products, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = ops.split(padded, 9, axis=-1)
    shifted = [
        part[:, i : i + height, j : j + width]
        for part, (i, j) in zip(parts, itertools.product(range(3), repeat=2))
    ]
    return functools.reduce(operator.add, shifted)


def _is_double(like, half):
    """Return whether a feature map, if there is one, is known to be twice as high and wide."""
    return like is None or tuple(like.shape[1:3]) == tuple(2 * n for n in half.shape[1:3])


def _convolve_doubled(x, kernel, bias):
    """Convolve a doubled feature map without making it.

    Each position is multiplied by all nine parts of the kernel, a quarter of the products, and
    what an output sees of them is summed.

    Args:
        x, kernel, bias: see `convolve_doubled`.

    Returns:
        (batch, 2 * height, 2 * width, filters).
    """
    size = 4 * math.prod(x.shape[:3]) * 9 * kernel.shape[-1]
    strips = num_parts(x.shape[1], size, _MAX_PRODUCTS)
    whole = functools.partial(_convolve_doubled_strips, strips=1)
    if strips == 1:
        return whole(x, kernel, bias)
    in_strips = functools.partial(_convolve_doubled_strips, strips=strips)
    return backend.with_gradient_of(whole, in_strips)(x, kernel, bias)


def _convolve_doubled_strips(x, kernel, bias, strips):
    batch, height, width, channels = x.shape
    rows, filters = height // strips, kernel.shape[-1]
    dtype = "float32" if backend.prefers_float32(x.dtype) else x.dtype
    parts = ops.unstack(ops.cast(tracing.after_computing(kernel, x), dtype))
    bias = ops.cast(bias, x.dtype)
    padded = ops.pad(ops.cast(x, dtype), ((0, 0), (1, 1), (0, 0), (0, 0)))

    def convolve_strip(i):
        strip = ops.slice(padded, (0, rows * i, 0, 0), (batch, rows + 2, width, channels))
        products = [
            ops.reshape(
                ops.matmul(ops.reshape(seen, (1, -1, channels)), part),
                (3, batch, -1, width, filters),
            )
            for seen, part in zip((strip[:, :-1], strip[:, 1:-1], strip[:, 1:]), parts)
        ]
        return tracing.fuse(_sum_of_doubled)(*products, bias)

    if strips == 1:
        return convolve_strip(0)
    shape = (batch, 2 * rows, 2 * width, filters)
    result = tracing.stack_in_turn(convolve_strip, strips, shape, x.dtype, first=x)
    return ops.reshape(ops.moveaxis(result, 0, 1), (batch, 2 * height, 2 * width, filters))


def _sum_of_doubled(above, here, below, bias):
    """Sum the products of a kernel's three rows to two rows for each of the feature map.

    Args:
        above: (3, batch, 1 + height, width, filters), of the row before and of all.
        here: (3, batch, height, width, filters).
        below: (3, batch, height + 1, width, filters), of all and of the row behind.
        bias: (filters,).

    Returns:
        (batch, 2 * height, 2 * width, filters), in the bias's dtype.
    """
    _, batch, height, width, filters = here.shape

    def sums(before, same, behind, axis):
        """Return the sums that even outputs see, and those that odd ones see."""
        places = [slice(None)] * axis
        first, last = (*places, slice(None, -1)), (*places, slice(1, None))
        return before[first] + same + behind[first], before[last] + same + behind[last]

    def columns(line):
        left, same, right = ops.unstack(line)
        left = ops.pad(left, ((0, 0), (0, 0), (1, 0), (0, 0)))
        right = ops.pad(right, ((0, 0), (0, 0), (0, 1), (0, 0)))
        return ops.stack(sums(left, same, right, axis=2), axis=3)

    above, here, below = (ops.cast(x, "float32") for x in (above, here, below))
    lines = sums(above, here, below, axis=2)
    result = ops.stack([columns(line) for line in lines], axis=2)
    result = ops.reshape(result, (batch, 2 * height, 2 * width, filters))
    return ops.cast(result + ops.cast(bias, "float32"), bias.dtype)
