"""Normalization layers, computed in float32 whatever the dtype policy."""

from __future__ import annotations

import keras
from keras import ops

from kdiffusion.models import kernels

_serializable = keras.saving.register_keras_serializable(package="kdiffusion")


@_serializable
class GroupNorm(keras.layers.Layer):
    """Group normalization with an optional activation (Wu & He 2018).

    Args:
        num_groups: int, groups that the channels are split into.
        epsilon: float, added to the variance.
        activation: `None` or `"silu"`.
        gamma_initializer, beta_initializer: Keras initializers of scale and shift.
    """

    def __init__(
        self,
        num_groups=32,
        epsilon=1e-5,
        activation=None,
        gamma_initializer="ones",
        beta_initializer="zeros",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_groups = num_groups
        self.epsilon = epsilon
        self.activation = activation
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.beta_initializer = keras.initializers.get(beta_initializer)

    def build(self, inputs_shape):
        shape = (inputs_shape[-1],)
        self.gamma = self.add_weight(shape, self.gamma_initializer, name="gamma")
        self.beta = self.add_weight(shape, self.beta_initializer, name="beta")

    def call(self, inputs):
        x = ops.cast(inputs, self.compute_dtype)
        return kernels.normalize(x, *self._settings())

    def then(self, convolution, inputs):
        """Compute `convolution(self(inputs))`, fused and strip by strip where that is faster.

        Args:
            convolution: `Conv2D` of stride 1 that keeps the size.
            inputs: (batch, height, width, channels).
        """
        normalizer = kernels.normalizer(inputs, *self._settings())
        return kernels.convolve(inputs, convolution.kernel, convolution.bias, prologue=normalizer)

    def _settings(self):
        gamma, beta = ops.cast(self.gamma, "float32"), ops.cast(self.beta, "float32")
        return self.num_groups, self.epsilon, gamma, beta, self.activation

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        config = {
            "num_groups": self.num_groups,
            "epsilon": self.epsilon,
            "activation": self.activation,
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "beta_initializer": keras.initializers.serialize(self.beta_initializer),
        }
        return {**super().get_config(), **config}


@_serializable
class LayerNorm(keras.layers.LayerNormalization):
    """Keras's layer normalization of the last axis, with scale and shift, in one pass."""

    def call(self, inputs):
        gamma, beta = ops.cast(self.gamma, "float32"), ops.cast(self.beta, "float32")
        x = ops.cast(inputs, self.compute_dtype)
        return kernels.normalize_tokens(x, self.epsilon, gamma, beta)
