"""Dense layer, convolution and the base class of the composite layers.

Layouts: images and feature maps are (batch, height, width, channels), token states are
(batch, tokens, width). Normalizations, softmax and the sinusoid are computed in float32 whatever
the dtype policy, as the original implementations do.
"""

from __future__ import annotations

import keras
from keras import ops

from kdiffusion.models import kernels
from kdiffusion.models.layers.norms import GroupNorm, LayerNorm
from kdiffusion.runtime import backend


@keras.saving.register_keras_serializable(package="kdiffusion")
class Uninitialized(keras.initializers.Initializer):
    """Initializer for a model whose weights are loaded next: memory as it is found."""

    def __call__(self, shape, dtype=None):
        return backend.empty(shape, keras.backend.standardize_dtype(dtype))

    def get_config(self):
        return {}


def unwritten_with(kernel_initializer, usual):
    """Return `usual`, or the kernels' initializer if it leaves them unwritten.

    A model has more of these weights than kernels, and each costs a call to the backend.

    Args:
        kernel_initializer: Keras initializer of the kernels, or its name.
        usual: the initializer of weights that begin with a constant, or its name.
    """
    return kernel_initializer if isinstance(kernel_initializer, Uninitialized) else usual


@keras.saving.register_keras_serializable(package="kdiffusion", name="Linear")
class Dense(keras.layers.Dense):
    """Keras's dense layer in the fastest form, see `kernels.dense`."""

    def call(self, inputs, training=None):
        return self.activation(kernels.dense(inputs, self.kernel, self.bias))


@keras.saving.register_keras_serializable(package="kdiffusion", name="Convolution")
class Conv2D(keras.layers.Conv2D):
    """Keras's convolution in the fastest form, see `kernels.convolve`.

    By default it keeps the size, and is channels-last whatever the global data format is. Groups
    and dilation are not supported.
    """

    def __init__(
        self, filters, kernel_size, *, padding="same", data_format="channels_last", **kwargs
    ):
        bias_initializer = unwritten_with(kwargs.get("kernel_initializer"), "zeros")
        super().__init__(
            filters,
            kernel_size,
            padding=padding,
            data_format=data_format,
            **{"bias_initializer": bias_initializer, **kwargs},
        )

    def convolution_op(self, inputs, kernel):
        # Keras adds the bias.
        return kernels.convolve(inputs, kernel, strides=self.strides, padding=self.padding)


# Weight files name a layer after its class, and the first were written of a `Convolution`.
Conv2D.__name__ = "Convolution"


class Layer(keras.layers.Layer):
    """Base class of the composite layers: children follow the policy and the initializer.

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

    def conv(self, filters, kernel_size, name, **kwargs):
        return Conv2D(filters, kernel_size, name=name, **self._options(), **kwargs)

    def dense(self, units, name, use_bias=True):
        return Dense(
            units,
            use_bias=use_bias,
            bias_initializer=unwritten_with(self.kernel_initializer, "zeros"),
            name=name,
            **self._options(),
        )

    def group_norm(self, num_groups, epsilon, name, activation=None):
        return GroupNorm(num_groups, epsilon, activation, name=name, **self._norm_options())

    def layer_norm(self, name, epsilon=1e-5):
        return LayerNorm(epsilon=epsilon, name=name, **self._norm_options())

    def _options(self):
        return {"kernel_initializer": self.kernel_initializer, "dtype": self.dtype_policy}

    def _norm_options(self):
        return {
            "gamma_initializer": unwritten_with(self.kernel_initializer, "ones"),
            "beta_initializer": unwritten_with(self.kernel_initializer, "zeros"),
            "dtype": self.dtype_policy,
        }

    def get_config(self):
        initializer = keras.initializers.get(self.kernel_initializer)
        initializer = keras.initializers.serialize(initializer)
        return {**super().get_config(), "kernel_initializer": initializer}


def repeat_rows(x, like):
    """Repeat the batch until it has as many rows as another.

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
    """Add two tensors, of which either may have fewer rows, see `repeat_rows`."""
    return repeat_rows(x, y) + repeat_rows(y, x)
