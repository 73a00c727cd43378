"""The transformer layer of CLIP's two towers."""

from __future__ import annotations

import keras
from keras import ops

from kdiffusion.models.layers.attention import Attention
from kdiffusion.models.layers.base import Block
from kdiffusion.runtime import tracing


@keras.saving.register_keras_serializable(package="kdiffusion")
class EncoderLayer(Block):
    """Pre-normalized self-attention and perceptron, each with a residual.

    Args:
        num_heads: int.
        mlp_width: int, width of the hidden layer.
        activation: `"quick_gelu"` (x * sigmoid(1.702 x), Hendrycks & Gimpel 2016) or `"gelu"`,
            exact.
        epsilon: float, epsilon of both normalizations.
        causal: bool, whether a token sees only itself and those before it.
    """

    def __init__(self, num_heads, mlp_width, activation, epsilon=1e-5, causal=False, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.mlp_width = mlp_width
        self.activation = activation
        self.epsilon = epsilon
        self.causal = causal

    def build(self, inputs_shape):
        width = inputs_shape[-1]
        self.norm1 = self.layer_norm("norm1", self.epsilon)
        self.norm1.build(inputs_shape)
        self.attention = Attention(
            width,
            self.num_heads,
            use_bias=True,
            causal=self.causal,
            kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.attention.build(inputs_shape)
        self.norm2 = self.layer_norm("norm2", self.epsilon)
        self.norm2.build(inputs_shape)
        self.fc1 = self.dense(self.mlp_width, "fc1")
        self.fc1.build(inputs_shape)
        self.fc2 = self.dense(width, "fc2")
        self.fc2.build((*inputs_shape[:-1], self.mlp_width))

    @tracing.trace_once
    def call(self, inputs):
        x = inputs + self.attention(self.norm1(inputs))
        hidden = self.fc1(self.norm2(x))
        if self.activation == "quick_gelu":
            hidden = hidden * ops.sigmoid(1.702 * hidden)
        else:
            hidden = ops.gelu(hidden, approximate=False)
        return x + self.fc2(hidden)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        config = {
            "num_heads": self.num_heads,
            "mlp_width": self.mlp_width,
            "activation": self.activation,
            "epsilon": self.epsilon,
            "causal": self.causal,
        }
        return {**super().get_config(), **config}
