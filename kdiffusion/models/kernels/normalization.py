"""What the layers compute over whole feature maps, so that each reads them as seldom as it can.

XLA makes one pass over memory of a chain of elementwise operations; a plain TensorFlow graph makes
one of each operation. The functions here that go through `tracing.fuse` are one pass
everywhere.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator

import keras
from keras import ops

from kdiffusion.runtime import backend, processor, tracing

# Positions of a feature map, in all images of a batch, up to which a 3x3 convolution is limited by
# reading its kernel, not by arithmetic. There, one matrix product is up to three times as fast on
# a CPU as the convolutions of oneDNN and XLA, which first bring the kernel into another order.
_FEW_POSITIONS = 128

# Tokens, of a whole batch, from which on oneDNN's convolutions are faster than its products.
_MANY_TOKENS = 2048

# Bytes, in float32, of the products from which a doubled feature map is summed up at a time.
_MAX_PRODUCTS = 2**26

# Positions of a feature map that are summed up at a time.
_RUN = 32


def normalize(x, groups, epsilon, gamma, beta, activation=None):
    """Group normalization and activation (Wu & He 2018), computed in float32.

    Means and variances are taken per run of positions first, which XLA does in parallel on a CPU,
    then per channel, then per group, so channels are never reordered.

    Args:
        x: (batch, height, width, channels).
        groups: int, groups that the channels are split into.
        epsilon: float, added to the variance.
        gamma: (channels,) float32, scale.
        beta: (channels,) float32, shift.
        activation: `None` or `"silu"`.

    Returns:
        Tensor like `x`.
    """
    finish, *values = normalization(x, groups, epsilon, gamma, beta, activation)
    return tracing.fuse(finish)(x, *values)


def normalization(x, groups, epsilon, gamma, beta, activation=None):
    """What `normalize` does in the end: a function of any part of the feature map, and its values.

    Args:
        x, groups, epsilon, gamma, beta, activation: see `normalize`.

    Returns:
        Elementwise function `(x, mean, scale, beta) -> x`, and its last three arguments.
    """
    mean, variance = tracing.fuse(_moments)(x, groups)
    scale = gamma * ops.rsqrt(variance + epsilon)
    return _affine_silu if activation == "silu" else _affine, mean, scale, beta


def normalize_tokens(x, epsilon, gamma, beta):
    """Layer normalization over the last axis, computed in float32 (Ba et al. 2016).

    Args:
        x: (..., width).
        epsilon: float, added to the variance.
        gamma: (width,) float32, scale.
        beta: (width,) float32, shift.

    Returns:
        Tensor like `x`.
    """
    return tracing.fuse(_normalize_tokens)(x, gamma, beta, epsilon)


def softmax(logits):
    """Softmax over the last axis, computed in float32.

    Args:
        logits: tensor.

    Returns:
        Tensor like `logits`.
    """
    dtype = keras.backend.standardize_dtype(logits.dtype)
    # TensorFlow's and oneDNN's softmax of bfloat16 goes through float32 by itself.
    through_float32 = backend.name() == "tensorflow" and not backend.prefers_float32(dtype)
    if dtype == "float32" or (dtype == "bfloat16" and through_float32):
        return ops.softmax(logits, axis=-1)
    return ops.cast(ops.softmax(ops.cast(logits, "float32"), axis=-1), dtype)


def gated_gelu(x):
    """value * GELU(gate) of `[value, gate]`, exact GELU (Shazeer 2020, GEGLU).

    Args:
        x: (..., 2 * width).

    Returns:
        (..., width).
    """
    return tracing.fuse(_gated_gelu)(x)


def is_small(shape):
    """Whether a 3x3 convolution is one for `convolve_small`, as far as its results' shape is known.

    Args:
        shape: (batch, height, width, filters) of the results.
    """
    positions = shape[:3]
    few = None not in positions and math.prod(positions) <= _FEW_POSITIONS
    return few and not backend.on_accelerator()


def convolve_small(x, kernel, stride=1):
    """3x3 convolution without padding, as one matrix product.

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


def is_long(x):
    """Whether there are tokens enough for `multiply_long`, as far as their number is known."""
    return (
        backend.name() == "tensorflow"
        and not backend.on_accelerator()
        and "avx512f" in processor.flags()
        and len(x.shape) == 3
        and None not in x.shape
        and x.shape[0] * x.shape[1] >= _MANY_TOKENS
    )


