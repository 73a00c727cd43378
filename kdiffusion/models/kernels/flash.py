"""Flash attention, where the backend has a kernel of it that computes what it should."""

from __future__ import annotations

import functools
import warnings

import numpy as np
from keras import ops

from kdiffusion.runtime import backend

# Largest error over unit normal inputs; rounding of a result near 1 is 0.004 and 0.0005.
_TOLERANCES = {"bfloat16": 0.02, "float16": 0.0025}


def attend(query, key, value):
    """Compute scaled dot-product attention without keeping its weights (Dao et al. 2022).

    Args:
        query: tensor (batch, tokens, heads, head_dim), bfloat16 or float16.
        key: tensor (batch, source tokens, heads, head_dim).
        value: tensor like `key`.

    Returns:
        Tensor like `query`.
    """
    return ops.dot_product_attention(query, key, value, flash_attention=True)


@functools.cache
def works(head_dim: int, dtype: str) -> bool:
    """Return whether there is a kernel of flash attention for such heads, and it is right.

    Computes once, with few tokens: ask when a layer is built, not while a function is traced.

    Args:
        head_dim: int, width of a head.
        dtype: str, compute dtype.
    """
    if dtype not in _TOLERANCES or not backend.has_flash_attention():
        return False
    rng = np.random.default_rng(0)
    shapes = [(2, tokens, 2, head_dim) for tokens in (128, 77, 77)]
    inputs = [ops.convert_to_tensor(rng.normal(size=shape), dtype) for shape in shapes]
    try:
        outputs = attend(*inputs)
    except (ImportError, RuntimeError, ValueError):
        # Keras's and JAX's errors for a head or a GPU that cuDNN has no kernel for.
        return False
    outputs, *inputs = (ops.convert_to_numpy(ops.cast(x, "float32")) for x in (outputs, *inputs))
    error = np.abs(outputs - _plain(*inputs)).max()
    if error <= _TOLERANCES[dtype]:
        return True
    warnings.warn(
        f"Flash attention is off: with heads of {head_dim} in {dtype} its result was wrong by "
        f"{error:.2g}, expected at most {_TOLERANCES[dtype]}. Images are generated with "
        "plain attention, which is slower. Try another version of JAX or cuDNN.",
        stacklevel=2,
    )
    return False


def _plain(query, key, value):
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)
