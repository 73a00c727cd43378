"""Group and layer normalization, computed in float32, each in as few passes as possible."""

from __future__ import annotations

from keras import ops

from kdiffusion.models.kernels.parts import Elementwise
from kdiffusion.runtime import tracing

# Positions of a feature map that are summed up at a time.
_RUN = 32


def normalize(x, groups, epsilon, gamma, beta, activation=None):
    """Normalize groups of channels, and apply an activation (Wu & He 2018).

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
    return normalizer(x, groups, epsilon, gamma, beta, activation)(x)


def normalizer(x, groups, epsilon, gamma, beta, activation=None):
    """Return group normalization as an elementwise function of any part of a feature map.

    Means and variances are taken per run of positions first, which XLA does in parallel on a CPU,
    then per channel, then per group, so channels are never reordered.

    Args:
        x, groups, epsilon, gamma, beta, activation: see `normalize`.

    Returns:
        `Elementwise`.
    """
    mean, variance = tracing.fuse(_moments)(x, groups)
    scale = gamma * ops.rsqrt(variance + epsilon)
    return Elementwise(_affine_silu if activation == "silu" else _affine, (mean, scale, beta))


def normalize_tokens(x, epsilon, gamma, beta):
    """Normalize over the last axis (layer normalization, Ba et al. 2016).

    Args:
        x: (..., width).
        epsilon: float, added to the variance.
        gamma: (width,) float32, scale.
        beta: (width,) float32, shift.

    Returns:
        Tensor like `x`.
    """
    return tracing.fuse(_normalize_tokens)(x, gamma, beta, epsilon)


def _moments(x, groups):
    """Return mean and variance of each channel's group, (batch, 1, 1, channels) both."""
    x = _in_runs(ops.cast(x, "float32"))
    mean = _over_groups(ops.mean(ops.mean(x, axis=2), axis=1), groups)
    return mean, _over_groups(ops.mean(ops.mean(ops.square(x - mean), axis=2), axis=1), groups)


def _in_runs(x):
    """Reshape to (batch, runs, positions, channels) if the positions divide into runs.

    XLA fuses nothing with sums of more terms, so differences from the mean would go to memory.
    """
    _, height, width, channels = x.shape
    if None in (height, width) or height * width % _RUN:
        return x
    return ops.reshape(x, (-1, height * width // _RUN, _RUN, channels))


def _over_groups(per_channel, groups):
    """Replace each of (batch, channels) by its group's mean, as (batch, 1, 1, channels)."""
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
