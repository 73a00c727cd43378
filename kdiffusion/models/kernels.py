"""What the layers compute over whole feature maps, so that each reads them as seldom as it can.

XLA makes one pass over memory of a chain of elementwise operations; a plain TensorFlow graph makes
one of each operation. The functions here that go through `compilation.fuse` are one pass
everywhere.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator

import keras
from keras import ops

from kdiffusion import backend, compilation, processor

# Positions of a feature map, in all images of a batch, up to which a 3x3 convolution is limited by
# reading its kernel, not by arithmetic. There, one matrix product is up to three times as fast on
# a CPU as the convolutions of oneDNN and XLA, which first bring the kernel into another order.
_FEW_POSITIONS = 128

# Tokens, of a whole batch, from which on oneDNN's convolutions are faster than its products.
_MANY_TOKENS = 2048

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
    return compilation.fuse(finish)(x, *values)


def normalization(x, groups, epsilon, gamma, beta, activation=None):
    """What `normalize` does in the end: a function of any part of the feature map, and its values.

    Args:
        x, groups, epsilon, gamma, beta, activation: see `normalize`.

    Returns:
        Elementwise function `(x, mean, scale, beta) -> x`, and its last three arguments.
    """
    mean, variance = compilation.fuse(_moments)(x, groups)
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
    return compilation.fuse(_normalize_tokens)(x, gamma, beta, epsilon)


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
    return compilation.fuse(_gated_gelu)(x)


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
    return compilation.fuse(_sum_of_neighbours)(ops.matmul(x, parts))


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


def are_many(x):
    """Whether `convolve_doubled` pays, as far as shapes are known: positions repay its kernels.

    They have to be as many as channels where the doubled map would be one for `winograd`, a quarter
    of these elsewhere.
    """
    if None in x.shape or backend.on_accelerator():
        return False
    dtype = keras.backend.standardize_dtype(x.dtype)
    least = x.shape[3] if dtype == "float32" or backend.prefers_float32(dtype) else x.shape[3] / 4
    return math.prod(x.shape[:3]) >= least


def convolve_doubled(x, kernel, bias):
    """3x3 convolution, keeping the size, of a feature map doubled by its nearest neighbours.

    The doubled map is not made: an output sees 2x2 different inputs, each through the sum of the
    weights that meet it. Which they are depends on whether its row and column are even or odd, so
    it is four convolutions with 4/9 of the products (Shi et al. 2016, arXiv:1609.07009).

    Args:
        x: (batch, height, width, channels).
        kernel: (3, 3, channels, filters).
        bias: (filters,).

    Returns:
        (batch, 2 * height, 2 * width, filters).
    """
    batch, height, width, _ = x.shape
    padded = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums_by_parity = compilation.fuse(_sums_by_parity)(compilation.after(kernel, x))
    # Even rows begin one before the input's own, odd ones with it.
    parities = [(i, j) for i in range(2) for j in range(2)]
    outputs = [
        ops.conv(
            padded[:, i : i + height + 1, j : j + width + 1, :],
            sums,
            padding="valid",
            data_format="channels_last",
        )
        for (i, j), sums in zip(parities, sums_by_parity)
    ]
    rows = [ops.stack(outputs[:2], axis=3), ops.stack(outputs[2:], axis=3)]
    shape = (batch, 2 * height, 2 * width, kernel.shape[-1])
    return ops.reshape(ops.stack(rows, axis=2), shape) + bias


def _sums_by_parity(kernel):
    """Four kernels of 2x2, for rows and columns even and odd."""

    def both(x, axis):
        first, second, third = (ops.take(x, i, axis=axis) for i in range(3))
        even, odd = (first, second + third), (first + second, third)
        return [ops.stack(sums, axis=axis) for sums in (even, odd)]

    x = ops.cast(kernel, "float32")
    return [ops.cast(sums, kernel.dtype) for rows in both(x, 0) for sums in both(rows, 1)]


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
