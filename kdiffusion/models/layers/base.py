"""The composite layers that the four networks are built of.

Layouts: pictures and feature maps are (batch, height, width, channels), token states are
(batch, tokens, width). Normalizations, softmax and the sinusoid are computed in float32 whatever
the dtype policy, as the original implementations do.
"""

from __future__ import annotations

import math

import keras
from keras import ops

from kdiffusion.models.kernels import normalization, winograd
from kdiffusion.models.layers.norms import GroupNorm, LayerNorm
from kdiffusion.runtime import backend, tracing

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")


@_serializable
class Uninitialized(keras.initializers.Initializer):
    """Initializer for a model whose weights are loaded next: memory as it is found."""

    def __call__(self, shape, dtype=None):
        return backend.empty(shape, keras.backend.standardize_dtype(dtype))

    def get_config(self):
        return {}


def beside(kernel_initializer, usual):
    """The initializer of weights that are usually constant: unwritten where kernels are.

    A model has more of them than kernels, and each costs a call to the backend.
    """
    return kernel_initializer if isinstance(kernel_initializer, Uninitialized) else usual


class Block(keras.layers.Layer):
    """What the composite layers share: children that follow the policy and the initializer.

    Args:
        kernel_initializer: Keras initializer of every kernel inside, or its name. A string or
            `Uninitialized`: one seeded initializer would give equal kernels.
    """

    def __init__(self, *, kernel_initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        self.kernel_initializer = kernel_initializer

    def rematerialized_call(self, layer_call, *args, **kwargs):
        mode = self._remat_mode
        if mode and mode.mode == "list_of_layers" and self.name in mode.layer_names:
            return backend.checkpoint(layer_call, self.variables)
        return super().rematerialized_call(layer_call, *args, **kwargs)

    def conv(self, filters, kernel_size, name, strides=1, padding="same"):
        return conv2d(
            filters,
            kernel_size,
            name,
            strides=strides,
            padding=padding,
            kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
        )

    def dense(self, units, name, use_bias=True):
        return Linear(
            units,
            use_bias=use_bias,
            kernel_initializer=self.kernel_initializer,
            bias_initializer=beside(self.kernel_initializer, "zeros"),
            dtype=self.dtype_policy,
            name=name,
        )

    def group_norm(self, num_groups, epsilon, name, activation=None):
        return GroupNorm(num_groups, epsilon, activation, name=name, **self._norm_options())

    def layer_norm(self, name, epsilon=1e-5):
        return LayerNorm(epsilon=epsilon, name=name, **self._norm_options())

    def _norm_options(self):
        return {
            "gamma_initializer": beside(self.kernel_initializer, "ones"),
            "beta_initializer": beside(self.kernel_initializer, "zeros"),
            "dtype": self.dtype_policy,
        }

    def get_config(self):
        initializer = keras.initializers.get(self.kernel_initializer)
        initializer = keras.initializers.serialize(initializer)
        return {**super().get_config(), "kernel_initializer": initializer}


def conv2d(filters, kernel_size, name, **kwargs):
    """A channels-last convolution, whatever `keras.config.image_data_format()` says."""
    bias_initializer = beside(kwargs.get("kernel_initializer"), "zeros")
    kwargs = {"padding": "same", "bias_initializer": bias_initializer, **kwargs}
    return Convolution(filters, kernel_size, data_format="channels_last", name=name, **kwargs)


def repeat_rows(x, like):
    """The batch again and again, until it has as many rows as another has.

    So what guidance asks of a network twice, once for each text, is computed once until a text
    comes in.

    Args:
        x: tensor (batch, ...).
        like: tensor (n * batch, ...); of any other size it changes nothing.

    Returns:
        Tensor (n * batch, ...).
    """
    rows, wanted = x.shape[0], like.shape[0]
    if None in (rows, wanted) or rows >= wanted or wanted % rows:
        return x
    return ops.concatenate([x] * (wanted // rows))


def add(x, y):
    """The sum of two tensors, of which either may have fewer rows, see `repeat_rows`."""
    return repeat_rows(x, y) + repeat_rows(y, x)


@_serializable
class SkipConnection(keras.layers.Concatenate):
    """Concatenates a feature map and an earlier one, which may have fewer rows."""

    def call(self, inputs):
        x, skip = inputs
        return super().call([x, repeat_rows(skip, x)])


@_serializable
class Linear(keras.layers.Dense):
    """Keras's dense layer, computed as a convolution where that is faster."""

    def call(self, inputs, training=None):
        if self.bias is None or not normalization.is_long(inputs):
            return super().call(inputs, training)
        weights = map(ops.convert_to_tensor, (self.kernel, self.bias))
        return self.activation(normalization.multiply_long(inputs, *weights))


@_serializable
class Convolution(keras.layers.Conv2D):
    """Keras's convolution, computed by matrix products where these are faster."""

    def convolution_op(self, inputs, kernel):
        if (self.kernel_size, self.strides) == ((1, 1), (1, 1)):
            return ops.matmul(inputs, kernel[0, 0])
        same_size = (self.kernel_size, self.strides, self.padding) == ((3, 3), (1, 1), "same")
        square = self.strides[0] == self.strides[1]
        padded = square and (self.kernel_size, self.padding) == ((3, 3), "valid")
        if (same_size or padded) and normalization.is_small(
            self.compute_output_shape(inputs.shape)
        ):
            if same_size:
                inputs = ops.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
            return normalization.convolve_small(inputs, kernel, self.strides[0])
        if same_size and normalization.yields_few(inputs, kernel):
            return normalization.convolve_to_few(inputs, kernel)
        if same_size and winograd.pays(inputs, kernel):
            # Keras adds the bias.
            return winograd.convolve(inputs, kernel, ops.zeros(self.filters, inputs.dtype))
        return super().convolution_op(inputs, kernel)


@_serializable
class TimeEmbedding(Block):
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
class LabelEmbedding(Block):
    """Adds the embedding of a class to that of the timestep (Dhariwal & Nichol 2021, section 6).

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
class ResnetBlock(Block):
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
        x = self.norm1.before(self.conv1, inputs)
        if self.time_proj is not None:
            x = add(x, self.time_proj(ops.silu(time))[:, None, None, :])
        residual = inputs
        if self.shortcut is not None:
            # Between the convolutions the least else is there.
            residual = self.shortcut(tracing.after_computing(inputs, x))
            x = tracing.after_computing(x, residual)
        return add(residual, self.norm2.before(self.conv2, x))

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
class Downsample(Block):
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
class Upsample(Block):
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
        known = None not in inputs.shape and (like is None or _is_double(like, inputs))
        if known and not backend.on_accelerator():
            weights = map(ops.convert_to_tensor, self.convolution.weights)
            return normalization.convolve_doubled(inputs, *weights)
        x = ops.repeat(ops.repeat(inputs, 2, axis=1), 2, axis=2)
        if like is not None:
            height, width = ops.shape(like)[1:3]
            x = x[:, :height, :width, :]
        return self.convolution(x)

    def compute_output_shape(self, inputs_shape, like_shape=None):
        batch, height, width, _ = inputs_shape
        height, width = (None if n is None else 2 * n for n in (height, width))
        if like_shape is not None:
            height, width = like_shape[1:3]
        return (batch, height, width, self.channels)

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


def _is_double(x, half):
    return tuple(x.shape[1:3]) == tuple(2 * side for side in half.shape[1:3])
