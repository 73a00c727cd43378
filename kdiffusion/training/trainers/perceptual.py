"""LPIPS: the perceptual distance of two images, by the features of VGG16."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiffusion import records
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers.base import Conv2D
from kdiffusion.weights import variables

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")

# These are the mean and deviation of ImageNet's images in [-1, 1], as the original rounds them.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10
# VGG16 halves an image four times.
SMALLEST_SIDE = 16
# A position whose features are all zero has a gradient by this; its square root is far below
# epsilon.
_SMALLEST = 1e-30


@dataclass(frozen=True)
class PerceptualArchitecture:
    """VGG16's convolutions (Simonyan & Zisserman 2015, table 1, D).

    Args:
        image_channels: int, channels of an image.
        channels: tuple of int, width of each level, finest first.
        layers_per_level: tuple of int, convolutions at each level.
    """

    image_channels: int = 3
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    layers_per_level: tuple[int, ...] = (2, 2, 3, 3, 3)

    def __post_init__(self):
        for name in ("channels", "layers_per_level"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.channels) != len(self.layers_per_level):
            raise ValueError(
                "`layers_per_level` needs one value for each level of `channels`. Received: "
                f"channels={self.channels}, layers_per_level={self.layers_per_level}"
            )


@_serializable
class Features(ArchitectureModel):
    """The last activations of each level of VGG16 for images in [-1, 1], finest first."""

    architecture_class = PerceptualArchitecture

    @staticmethod
    def graph(architecture, options):
        inputs = keras.Input(
            (None, None, architecture.image_channels), name="images", dtype="float32"
        )
        x = keras.layers.Rescaling(
            np.divide(1.0, _SCALE).tolist(),
            np.negative(np.divide(_SHIFT, _SCALE)).tolist(),
            name="standardize",
            dtype=options["dtype"],
        )(inputs)
        outputs = []
        for level, width in enumerate(architecture.channels):
            if level:
                x = keras.layers.MaxPooling2D(
                    2, data_format="channels_last", name=f"pool_{level}", dtype=options["dtype"]
                )(x)
            for index in range(architecture.layers_per_level[level]):
                name = f"conv_{level}_{index}"
                x = Conv2D(width, 3, name=name, activation="relu", **options)(x)
            outputs.append(x)
        return inputs, outputs


@_serializable
class Perceptual(keras.Model):
    """The distance of two images in VGG16's features (Zhang et al. 2018, eq. 1).

    `from_checkpoints` reads the public weights. Without them the convolutions are random and
    every feature counts the same. No trainer changes its weights.

    Args:
        architecture: `PerceptualArchitecture`, or a dictionary of its fields.
        initialize: bool, `False` if weights are loaded next.
        dtype: Keras dtype policy, or `None` for the global one.
        name: str or `None`.

    Call arguments:
        first: (batch, height, width, 3) in [-1, 1], sides of `SMALLEST_SIDE` pixels at least.
        second: tensor like `first`.

    Output shape:
        (batch,) float32, 0 for equal images.

    Example:

    ```python
    perceptual = Perceptual.from_checkpoints("vgg16-397923af.pth", "vgg.pth")
    trainer = AutoencoderTrainer(encoder, decoder, perceptual=perceptual)
    ```
    """

    def __init__(self, architecture=None, *, initialize=True, dtype=None, name=None):
        super().__init__(dtype=dtype, name=name)
        self.features = Features(architecture, initialize=initialize, dtype=dtype)
        self.linear = []
        for level, width in enumerate(self.features.architecture.channels):
            layer = keras.layers.Dense(
                1,
                use_bias=False,
                kernel_initializer="ones",
                dtype="float32",
                name=f"linear_{level}",
            )
            layer.build((None, None, None, width))
            self.linear.append(layer)
        self.trainable = False
        self.built = True

    @classmethod
    def from_checkpoints(
        cls,
        vgg16: str | os.PathLike,
        linear: str | os.PathLike,
        architecture: PerceptualArchitecture | None = None,
        dtype: Any = None,
    ) -> Perceptual:
        """Make a perceptual network with the public weights.

        Args:
            vgg16: path of torchvision's `vgg16-397923af.pth`, or of a safetensors file of the same
                names.
            linear: path of `vgg.pth` of richzhang/PerceptualSimilarity, version 0.1.
            architecture: `PerceptualArchitecture` of the files; `None` for the public ones'.
            dtype: Keras dtype policy, or `None` for the global one.

        Raises:
            ValueError: If a file is not this, or cannot be read.
        """
        from weights_conversion import open_checkpoint
        from weights_conversion import perceptual as names
        from weights_conversion import read

        model = cls(architecture, initialize=False, dtype=dtype)
        fields = records.fields(model.features.architecture)
        arrays = [
            *read(
                names.convolutions(fields),
                open_checkpoint(vgg16),
                "diffusers",
                beside=names.classifier(),
            ),
            *read(names.linear(fields), open_checkpoint(linear), "diffusers"),
        ]
        variables.assign(model, arrays)
        return model

    def call(self, first, second):
        distance = 0.0
        for linear, a, b in zip(self.linear, self.features(first), self.features(second)):
            difference = linear(ops.square(_normalized(a) - _normalized(b)))
            distance = distance + ops.mean(difference, axis=(1, 2, 3))
        return distance

    def get_config(self):
        return {
            "architecture": records.fields(self.features.architecture),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
        }


def _normalized(features):
    """Scale features to length 1 at each position."""
    x = ops.cast(features, "float32")
    square = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return x / (ops.sqrt(ops.maximum(square, _SMALLEST)) + _EPSILON)
