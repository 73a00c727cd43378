"""The text encoder: token ids to the states that the U-Net attends to."""

from __future__ import annotations

import keras

from kdiffusion.models.architectures import TextEncoderArchitecture
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers.clip import EncoderLayer, EndOfText, TokenEmbedding
from kdiffusion.models.layers.norms import LayerNorm


@keras.saving.register_keras_serializable(package="kdiffusion")
class TextEncoder(ArchitectureModel):
    """CLIP's text transformer (Radford et al. 2021), CLIP-L and OpenCLIP-H alike.

    Args:
        architecture: `TextEncoderArchitecture`, or a dictionary of its fields. Default: CLIP-L.
        initialize, dtype, name, gradient_checkpointing: see `ArchitectureModel`.

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
