"""Dense layers over token states, and the gated linear unit between two of them."""

from __future__ import annotations

from keras import ops

from kdiffusion.runtime import backend, processor, tracing

# Tokens, of a whole batch, from which on oneDNN's convolutions are faster than its products.
_MANY_TOKENS = 2048


def dense(x, kernel, bias=None):
    """Multiply by a matrix and add a bias.

    Args:
        x: (..., width).
        kernel: (width, units).
        bias: (units,), or `None`.

    Returns:
        (..., units).
    """
    if bias is not None and _is_long(x):
        return backend.with_gradient_of(_product, _convolution)(x, kernel, bias)
    x = ops.matmul(x, kernel)
    return x if bias is None else ops.add(x, bias)


def gated_gelu(x):
    """Return value * GELU(gate) of `[value, gate]`, exact GELU (Shazeer 2020, GEGLU).

    Args:
        x: (..., 2 * width).

    Returns:
        (..., width).
    """
    return tracing.fuse(_gated_gelu)(x)


def _is_long(x):
    """Return whether there are tokens enough for `_convolution`, as far as their number is known.

    oneDNN's convolutions add the bias where they are. Its matrix products would too, if graphs went
    through TensorFlow's optimizer.
    """
    return (
        backend.name() == "tensorflow"
        and not backend.on_accelerator()
        and "avx512f" in processor.flags()
        and len(x.shape) == 3
        and None not in x.shape
        and x.shape[0] * x.shape[1] >= _MANY_TOKENS
    )


def _product(x, kernel, bias):
    return ops.matmul(x, kernel) + bias


def _convolution(x, kernel, bias):
    # Keras's sum with a vector is the operation that oneDNN's convolutions take in.
    kernel = kernel[None, None]
    return ops.add(ops.conv(x[:, None], kernel, data_format="channels_last"), bias)[:, 0]


def _gated_gelu(x):
    value, gate = ops.split(x, 2, axis=-1)
    return value * ops.gelu(gate, approximate=False)
