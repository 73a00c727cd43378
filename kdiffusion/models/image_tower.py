"""CLIP's image tower: pictures to vectors that lie beside those of their captions."""

from __future__ import annotations

import keras
from keras import ops

from kdiffusion.models.architectures import ImageTowerArchitecture
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers.attention import flatten_positions
from kdiffusion.models.layers.base import Block, conv2d
from kdiffusion.models.layers.clip import EncoderLayer

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")


@_serializable
class ImageTower(ArchitectureModel):
    """CLIP's vision transformer (Radford et al. 2021, section 2.4; Dosovitskiy et al. 2021).

    Pictures are normalized inside, so they come as they do to every other network here.

    Args:
        architecture: `ImageTowerArchitecture`, or a dictionary of its fields. Default: CLIP-L.
        initialize: bool, `False` if weights are loaded next.
        dtype: Keras dtype policy, or `None` for the global one.
        name: str or `None`.
        gradient_checkpointing: bool, whether training keeps only what goes into each layer, see
            `ArchitectureModel`.

    Call arguments:
        inputs: (batch, image_size, image_size, 3) in [-1, 1].

    Returns:
        Dictionary of `states`, (batch, tokens, width), the states of the class token and of the
        patches in rows, and `pooled`, (batch, projection_width), the projection of the class
        token's normalized state.

    Example:

    ```python
    tower = ImageTower()
    tower(np.zeros((1, 224, 224, 3)))["pooled"].shape  # (1, 768)
    ```
    """

    architecture_class = ImageTowerArchitecture

    @staticmethod
    def graph(architecture, options):
        side = architecture.image_size
        inputs = keras.Input(
            (side, side, architecture.image_channels), name="images", dtype="float32"
        )
        x = PatchEmbedding(
            architecture.patch_size,
            architecture.width,
            architecture.mean,
            architecture.std,
            name="embedding",
            **options,
        )(inputs)
        x = _norm(architecture, options, "pre_norm")(x)
        for index in range(architecture.depth):
            x = EncoderLayer(
                architecture.num_heads,
                architecture.mlp_width,
                architecture.activation,
                architecture.epsilon,
                name=f"layer_{index}",
                **options,
            )(x)
        pooled = _norm(architecture, options, "post_norm")(x[:, 0])
        pooled = keras.layers.Dense(
            architecture.projection_width, use_bias=False, name="projection", **options
        )(pooled)
        return inputs, {"states": x, "pooled": pooled}

    @staticmethod
    def blocks(architecture):
        return [f"layer_{index}" for index in range(architecture.depth)]


def _norm(architecture, options, name):
    return keras.layers.LayerNormalization(
        epsilon=architecture.epsilon, dtype=options["dtype"], name=name
    )


@_serializable
class PatchEmbedding(Block):
    """Class token and linear projections of the patches in rows, each with its position's vector.

    Args:
        patch_size: int, height and width of a patch.
        width: int.
        mean: sequence of float, subtracted from pictures in [0, 1].
        std: sequence of float, the divisors that follow.
    """

    def __init__(self, patch_size, width, mean, std, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.width = width
        self.mean = tuple(mean)
        self.std = tuple(std)

    def build(self, inputs_shape):
        self.patches = conv2d(
            self.width,
            self.patch_size,
            "patches",
            strides=self.patch_size,
            padding="valid",
            use_bias=False,
            kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
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
        # ((x + 1) / 2 - mean) / std of a picture x in [-1, 1].
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
