"""The denoising U-Net."""

from __future__ import annotations

import keras

from kdiffusion.models.architectures import DiffusionArchitecture
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.layers.attention import SpatialTransformer
from kdiffusion.models.layers.base import Conv2D
from kdiffusion.models.layers.norms import GroupNorm
from kdiffusion.models.layers.residual import (
    Downsample,
    LabelEmbedding,
    ResnetBlock,
    SkipConnection,
    TimeEmbedding,
    Upsample,
)


@keras.saving.register_keras_serializable(package="kdiffusion")
class DiffusionModel(ArchitectureModel):
    """The network that diffusion trains: noisy latents, timestep, text or class → prediction.

    Serves SD 1.x, SD 2.x (epsilon and v) and their 9-channel inpainting variants, unconditional
    and class-conditional models, of latents or of pixels; what the prediction means is the
    schedule's affair. Height and width are free in every call.

    Reference: Rombach et al. 2022, section 3.3 and appendix E.2; the U-Net is that of Dhariwal &
    Nichol 2021 with transformers in place of its attention.

    Args:
        architecture: `DiffusionArchitecture`, or a dictionary of its fields. Default: SD 1.x.
        initialize, dtype, name, gradient_checkpointing: see `ArchitectureModel`.

    Call arguments:
        inputs: dictionary of
            `latents`: (batch, height, width, in_channels), unit order, any height and width;
            `timestep`: (batch,) float32, the training timestep, fractions allowed;
            `context`: (batch, tokens, context_width), text states; only if the architecture has a
            `context_width`;
            `label`: (batch,) int32, the class, `num_classes` for none; only if the architecture
            has `num_classes`.
            `context` or `label` may have n times as many rows as the latents, which are then
            denoised n times; what comes before the first of them is computed once.

    Output shape:
        (batch, height, width, out_channels), or n times as many rows.

    Example:

    ```python
    model = DiffusionModel()
    prediction = model({
        "latents": np.zeros((1, 64, 64, 4)),
        "timestep": np.array([981.0]),
        "context": np.zeros((1, 77, 768)),
    })
    ```
    """

    architecture_class = DiffusionArchitecture

    @staticmethod
    def graph(architecture, options):
        inputs = _inputs(architecture)
        base = architecture.channels[0]
        time = TimeEmbedding(base, 4 * base, name="time_embedding", **options)(inputs["timestep"])
        if "label" in architecture.inputs:
            embedding = LabelEmbedding(architecture.num_classes, name="label_embedding", **options)
            time = embedding(inputs["label"], time)
        unet = _Stages(architecture, options, time, inputs.get("context"))
        x = Conv2D(base, 3, name="conv_in", **options)(inputs["latents"])
        x, skips = unet.down(x)
        x = unet.middle(x)
        x = unet.up(x, skips)
        norm = GroupNorm(
            architecture.num_groups,
            architecture.epsilon,
            "silu",
            dtype=options["dtype"],
            name="norm_out",
        )
        return inputs, Conv2D(architecture.out_channels, 3, name="conv_out", **options)(norm(x))

    @staticmethod
    def blocks(architecture):
        names = ["mid_resnet_0", "mid_transformer", "mid_resnet_1"]
        for level in range(len(architecture.channels)):
            for index in range(architecture.layers_per_level + 1):
                for way in ("down", "up"):
                    names += [f"{way}_{level}_{kind}_{index}" for kind in ("resnet", "transformer")]
        return names


def _inputs(architecture):
    inputs = {
        "latents": keras.Input(
            (None, None, architecture.in_channels), name="latents", dtype="float32"
        ),
        "timestep": keras.Input((), name="timestep", dtype="float32"),
    }
    if "context" in architecture.inputs:
        inputs["context"] = keras.Input(
            (None, architecture.context_width), name="context", dtype="float32"
        )
    if "label" in architecture.inputs:
        inputs["label"] = keras.Input((), name="label", dtype="int32")
    return inputs


class _Stages:
    """The way down, the middle and the way up, which share the time and text inputs."""

    def __init__(self, architecture, options, time, context):
        self.architecture = architecture
        self.options = options
        self.time = time
        self.context = context

    def down(self, x):
        architecture = self.architecture
        skips = [x]
        for level, channels in enumerate(architecture.channels):
            for index in range(architecture.layers_per_level):
                x = self._resnet(x, channels, f"down_{level}_resnet_{index}")
                x = self._transformer(x, level, f"down_{level}_transformer_{index}")
                skips.append(x)
            if level < len(architecture.channels) - 1:
                x = Downsample(channels, name=f"down_{level}_downsample", **self.options)(x)
                skips.append(x)
        return x, skips

    def middle(self, x):
        channels = self.architecture.channels[-1]
        x = self._resnet(x, channels, "mid_resnet_0")
        x = self._attend(x, self.architecture.mid_depth, -1, "mid_transformer")
        return self._resnet(x, channels, "mid_resnet_1")

    def up(self, x, skips):
        architecture = self.architecture
        levels = list(enumerate(architecture.channels))[::-1]
        for stage, (level, channels) in enumerate(levels):
            for index in range(architecture.layers_per_level + 1):
                join = SkipConnection(name=f"up_{stage}_skip_{index}", dtype=x.dtype)
                x = join([x, skips.pop()])
                x = self._resnet(x, channels, f"up_{stage}_resnet_{index}")
                x = self._transformer(x, level, f"up_{stage}_transformer_{index}")
            if level > 0:
                x = Upsample(channels, name=f"up_{stage}_upsample", **self.options)(x, skips[-1])
        return x

    def _resnet(self, x, channels, name):
        block = ResnetBlock(
            channels,
            self.architecture.num_groups,
            self.architecture.epsilon,
            name=name,
            **self.options,
        )
        return block(x, self.time)

    def _transformer(self, x, level, name):
        return self._attend(x, self.architecture.depths[level], level, name)

    def _attend(self, x, depth, level, name):
        if depth == 0:
            return x
        transformer = SpatialTransformer(
            depth,
            self.architecture.num_heads[level],
            self.architecture.num_groups,
            name=name,
            **self.options,
        )
        return transformer(x) if self.context is None else transformer(x, self.context)
