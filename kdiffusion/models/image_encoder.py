"""The encoder half of the autoencoder: images to the distribution of their latents."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kdiffusion.models.architectures import AutoencoderArchitecture
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers.autoencoder import blocks, middle, norm_out, resnet
from kdiffusion.models.layers.base import Conv2D
from kdiffusion.models.layers.residual import Downsample

# The log-variance of codes that have none: exp(-100) changes no float32.
_POINT = -200.0


@keras.saving.register_keras_serializable(package="kdiffusion")
class ImageEncoder(ArchitectureModel):
    """Image → mean and log-variance of its latents (Kingma & Welling 2014).

    The latents are scaled here, as the U-Net expects them, and nowhere else.

    Args:
        architecture: `AutoencoderArchitecture`, or a dictionary of its fields.
        initialize, dtype, name, gradient_checkpointing: see `ArchitectureModel`.

    Call arguments:
        inputs: (batch, height, width, 3) in [-1, 1]; height and width are multiples of the
            downsampling factor.

    Returns:
        Dictionary of `mean` and `logvar`, float32, (batch, height / 8, width / 8, 4). With a
        codebook, `mean` is the code before the lookup, and `logvar` so small that every sample
        equals the mean.

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
        x = Conv2D(architecture.channels[0], 3, name="conv_in", **options)(inputs)
        for level, channels in enumerate(architecture.channels):
            for index in range(architecture.layers_per_level):
                x = resnet(x, channels, architecture, options, f"down_{level}_resnet_{index}")
            if level < len(architecture.channels) - 1:
                x = Downsample(
                    channels, symmetric=False, name=f"down_{level}_downsample", **options
                )(x)
        x = norm_out(middle(x, architecture, options), architecture, options)
        has_variance = architecture.codebook_size is None
        moments = architecture.latent_channels * (2 if has_variance else 1)
        x = Conv2D(moments, 3, name="conv_out", **options)(x)
        if architecture.quant_conv:
            x = Conv2D(moments, 1, name="quant_conv", **options)(x)
        return inputs, LatentDistribution(
            architecture.latent_scale, architecture.latent_shift, has_variance, name="distribution"
        )(x)

    @staticmethod
    def blocks(architecture):
        return blocks("down", architecture)


@keras.saving.register_keras_serializable(package="kdiffusion")
class LatentDistribution(keras.layers.Layer):
    """The encoder's moments, split and scaled: latents = (code - shift) * scale.

    Args:
        scale: float, the latent scale; or a sequence of one for each channel.
        shift: float or such a sequence, the latent shift.
        has_variance: bool, whether the inputs hold means and log-variances, or means only.
    """

    def __init__(self, scale, shift=0.0, has_variance=True, **kwargs):
        super().__init__(dtype="float32", **{k: v for k, v in kwargs.items() if k != "dtype"})
        self.scale = scale
        self.shift = shift
        self.has_variance = has_variance

    def call(self, inputs):
        shift, scale = np.float32(self.shift), np.float32(self.scale)
        if not self.has_variance:
            mean = (inputs - shift) * scale
            return {"mean": mean, "logvar": ops.full_like(mean, _POINT)}
        mean, logvar = ops.split(inputs, 2, axis=-1)
        # The bounds are the original implementation's; they act before the scaling.
        logvar = ops.clip(logvar, -30.0, 20.0)
        return {
            "mean": (mean - shift) * scale,
            "logvar": logvar + np.float32(2.0 * np.log(self.scale)),
        }

    def compute_output_spec(self, inputs):
        channels = inputs.shape[-1] // 2 if self.has_variance else inputs.shape[-1]
        shape = (*inputs.shape[:-1], channels)
        return {name: keras.KerasTensor(shape, dtype="float32") for name in ("mean", "logvar")}

    def get_config(self):
        config = {"scale": self.scale, "shift": self.shift, "has_variance": self.has_variance}
        return {**super().get_config(), **config}
