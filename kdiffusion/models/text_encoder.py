"""The text encoder: token ids to the states that the U-Net attends to."""

from __future__ import annotations

import keras
from keras import ops

from kdiffusion.models.architectures import TextEncoderArchitecture
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers.base import Block
from kdiffusion.models.layers.clip import EncoderLayer
from kdiffusion.models.layers.norms import LayerNorm

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")


@_serializable
class TextEncoder(ArchitectureModel):
    """CLIP's text transformer (Radford et al. 2021), CLIP-L and OpenCLIP-H alike.

    Args:
        architecture: `TextEncoderArchitecture`, or a dictionary of its fields. Default: CLIP-L.
        initialize: bool, `False` if weights are loaded next.
        dtype: Keras dtype policy, or `None` for the global one.
        name: str or `None`.
        gradient_checkpointing: bool, whether training keeps only what goes into each layer, see
            `ArchitectureModel`.

    Call arguments:
        inputs: (batch, tokens) int32, at most `max_length` tokens.
        skip_layers: int, how many of the last layers to leave out ("clip skip").

    Returns:
        Dictionary of `context`, (batch, tokens, width), the normalized states of all tokens, and
        `pooled`, (batch, width or projection_width), that of the first end token.

    Example:

    ```python
    encoder = TextEncoder()
    encoder(tokenizer.rows(["a red circle"]))["context"].shape  # (1, 77, 768)
    ```
    """

    architecture_class = TextEncoderArchitecture

    @staticmethod
    def graph(architecture, options):
        inputs = keras.Input((None,), dtype="int32", name="tokens")
        x = TokenEmbedding(
            architecture.vocabulary_size,
            architecture.max_length,
            architecture.width,
            name="embedding",
            **options,
        )(inputs)
        for index in range(architecture.depth):
            x = EncoderLayer(
                architecture.num_heads,
                architecture.mlp_width,
                architecture.activation,
                architecture.epsilon,
                causal=True,
                name=f"layer_{index}",
                **options,
            )(x)
        x = LayerNorm(epsilon=architecture.epsilon, dtype=options["dtype"], name="final_norm")(x)
        pooled = EndOfText(architecture.end_id, dtype=options["dtype"], name="pooled")(x, inputs)
        if architecture.projection_width:
            pooled = keras.layers.Dense(
                architecture.projection_width, use_bias=False, name="projection", **options
            )(pooled)
        return inputs, {"context": x, "pooled": pooled}

    @staticmethod
    def blocks(architecture):
        return [f"layer_{index}" for index in range(architecture.depth)]

    def call(self, inputs, training=None, mask=None, skip_layers=0):
        if skip_layers == 0:
            return super().call(inputs, training=training, mask=mask)
        if not 0 < skip_layers < self.architecture.depth:
            raise ValueError(
                f"`skip_layers` must be between 0 and {self.architecture.depth - 1}, one less "
                f"than the encoder has layers. Received: skip_layers={skip_layers}"
            )
        outputs = super().call(inputs, training=training, mask=mask)
        x = self.get_layer("embedding")(inputs)
        for index in range(self.architecture.depth - skip_layers):
            x = self.get_layer(f"layer_{index}")(x)
        return {**outputs, "context": self.get_layer("final_norm")(x)}


@_serializable
class TokenEmbedding(Block):
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
    """The state of the first end token, CLIP's vector for the whole text.

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
