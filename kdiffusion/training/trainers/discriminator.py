"""The discriminator that makes an autoencoder's images sharp, and its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers.base import Conv2D, Uninitialized
from kdiffusion.runtime import backend

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")

# These bound the adaptive weight and keep its quotient finite; both are the original code's.
_MAX_WEIGHT = 1e4
_SMALL_NORM = 1e-4


@dataclass(frozen=True)
class DiscriminatorArchitecture:
    """A PatchGAN (Isola et al. 2017, section 3.2.2 and appendix 6.1.2).

    Args:
        image_channels: int, channels of an image.
        channels: int, width of the first convolution; the following double it, up to 8 times.
        depth: int, convolutions of stride 2; 3 give each logit a patch of 70 x 70 pixels.
    """

    image_channels: int = 3
    channels: int = 64
    depth: int = 3

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more. Received: {name}={value!r}")

    @property
    def smallest_side(self) -> int:
        """The smallest height or width of an image, in pixels, that has a logit."""
        return 3 * 2**self.depth


@_serializable
class Discriminator(ArchitectureModel):
    """A classifier of real images and reconstructions, patch by patch (Isola et al. 2017).

    Batch normalization takes the statistics of its batch and keeps none.

    Args:
        architecture: `DiscriminatorArchitecture`, or a dictionary of its fields.
        initialize: bool, `False` if weights are loaded next.
        dtype: Keras dtype policy, or `None` for the global one.
        name: str or `None`.

    Call arguments:
        inputs: (batch, height, width, 3) in [-1, 1].

    Output shape:
        (batch, about height / 8 - 2, about width / 8 - 2, 1), logits: positive is real.

    Example:

    ```python
    discriminator = Discriminator()
    discriminator(np.zeros((1, 256, 256, 3))).shape  # (1, 30, 30, 1)
    ```
    """

    architecture_class = DiscriminatorArchitecture

    @staticmethod
    def graph(architecture, options):
        inputs = keras.Input(
            (None, None, architecture.image_channels), name="images", dtype="float32"
        )
        x = _conv(inputs, architecture.channels, 2, "conv_in", options)
        x = _leaky_relu(x, "activation_in", options)
        for level in range(1, architecture.depth + 1):
            width = architecture.channels * min(2**level, 8)
            strides = 2 if level < architecture.depth else 1
            x = _conv(x, width, strides, f"conv_{level}", options, use_bias=False)
            x = BatchNorm(name=f"norm_{level}", dtype=options["dtype"])(x)
            x = _leaky_relu(x, f"activation_{level}", options)
        return inputs, _conv(x, 1, 1, "conv_out", options)


def _conv(x, filters, strides, name, options, use_bias=True):
    initializer = options["kernel_initializer"]
    if not isinstance(initializer, Uninitialized):
        initializer = keras.initializers.RandomNormal(stddev=0.02)
    pad = keras.layers.ZeroPadding2D(
        1, data_format="channels_last", name=f"{name}_pad", dtype=options["dtype"]
    )
    convolution = Conv2D(
        filters,
        4,
        name=name,
        strides=strides,
        padding="valid",
        use_bias=use_bias,
        kernel_initializer=initializer,
        dtype=options["dtype"],
    )
    return convolution(pad(x))


def _leaky_relu(x, name, options):
    return keras.layers.LeakyReLU(0.2, name=name, dtype=options["dtype"])(x)


@_serializable
class BatchNorm(keras.layers.Layer):
    """Batch normalization by the statistics of the batch at hand (Ioffe & Szegedy 2015, alg. 1).

    Args:
        epsilon: float, added to the variance. Default: PyTorch's, as the original's.
    """

    def __init__(self, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, inputs_shape):
        channels = inputs_shape[-1]
        around_one = keras.initializers.RandomNormal(mean=1.0, stddev=0.02)
        self.gamma = self.add_weight(shape=(channels,), initializer=around_one, name="gamma")
        self.beta = self.add_weight(shape=(channels,), initializer="zeros", name="beta")

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        x = x - ops.mean(x, axis=(0, 1, 2))
        variance = ops.mean(ops.square(x), axis=(0, 1, 2))
        x = x * (ops.cast(self.gamma, "float32") * ops.rsqrt(variance + self.epsilon))
        return ops.cast(x + ops.cast(self.beta, "float32"), self.compute_dtype)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


def hinge_loss(real: Any, fake: Any) -> Any:
    """Compute the discriminator's loss (Lim & Ye 2017, eq. 4), halved as in the original code.

    Args:
        real: (batch, height, width, 1) float32, logits of images.
        fake: tensor like `real`, logits of reconstructions.

    Returns:
        (batch,) float32.
    """
    return 0.5 * (_mean(ops.relu(1.0 - real)) + _mean(ops.relu(1.0 + fake)))


def generator_loss(fake: Any) -> Any:
    """Compute the autoencoder's adversarial loss (Lim & Ye 2017, eq. 4).

    Args:
        fake: (batch, height, width, 1) float32, logits of reconstructions.

    Returns:
        (batch,) float32.
    """
    return -_mean(fake)


def adaptive_weight(
    reconstruction: Callable[[Any], Any], generator: Callable[[Any], Any], kernel: Any
) -> Any:
    """Compute the weight that makes both losses move the last layer equally.

    These are the losses of reconstruction and of the generator (Esser et al. 2021, eq. 7). The
    small number and the bound are the original code's.

    Args:
        reconstruction: function of the last layer's kernel to the mean loss of reconstruction.
        generator: function of the same to the mean of `generator_loss`.
        kernel: tensor, the kernel's value.

    Returns:
        Scalar float32, without a gradient.
    """
    _, wanted = backend.value_and_gradient(reconstruction, kernel)
    _, given = backend.value_and_gradient(generator, kernel)
    weight = _norm(wanted) / (_norm(given) + _SMALL_NORM)
    return ops.stop_gradient(ops.clip(weight, 0.0, _MAX_WEIGHT))


def _mean(logits):
    return ops.mean(ops.cast(logits, "float32"), axis=(1, 2, 3))


def _norm(gradient):
    return ops.sqrt(ops.sum(ops.square(ops.cast(gradient, "float32"))))
