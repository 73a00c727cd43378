"""Residual blocks, the ways between resolutions, and the embeddings of timestep and class."""

from __future__ import annotations

import math

import keras
from keras import ops

from kdiffusion.models import kernels
from kdiffusion.models.layers.base import Layer, add, repeat_rows
from kdiffusion.runtime import tracing

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")


@_serializable
class TimeEmbedding(Layer):
    """Sinusoid of the timestep and its two-layer perceptron (Ho et al. 2020, appendix B).

    Cosines first, then sines, maximal period 10,000, as in the original latent diffusion code.
    The sinusoid is float32 and its input is not autocast: bfloat16 would turn 981 into 980.

    Args:
        frequencies: int, width of the sinusoid.
        width: int, width of the embedding.
    """

    def __init__(self, frequencies, width, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.frequencies = frequencies
        self.width = width

    def build(self, timestep_shape):
        self.linear_1 = self.dense(self.width, "linear_1")
        self.linear_1.build((None, self.frequencies))
        self.linear_2 = self.dense(self.width, "linear_2")
        self.linear_2.build((None, self.width))

    def call(self, timestep):
        half = self.frequencies // 2
        exponents = ops.arange(half, dtype="float32") * (-math.log(10000.0) / half)
        angles = ops.cast(timestep, "float32")[:, None] * ops.exp(exponents)[None, :]
        sinusoid = ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)
        x = self.linear_1(ops.cast(sinusoid, self.compute_dtype))
        return self.linear_2(ops.silu(x))

    def compute_output_shape(self, timestep_shape):
        return (timestep_shape[0], self.width)

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        return {**config, "frequencies": self.frequencies, "width": self.width}


@_serializable
class LabelEmbedding(Layer):
    """Embedding of a class, added to that of the timestep (Dhariwal & Nichol 2021, section 6).

    Args:
        num_classes: int, number of classes; the label `num_classes` stands for no class.
    """

    def __init__(self, num_classes, **kwargs):
        # Labels above 256 have no exact bfloat16.
        super().__init__(autocast=False, **kwargs)
        self.num_classes = num_classes

    def build(self, label_shape, time_shape):
        self.table = self.add_weight(
            shape=(self.num_classes + 1, time_shape[-1]),
            initializer=self.kernel_initializer,
            name="table",
        )

    def call(self, label, time):
        rows = ops.take(ops.convert_to_tensor(self.table), ops.cast(label, "int32"), axis=0)
        return add(time, ops.cast(rows, time.dtype))

    def compute_output_shape(self, label_shape, time_shape):
        return time_shape

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        return {**config, "num_classes": self.num_classes}


@_serializable
class ResnetBlock(Layer):
    """Residual block of two convolutions; with a time embedding in the U-Net, without elsewhere.

    Args:
        channels: int, width of the output.
        num_groups: int, groups of both normalizations.
        epsilon: float, epsilon of both normalizations: 1e-5 in the U-Net, 1e-6 in the autoencoder.
    """

    def __init__(self, channels, num_groups=32, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.num_groups = num_groups
        self.epsilon = epsilon

    def build(self, inputs_shape, time_shape=None):
        output_shape = self.compute_output_shape(inputs_shape)
        self.norm1 = self.group_norm(self.num_groups, self.epsilon, "norm1", "silu")
        self.norm1.build(inputs_shape)
        self.conv1 = self.conv(self.channels, 3, "conv1")
        self.conv1.build(inputs_shape)
        self.time_proj = None
        if time_shape is not None:
            self.time_proj = self.dense(self.channels, "time_proj")
            self.time_proj.build(time_shape)
        self.norm2 = self.group_norm(self.num_groups, self.epsilon, "norm2", "silu")
        self.norm2.build(output_shape)
        self.conv2 = self.conv(self.channels, 3, "conv2")
        self.conv2.build(output_shape)
        self.shortcut = None
        if inputs_shape[-1] != self.channels:
            self.shortcut = self.conv(self.channels, 1, "shortcut")
            self.shortcut.build(inputs_shape)

    @tracing.trace_once
    def call(self, inputs, time=None):
        x = self.norm1.then(self.conv1, inputs)
        if self.time_proj is not None:
            x = add(x, self.time_proj(ops.silu(time))[:, None, None, :])
        residual = inputs
        if self.shortcut is not None:
            # Computed between the convolutions, where memory use is lowest.
            residual = self.shortcut(tracing.after_computing(inputs, x))
            x = tracing.after_computing(x, residual)
        return add(residual, self.norm2.then(self.conv2, x))

    def compute_output_shape(self, inputs_shape, time_shape=None):
        return (*inputs_shape[:-1], self.channels)

    def get_config(self):
        config = {
            "channels": self.channels,
            "num_groups": self.num_groups,
            "epsilon": self.epsilon,
        }
        return {**super().get_config(), **config}


@_serializable
class Downsample(Layer):
    """Convolution of stride 2 that halves height and width.

    Args:
        channels: int, width of the output.
        symmetric: bool. `True` pads every side by one (U-Net); `False` pads right and bottom only
            (autoencoder; the original implementation pads asymmetrically).
    """

    def __init__(self, channels, symmetric=True, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.symmetric = symmetric

    def build(self, inputs_shape):
        self.convolution = self.conv(self.channels, 3, "conv", strides=2, padding="valid")
        self.convolution.build(inputs_shape)

    def call(self, inputs):
        sides = (1, 1) if self.symmetric else (0, 1)
        return self.convolution(ops.pad(inputs, ((0, 0), sides, sides, (0, 0))))

    def compute_output_shape(self, inputs_shape):
        batch, height, width, _ = inputs_shape
        rounding = 1 if self.symmetric else 0
        height, width = (None if n is None else (n + rounding) // 2 for n in (height, width))
        return (batch, height, width, self.channels)

    def get_config(self):
        return {**super().get_config(), "channels": self.channels, "symmetric": self.symmetric}


@_serializable
class Upsample(Layer):
    """Nearest-neighbour doubling and a convolution.

    With a second input the result is cropped to that feature map's height and width, so latents
    need not be multiples of the U-Net's total factor: an odd side was rounded up on the way down.

    Args:
        channels: int, width of the output.
    """

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels

    def build(self, inputs_shape, like_shape=None):
        self.convolution = self.conv(self.channels, 3, "conv")
        self.convolution.build(inputs_shape)

    def call(self, inputs, like=None):
        kernel, bias = self.convolution.kernel, self.convolution.bias
        return kernels.convolve_doubled(inputs, kernel, bias, like)

    def compute_output_shape(self, inputs_shape, like_shape=None):
        batch, height, width, _ = inputs_shape
        height, width = (None if n is None else 2 * n for n in (height, width))
        if like_shape is not None:
            height, width = like_shape[1:3]
        return (batch, height, width, self.channels)

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


@_serializable
class SkipConnection(keras.layers.Concatenate):
    """Concatenation of a feature map and an earlier one, which may have fewer rows."""

    def call(self, inputs):
        x, skip = inputs
        return super().call([x, repeat_rows(skip, x)])
