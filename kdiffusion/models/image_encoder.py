"""The encoder half of the autoencoder: pictures to the distribution of their latents."""

from __future__ import annotations

import math

import keras
from keras import ops

from kdiffusion.models.autoencoder_stages import middle, norm_out, resnet
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers import Downsample, conv2d
from kdiffusion.presets import AutoencoderArchitecture


@keras.saving.register_keras_serializable(package="kdiffusion")
class ImageEncoder(ArchitectureModel):
    """Picture → mean and log-variance of its latents (Kingma & Welling 2014).

    The latents are scaled as the U-Net wants them; nobody else multiplies by the latent scale.

    Args:
        architecture: `AutoencoderArchitecture`, or a dictionary of its fields.
        initialize: bool, `False` if weights are loaded next.
        dtype: Keras dtype policy, or `None` for the global one.
        name: str or `None`.

    Call arguments:
        inputs: (batch, height, width, 3) in [-1, 1]; height and width are multiples of the
            downsampling factor.

    Returns:
        Dictionary of `mean` and `logvar`, float32, (batch, height / 8, width / 8, 4).

    Example:

    ```python
    encoder = ImageEncoder()
    distribution = encoder(np.zeros((1, 512, 512, 3)))
    distribution["mean"].shape  # (1, 64, 64, 4)
    ```
    """

    architecture_class = AutoencoderArchitecture

    @staticmethod
    def graph(architecture, options):
        inputs = keras.Input(
            (None, None, architecture.image_channels), name="images", dtype="float32"
        )
        x = conv2d(architecture.channels[0], 3, "conv_in", **options)(inputs)
        for level, channels in enumerate(architecture.channels):
            for index in range(architecture.layers_per_level):
                x = resnet(x, channels, architecture, options, f"down_{level}_resnet_{index}")
            if level < len(architecture.channels) - 1:
                x = Downsample(
                    channels, symmetric=False, name=f"down_{level}_downsample", **options
                )(x)
        x = norm_out(middle(x, architecture, options), architecture, options)
        moments = 2 * architecture.latent_channels
        x = conv2d(moments, 3, "conv_out", **options)(x)
        if architecture.quant_conv:
            x = conv2d(moments, 1, "quant_conv", **options)(x)
        return inputs, LatentDistribution(
            architecture.latent_scale, architecture.latent_shift, name="distribution"
        )(x)


@keras.saving.register_keras_serializable(package="kdiffusion")
class LatentDistribution(keras.layers.Layer):
    """Splits the encoder's moments and scales them: latents = (code - shift) * scale.

    Args:
        scale: float, the latent scale.
        shift: float, the latent shift.
    """

    def __init__(self, scale, shift=0.0, **kwargs):
        super().__init__(dtype="float32", **{k: v for k, v in kwargs.items() if k != "dtype"})
        self.scale = scale
        self.shift = shift

    def call(self, inputs):
        mean, logvar = ops.split(inputs, 2, axis=-1)
        # The bounds are the original implementation's; they act before the scaling.
        logvar = ops.clip(logvar, -30.0, 20.0)
        return {
            "mean": (mean - self.shift) * self.scale,
            "logvar": logvar + 2.0 * math.log(self.scale),
        }

    def compute_output_spec(self, inputs):
        shape = (*inputs.shape[:-1], inputs.shape[-1] // 2)
        return {name: keras.KerasTensor(shape, dtype="float32") for name in ("mean", "logvar")}

    def get_config(self):
        return {**super().get_config(), "scale": self.scale, "shift": self.shift}
