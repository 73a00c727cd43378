"""The layers of CLIP's two towers."""

from __future__ import annotations

import keras
from keras import ops

from kdiffusion.models.layers.attention import Attention, flatten_positions
from kdiffusion.models.layers.base import Layer
from kdiffusion.runtime import tracing

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")


@_serializable
class EncoderLayer(Layer):
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
            name="attention",
            **self._options(),
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


@_serializable
class TokenEmbedding(Layer):
    """Sum of a token's embedding and its position's.

    Args:
        vocabulary_size: int.
        max_length: int, number of positions.
        width: int.
    """

    def __init__(self, vocabulary_size, max_length, width, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary_size = vocabulary_size
        self.max_length = max_length
        self.width = width

    def build(self, inputs_shape):
        self.token_embedding = self.add_weight(
            shape=(self.vocabulary_size, self.width),
            initializer=self.kernel_initializer,
            name="token_embedding",
        )
        self.position_embedding = self.add_weight(
            shape=(self.max_length, self.width),
            initializer=self.kernel_initializer,
            name="position_embedding",
        )

    def call(self, inputs):
        tokens = ops.take(ops.convert_to_tensor(self.token_embedding), inputs, axis=0)
        positions = self.position_embedding[: ops.shape(inputs)[1]]
        return ops.cast(tokens, self.compute_dtype) + ops.cast(positions, self.compute_dtype)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor((*inputs.shape, self.width), dtype=self.compute_dtype)

    def get_config(self):
        config = {
            "vocabulary_size": self.vocabulary_size,
            "max_length": self.max_length,
            "width": self.width,
        }
        return {**super().get_config(), **config}


@_serializable
class EndOfText(keras.layers.Layer):
    """State of the first end token, CLIP's vector for the whole text.

    Args:
        end_id: int, id of the end token.
    """

    def __init__(self, end_id, **kwargs):
        super().__init__(**kwargs)
        self.end_id = end_id

    def call(self, inputs, tokens):
        position = ops.argmax(ops.cast(ops.equal(tokens, self.end_id), "int32"), axis=-1)
        return ops.squeeze(ops.take_along_axis(inputs, position[:, None, None], axis=1), axis=1)

    def compute_output_spec(self, inputs, tokens):
        return keras.KerasTensor((inputs.shape[0], inputs.shape[-1]), dtype=self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "end_id": self.end_id}


@_serializable
class PatchEmbedding(Layer):
    """Class token and linear projections of the patches in rows, each with its position's vector.

    Args:
        patch_size: int, height and width of a patch.
        width: int.
        mean: sequence of float, subtracted from images in [0, 1].
        std: sequence of float, the divisors that follow.
    """

    def __init__(self, patch_size, width, mean, std, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.width = width
        self.mean = tuple(mean)
        self.std = tuple(std)

    def build(self, inputs_shape):
        self.patches = self.conv(
            self.width,
            self.patch_size,
            "patches",
            strides=self.patch_size,
            padding="valid",
            use_bias=False,
        )
        self.patches.build(inputs_shape)
        self.class_embedding = self.add_weight(
            shape=(self.width,), initializer=self.kernel_initializer, name="class_embedding"
        )
        self.position_embedding = self.add_weight(
            shape=(self.compute_output_shape(inputs_shape)[1], self.width),
            initializer=self.kernel_initializer,
            name="position_embedding",
        )

    def call(self, inputs):
        # ((x + 1) / 2 - mean) / std of an image x in [-1, 1].
        scale = ops.convert_to_tensor([0.5 / std for std in self.std], inputs.dtype)
        shift = ops.convert_to_tensor(
            [(0.5 - mean) / std for mean, std in zip(self.mean, self.std)], inputs.dtype
        )
        x = flatten_positions(self.patches(inputs * scale + shift))
        first = ops.cast(self.class_embedding, x.dtype)
        first = ops.broadcast_to(first, (ops.shape(x)[0], 1, self.width))
        x = ops.concatenate([first, x], axis=1)
        return x + ops.cast(self.position_embedding, x.dtype)

    def compute_output_shape(self, inputs_shape):
        batch, height, width, _ = inputs_shape
        tokens = (height // self.patch_size) * (width // self.patch_size) + 1
        return (batch, tokens, self.width)

    def get_config(self):
        config = {
            "patch_size": self.patch_size,
            "width": self.width,
            "mean": self.mean,
            "std": self.std,
        }
        return {**super().get_config(), **config}
