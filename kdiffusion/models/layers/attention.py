"""Attention layers and the transformers of the U-Net."""

from __future__ import annotations

import keras
from keras import ops

from kdiffusion.models import kernels
from kdiffusion.models.layers.base import Layer, add, repeat_rows
from kdiffusion.runtime import tracing

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")


@_serializable
class Attention(Layer):
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
        self.use_flash = not self.causal and kernels.has_flash_attention(
            head_dim, self.compute_dtype
        )

    def call(self, inputs, context=None):
        source = inputs if context is None else context
        query = repeat_rows(self.query(inputs), source)
        key, value = self.key(source), self.value(source)
        # With gradient checkpointing weights are not kept while a block is computed once more
        # either.
        rematerialize = self._remat_mode is not None
        return self.out(
            kernels.attend(
                query, key, value, self.num_heads, self.causal, self.use_flash, rematerialize
            )
        )

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
class SpatialAttention(Layer):
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
        x = kernels.attend(self.query(x), self.key(x), self.value(x), num_heads=1)
        return inputs + ops.reshape(self.out(x), ops.shape(inputs))

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        return {**super().get_config(), "num_groups": self.num_groups}


def flatten_positions(x):
    """Reshape (batch, height, width, channels) to (batch, height * width, channels)."""
    batch, height, width, channels = ops.shape(x)
    return ops.reshape(x, (batch, height * width, channels))


@_serializable
class FeedForward(Layer):
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
        return self.out(kernels.gated_gelu(self.proj(inputs)))

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@_serializable
class TransformerBlock(Layer):
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
        options = self._options()
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
class SpatialTransformer(Layer):
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
                channels, self.num_heads, name=f"block_{index}", **self._options()
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
