"""The decoder half of the autoencoder: latents to images."""

from __future__ import annotations

import keras
import numpy as np

from kdiffusion.models.architectures import AutoencoderArchitecture
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers.autoencoder import blocks, middle, norm_out, resnet
from kdiffusion.models.layers.base import Conv2D
from kdiffusion.models.layers.codebook import Codebook
from kdiffusion.models.layers.residual import Upsample


@keras.saving.register_keras_serializable(package="kdiffusion")
class ImageDecoder(ArchitectureModel):
    """Latents → image (Rombach et al. 2022, section 3.1).

    Latents come as the U-Net makes them: their scale is undone here, and their codes are looked up
    in the codebook if there is one (van den Oord et al. 2017).

    Args:
        architecture: `AutoencoderArchitecture`, or a dictionary of its fields.
        initialize, dtype, name, gradient_checkpointing: see `ArchitectureModel`.

    Call arguments:
        inputs: (batch, height, width, 4), latents.

    Output shape:
        (batch, 8 * height, 8 * width, 3), about [-1, 1], not clipped.

    Example:

    ```python
    decoder = ImageDecoder()
    decoder(np.zeros((1, 64, 64, 4))).shape  # (1, 512, 512, 3)
    ```
    """

    architecture_class = AutoencoderArchitecture

    @staticmethod
    def graph(architecture, options):
        inputs = keras.Input(
            (None, None, architecture.latent_channels), name="latents", dtype="float32"
        )
        has_codebook = architecture.codebook_size is not None
        x = keras.layers.Rescaling(
            np.divide(1.0, architecture.latent_scale).tolist(),
            architecture.latent_shift,
            name="unscale",
            # Codes are looked up before they are rounded.
            dtype="float32" if has_codebook else options["dtype"],
        )(inputs)
        if has_codebook:
            x = Codebook(architecture.codebook_size, name="codebook", **options)(x)
        if architecture.post_quant_conv:
            x = Conv2D(architecture.latent_channels, 1, name="post_quant_conv", **options)(x)
        x = Conv2D(architecture.channels[-1], 3, name="conv_in", **options)(x)
        x = middle(x, architecture, options)
        levels = architecture.channels[::-1]
        for stage, channels in enumerate(levels):
            for index in range(architecture.layers_per_level + 1):
                x = resnet(x, channels, architecture, options, f"up_{stage}_resnet_{index}")
            if stage < len(levels) - 1:
                x = Upsample(channels, name=f"up_{stage}_upsample", **options)(x)
        x = norm_out(x, architecture, options)
        return inputs, Conv2D(architecture.image_channels, 3, name="conv_out", **options)(x)

    @staticmethod
    def blocks(architecture):
        return blocks("up", architecture)
