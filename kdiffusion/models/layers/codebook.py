"""The codebook of an autoencoder with discrete codes."""

from __future__ import annotations

import keras
from keras import ops

from kdiffusion.models.layers.base import Layer, Uninitialized


@keras.saving.register_keras_serializable(package="kdiffusion")
class Codebook(Layer):
    """Nearest vector of a learned codebook in the place of each (van den Oord et al. 2017, eq. 2).

    The choice has no gradient; `training.trainers.quantizer` trains the vectors. Distances are
    float32 whatever the dtype policy.

    Args:
        size: int, number of vectors.

    Call arguments:
        codes: (batch, height, width, channels).

    Output shape:
        (batch, height, width, channels), vectors of the codebook.
    """

    def __init__(self, size, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.size = size

    def build(self, codes_shape):
        initializer = self.kernel_initializer
        if not isinstance(initializer, Uninitialized):
            # The original implementation's: small, so that every vector is near the first codes.
            initializer = keras.initializers.RandomUniform(-1.0 / self.size, 1.0 / self.size)
        self.embedding = self.add_weight(
            shape=(self.size, codes_shape[-1]),
            initializer=initializer,
            autocast=False,
            name="embedding",
        )

    def nearest(self, codes):
        """Return the indices of the nearest vectors, (batch, height, width) int32."""
        codes, vectors = ops.cast(codes, "float32"), ops.cast(self.embedding, "float32")
        # |c - v|^2 without |c|^2, which is the same for every vector.
        distances = ops.sum(ops.square(vectors), axis=-1) - 2.0 * ops.matmul(
            codes, ops.transpose(vectors)
        )
        return ops.cast(ops.argmin(distances, axis=-1), "int32")

    def vectors(self, indices):
        """Return vectors by their indices, (batch, height, width, channels) float32."""
        return ops.cast(ops.take(self.embedding, indices, axis=0), "float32")

    def call(self, codes):
        return ops.cast(self.vectors(self.nearest(codes)), self.compute_dtype)

    def compute_output_shape(self, codes_shape):
        return codes_shape

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        return {**config, "size": self.size}