def multiply_long(x, kernel, bias):
    """A dense layer over many tokens, as a 1x1 convolution.

    oneDNN's convolutions add the bias where they are. Its matrix products would too, if graphs went
    through TensorFlow's optimizer.

    Args:
        x: (batch, tokens, width).
        kernel: (width, units).
        bias: (units,).

    Returns:
        (batch, tokens, units).
    """

    def product(x, kernel, bias):
        return ops.matmul(x, kernel) + bias

    def convolution(x, kernel, bias):
        # Keras's sum with a vector is the operation that oneDNN's convolutions take in.
        kernel = kernel[None, None]
        return ops.add(ops.conv(x[:, None], kernel, data_format="channels_last"), bias)[:, 0]

    return backend.with_gradient_of(product, convolution)(x, kernel, bias)


def yields_few(x, kernel):
    """Whether `convolve_to_few` pays, as far as shapes are known: nine products for each filter.

    They would be rounded one by one in half precision.
    """
    channels, filters = kernel.shape[2:]
    return (
        None not in x.shape[1:3]
        and 9 * filters <= channels
        and keras.backend.standardize_dtype(x.dtype) == "float32"
        and not backend.on_accelerator()
    )


def convolve_to_few(x, kernel):
    """3x3 convolution of stride 1 that keeps the size, of many channels to a picture's few.

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
    """(batch, height, width, 9 * filters) → (batch, height, width, filters)."""
    _, height, width, channels = products.shape
    padded = ops.pad(products, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = ops.split(padded, 9, axis=-1)
    shifted = [
        part[:, i : i + height, j : j + width]
        for part, (i, j) in zip(parts, itertools.product(range(3), repeat=2))
    ]
    return functools.reduce(operator.add, shifted)


def convolve_doubled(x, kernel, bias):
    """3x3 convolution, keeping the size, of a feature map doubled by its nearest neighbours.

    The doubled map is not made: each position is multiplied by all nine parts of the kernel, a
    quarter of the products, and what an output sees of them is summed.

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
        bias: (filters,).

    Returns:
        (batch, 2 * height, 2 * width, filters).
    """
    size = 4 * math.prod(x.shape[:3]) * 9 * kernel.shape[-1]
    strips = least_divisor(x.shape[1], -(-size // _MAX_PRODUCTS))
    whole = functools.partial(_convolve_doubled, strips=1)
    if strips == 1:
        return whole(x, kernel, bias)
    in_strips = functools.partial(_convolve_doubled, strips=strips)
    return backend.with_gradient_of(whole, in_strips)(x, kernel, bias)


def _convolve_doubled(x, kernel, bias, strips):
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
    """Products of three rows of a kernel, with the rows that each sees → two rows for each.

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
        """Of what even outputs see, and odd ones."""
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


def least_divisor(number, least):
    """The least divisor of a number that is no less than another, at most the number itself."""
    return next((n for n in range(max(least, 1), number) if number % n == 0), number)


def _moments(x, groups):
    x = _in_runs(ops.cast(x, "float32"))
    mean = _over_groups(ops.mean(ops.mean(x, axis=2), axis=1), groups)
    return mean, _over_groups(ops.mean(ops.mean(ops.square(x - mean), axis=2), axis=1), groups)


def _in_runs(x):
    """(batch, height, width, channels) → (batch, runs, positions, channels), if that is possible.

    XLA fuses nothing with sums of more terms, so differences from the mean would go to memory.
    """
    _, height, width, channels = x.shape
    if None in (height, width) or height * width % _RUN:
        return x
    return ops.reshape(x, (-1, height * width // _RUN, _RUN, channels))


def _over_groups(per_channel, groups):
    """(batch, channels) → the mean of each channel's group, (batch, 1, 1, channels)."""
    channels = per_channel.shape[-1]
    grouped = ops.reshape(per_channel, (-1, groups, channels // groups))
    # Not `ops.repeat`, which is 30 operations in TensorFlow.
    spread = ops.mean(grouped, axis=-1, keepdims=True) * ops.ones((channels // groups,))
    return ops.reshape(spread, (-1, 1, 1, channels))


def _affine(x, mean, scale, beta):
    return ops.cast((ops.cast(x, "float32") - mean) * scale + beta, x.dtype)


def _affine_silu(x, mean, scale, beta):
    return ops.cast(ops.silu((ops.cast(x, "float32") - mean) * scale + beta), x.dtype)


def _normalize_tokens(x, gamma, beta, epsilon):
    dtype = x.dtype
    x = ops.cast(x, "float32")
    x = x - ops.mean(x, axis=-1, keepdims=True)
    x = x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + epsilon)
    return ops.cast(x * gamma + beta, dtype)


def _gated_gelu(x):
    value, gate = ops.split(x, 2, axis=-1)
    return value * ops.gelu(gate, approximate=False)
