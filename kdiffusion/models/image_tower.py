"""CLIP's image tower: images to vectors that lie beside those of their captions."""

from __future__ import annotations

import keras

from kdiffusion.models.architectures import ImageTowerArchitecture
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers.clip import EncoderLayer, PatchEmbedding


@keras.saving.register_keras_serializable(package="kdiffusion")
class ImageTower(ArchitectureModel):
    """CLIP's vision transformer (Radford et al. 2021, section 2.4; Dosovitskiy et al. 2021).

    Images are normalized inside, so they come as they do to every other network here.

    Args:
        architecture: `ImageTowerArchitecture`, or a dictionary of its fields. Default: CLIP-L.
        initialize, dtype, name, gradient_checkpointing: see `ArchitectureModel`.

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
