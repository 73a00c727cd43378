"""Attention layers: of the text encoder, of the autoencoder's middle, of the U-Net."""

from __future__ import annotations

import math

import keras
from keras import ops

from kdiffusion.models.kernels import flash, normalization
from kdiffusion.models.layers.base import Block, add, repeat_rows
from kdiffusion.runtime import backend, tracing

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")

# Large enough that exp underflows to zero, finite so that no row of a softmax can be NaN.
_MASKED = -1e9


# Bytes of attention weights that are computed at a time. Above, queries go through in chunks: a
# guided step of SD 1.5 at 512 x 512 pixels would need a gibibyte for them. Larger are no faster.
_MAX_LOGITS = 2**26


def attend(query, key, value, num_heads, causal=False, use_flash=False, keep=True):
    """Scaled dot-product attention with the softmax in float32 (Vaswani et al. 2017, eq. 1).

    Large feature maps are attended to in chunks of queries, which changes memory, not numbers.

    Args:
        query: tensor (batch, tokens, num_heads * head_dim).
        key: tensor (batch, source tokens, num_heads * head_dim).
        value: tensor like `key`.
        num_heads: int.
        causal: bool, whether a token sees only itself and those before it.
        use_flash: bool, whether to go through `flash.attend`, never with `causal`.
        keep: bool, whether the weights of chunks are kept for gradients, or computed once more.

    Returns:
        Tensor like `query`.
    """
    if use_flash:
        x = flash.attend(*(_by_heads(x, num_heads) for x in (query, key, value)))
        return ops.reshape(x, ops.shape(query))
    if backend.prefers_float32(query.dtype):
        dtype = query.dtype
        query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
        return ops.cast(attend(query, key, value, num_heads, causal, use_flash, keep), dtype)
    query, value = _split_heads(query, num_heads), _split_heads(value, num_heads)
    # (batch, heads, head_dim, tokens) at once, not in every chunk.
    key = ops.transpose(_by_heads(key, num_heads), (0, 2, 3, 1))
    query = query * query.shape[-1] ** -0.5
    chunks = 1 if causal else _num_chunks(query, key)
    if chunks == 1:
        return _merge_heads(_attend(query, key, value, causal))
    batch, num_heads, tokens, head_dim = query.shape
    query = ops.reshape(query, (batch, num_heads, chunks, tokens // chunks, head_dim))
    attend_to = _attend if keep else backend.checkpoint(_attend, ())
    outputs = tracing.map_in_turn(
        lambda chunk: attend_to(chunk, key, value),
        ops.moveaxis(query, 2, 0),
        (batch, num_heads, tokens // chunks, value.shape[-1]),
        value.dtype,
    )
    outputs = ops.reshape(ops.moveaxis(outputs, 0, 2), (batch, num_heads, tokens, value.shape[-1]))
    return _merge_heads(outputs)


def _num_chunks(query, key):
    """How many equal parts the queries are split into; 1 where the shapes are not known yet."""
    sizes = (*query.shape[:3], key.shape[3])
    if None in sizes:
        return 1
    return normalization.least_divisor(sizes[2], -(-math.prod(sizes) * 4 // _MAX_LOGITS))


def _attend(query, key, value, causal=False):
    if keras.backend.standardize_dtype(query.dtype) == "float16":
        # Logits of SD 2.1 exceed float16's range.
        query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
    logits = ops.matmul(query, key)
    if causal:
        tokens = ops.arange(ops.shape(logits)[-1])
        logits = ops.where(tokens[:, None] >= tokens[None, :], logits, _MASKED)
    return ops.matmul(ops.cast(normalization.softmax(logits), value.dtype), value)


def _by_heads(x, num_heads):
    batch, tokens, width = ops.shape(x)
    return ops.reshape(x, (batch, tokens, num_heads, width // num_heads))


def _split_heads(x, num_heads):
    return ops.swapaxes(_by_heads(x, num_heads), 1, 2)


def _merge_heads(x):
    batch, num_heads, tokens, head_dim = ops.shape(x)
    return ops.reshape(ops.swapaxes(x, 1, 2), (batch, tokens, num_heads * head_dim))


@_serializable
class Attention(Block):
    """Multi-head attention; self-attention without a second input, cross-attention with one.

    Args:
        width: int, width of the queries and of the output.
        num_heads: int.
        use_bias: bool, whether query, key and value have biases (the output always has).
        causal: bool, whether a token sees only itself and those before it.
    """

    def __init__(self, width, num_heads, use_bias=False, causal=False, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.num_heads = num_heads
        self.use_bias = use_bias
        self.causal = causal

    def build(self, inputs_shape, context_shape=None):
        source_shape = context_shape or inputs_shape
        self.query = self.dense(self.width, "query", self.use_bias)
        self.query.build(inputs_shape)
        self.key = self.dense(self.width, "key", self.use_bias)
        self.key.build(source_shape)
        self.value = self.dense(self.width, "value", self.use_bias)
        self.value.build(source_shape)
        self.out = self.dense(self.width, "out")
        self.out.build((*inputs_shape[:-1], self.width))
        head_dim = self.width // self.num_heads
        self.use_flash = not self.causal and flash.works(head_dim, self.compute_dtype)

    def call(self, inputs, context=None):
        source = inputs if context is None else context
        query = repeat_rows(self.query(inputs), source)
        key, value = self.key(source), self.value(source)
        # With gradient checkpointing nothing is kept that large, also while a block is computed
        # once more.
        keep = self._remat_mode is None
        x = attend(query, key, value, self.num_heads, self.causal, self.use_flash, keep)
        return self.out(x)

    def compute_output_shape(self, inputs_shape, context_shape=None):
        return (*inputs_shape[:-1], self.width)

    def get_config(self):
        config = {
            "width": self.width,
            "num_heads": self.num_heads,
            "use_bias": self.use_bias,
            "causal": self.causal,
        }
        return {**super().get_config(), **config}


@_serializable
class SpatialAttention(Block):
    """Single-head attention over all positions of a feature map (autoencoder's middle block).

    Args:
        num_groups: int, groups of the normalization.
    """

    def __init__(self, num_groups=32, **kwargs):
        super().__init__(**kwargs)
        self.num_groups = num_groups

    def build(self, inputs_shape):
        channels = inputs_shape[-1]
        self.norm = self.group_norm(self.num_groups, 1e-6, "norm")
        self.norm.build(inputs_shape)
        for name in ("query", "key", "value", "out"):
            layer = self.dense(channels, name)
            layer.build((None, None, channels))
            setattr(self, name, layer)

    def call(self, inputs):
        x = flatten_positions(self.norm(inputs))
        x = self.out(attend(self.query(x), self.key(x), self.value(x), num_heads=1))
        return inputs + ops.reshape(x, ops.shape(inputs))

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        return {**super().get_config(), "num_groups": self.num_groups}


def flatten_positions(x):
    """(batch, height, width, channels) → (batch, height * width, channels)."""
    batch, height, width, channels = ops.shape(x)
    return ops.reshape(x, (batch, height * width, channels))


@_serializable
class FeedForward(Block):
    """Gated feed-forward layer: value * GELU(gate), exact GELU (Shazeer 2020, GEGLU).

    Args:
        width: int, width of input and output; the hidden layer has four times as much.
    """

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, inputs_shape):
        self.proj = self.dense(8 * self.width, "proj")
        self.proj.build(inputs_shape)
        self.out = self.dense(self.width, "out")
        self.out.build((*inputs_shape[:-1], 4 * self.width))

    def call(self, inputs):
        return self.out(normalization.gated_gelu(self.proj(inputs)))

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@_serializable
class TransformerBlock(Block):
    """Self-attention, cross-attention to the text, feed-forward, each with a residual.

    Without a second input the cross-attention attends to its own tokens, as in the original
    implementation.

    Args:
        width: int, width of the token states.
        num_heads: int.
    """

    def __init__(self, width, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.num_heads = num_heads

    def build(self, inputs_shape, context_shape=None):
        options = {"kernel_initializer": self.kernel_initializer, "dtype": self.dtype_policy}
        for name in ("norm1", "norm2", "norm3"):
            norm = self.layer_norm(name)
            norm.build(inputs_shape)
            setattr(self, name, norm)
        self.attn1 = Attention(self.width, self.num_heads, name="attn1", **options)
        self.attn1.build(inputs_shape)
        self.attn2 = Attention(self.width, self.num_heads, name="attn2", **options)
        self.attn2.build(inputs_shape, context_shape)
        self.ff = FeedForward(self.width, name="ff", **options)
        self.ff.build(inputs_shape)

    @tracing.trace_once
    def call(self, inputs, context=None):
        x = inputs + self.attn1(self.norm1(inputs))
        x = add(x, self.attn2(self.norm2(x), context))
        return x + self.ff(self.norm3(x))

    def compute_output_shape(self, inputs_shape, context_shape=None):
        return inputs_shape

    def get_config(self):
        return {**super().get_config(), "width": self.width, "num_heads": self.num_heads}


@_serializable
class SpatialTransformer(Block):
    """Transformer over the positions of a feature map, attending to the text if there is one.

    Args:
        depth: int, number of transformer blocks.
        num_heads: int.
        num_groups: int, groups of the normalization before the first projection.
    """

    def __init__(self, depth, num_heads, num_groups=32, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.num_heads = num_heads
        self.num_groups = num_groups

    def build(self, inputs_shape, context_shape=None):
        channels = inputs_shape[-1]
        tokens_shape = (inputs_shape[0], None, channels)
        self.norm = self.group_norm(self.num_groups, 1e-6, "norm")
        self.norm.build(inputs_shape)
        self.proj_in = self.dense(channels, "proj_in")
        self.proj_in.build(tokens_shape)
        self.blocks = []
        for index in range(self.depth):
            block = TransformerBlock(
                channels,
                self.num_heads,
                kernel_initializer=self.kernel_initializer,
                dtype=self.dtype_policy,
                name=f"block_{index}",
            )
            block.build(tokens_shape, context_shape)
            self.blocks.append(block)
        self.proj_out = self.dense(channels, "proj_out")
        self.proj_out.build(tokens_shape)

    def call(self, inputs, context=None):
        x = self.proj_in(flatten_positions(self.norm(inputs)))
        for block in self.blocks:
            x = block(x, context)
        return add(inputs, ops.reshape(self.proj_out(x), (-1, *ops.shape(inputs)[1:])))

    def compute_output_shape(self, inputs_shape, context_shape=None):
        return inputs_shape

    def get_config(self):
        config = {
            "depth": self.depth,
            "num_heads": self.num_heads,
            "num_groups": self.num_groups,
        }
        return {**super().get_config(), **config}
