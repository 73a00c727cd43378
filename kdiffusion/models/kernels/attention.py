"""Scaled dot-product attention, whole, in chunks of queries, or by flash attention."""

from __future__ import annotations

import math

import keras
from keras import ops

from kdiffusion.models.kernels import flash
from kdiffusion.models.kernels.parts import num_parts
from kdiffusion.runtime import backend, tracing

# Large enough that exp underflows to zero, finite so that no row of a softmax can be NaN.
_MASKED = -1e9

# Bytes of attention weights that are computed at a time. Above, queries go through in chunks: a
# guided step of SD 1.5 at 512 x 512 pixels would need a gibibyte for them. Larger are no faster.
_MAX_LOGITS = 2**26


def attend(query, key, value, num_heads, causal=False, use_flash=False, rematerialize=False):
    """Attend with the softmax in float32 (Vaswani et al. 2017, eq. 1).

    Large feature maps are attended to in chunks of queries, which changes memory, not numbers.

    Args:
        query: tensor (batch, tokens, num_heads * head_dim).
        key: tensor (batch, source tokens, num_heads * head_dim).
        value: tensor like `key`.
        num_heads: int.
        causal: bool, whether a token sees only itself and those before it.
        use_flash: bool, whether to use flash attention, see `has_flash_attention`; never with
            `causal`.
        rematerialize: bool, whether gradients compute the weights of chunks once more.

    Returns:
        Tensor like `query`.
    """
    if use_flash:
        x = flash.attend(*(_by_heads(x, num_heads) for x in (query, key, value)))
        return ops.reshape(x, ops.shape(query))
    dtype = query.dtype
    if not backend.prefers_float32(dtype):
        return _attend(query, key, value, num_heads, causal, rematerialize)
    query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
    return ops.cast(_attend(query, key, value, num_heads, causal, rematerialize), dtype)


def _attend(query, key, value, num_heads, causal, rematerialize):
    query, value = _split_heads(query, num_heads), _split_heads(value, num_heads)
    # (batch, heads, head_dim, tokens) at once, not in every chunk.
    key = ops.transpose(_by_heads(key, num_heads), (0, 2, 3, 1))
    query = query * query.shape[-1] ** -0.5
    chunks = 1 if causal else _num_chunks(query, key)
    if chunks == 1:
        return _merge_heads(_attend_chunk(query, key, value, causal))
    batch, num_heads, tokens, head_dim = query.shape
    query = ops.reshape(query, (batch, num_heads, chunks, tokens // chunks, head_dim))
    attend_to = backend.checkpoint(_attend_chunk, ()) if rematerialize else _attend_chunk
    outputs = tracing.map_in_turn(
        lambda chunk: attend_to(chunk, key, value),
        ops.moveaxis(query, 2, 0),
        (batch, num_heads, tokens // chunks, value.shape[-1]),
        value.dtype,
    )
    outputs = ops.reshape(ops.moveaxis(outputs, 0, 2), (batch, num_heads, tokens, value.shape[-1]))
    return _merge_heads(outputs)


def _num_chunks(query, key):
    """Return the number of equal parts of the queries; 1 where the shapes are not known yet."""
    sizes = (*query.shape[:3], key.shape[3])
    if None in sizes:
        return 1
    return num_parts(sizes[2], 4 * math.prod(sizes), _MAX_LOGITS)


def _attend_chunk(query, key, value, causal=False):
    if keras.backend.standardize_dtype(query.dtype) == "float16":
        # Logits of SD 2.1 exceed float16's range.
        query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
    logits = ops.matmul(query, key)
    if causal:
        tokens = ops.arange(ops.shape(logits)[-1])
        logits = ops.where(tokens[:, None] >= tokens[None, :], logits, _MASKED)
    return ops.matmul(ops.cast(_softmax(logits), value.dtype), value)


def _softmax(logits):
    """Return the softmax over the last axis, computed in float32."""
    dtype = keras.backend.standardize_dtype(logits.dtype)
    # TensorFlow's and oneDNN's softmax of bfloat16 goes through float32 by itself.
    through_float32 = backend.name() == "tensorflow" and not backend.prefers_float32(dtype)
    if dtype == "float32" or (dtype == "bfloat16" and through_float32):
        return ops.softmax(logits, axis=-1)
    return ops.cast(ops.softmax(ops.cast(logits, "float32"), axis=-1), dtype)


def _by_heads(x, num_heads):
    batch, tokens, width = ops.shape(x)
    return ops.reshape(x, (batch, tokens, num_heads, width // num_heads))


def _split_heads(x, num_heads):
    return ops.swapaxes(_by_heads(x, num_heads), 1, 2)


def _merge_heads(x):
    batch, num_heads, tokens, head_dim = ops.shape(x)
    return ops.reshape(ops.swapaxes(x, 1, 2), (batch, tokens, num_heads * head_dim))
