"""The base class of the networks: a functional graph in a `keras.Model`, made from a record."""

from __future__ import annotations

import contextlib

import keras

from kdiffusion import records
from kdiffusion.models.layers.base import Uninitialized


class ArchitectureModel(keras.Model):
    """A Keras model whose whole configuration is one architecture record.

    Subclasses set `architecture_class` and implement `graph`. The model is a functional graph of
    few, large layers, so `summary()`, `.keras` files and `.weights.h5` files work as on any Keras
    model.

    Args:
        architecture: record of `kdiffusion.models.architectures`, a dictionary of its fields, or
            `None` for the record's defaults.
        initialize: bool. `False` leaves the kernels unwritten, which makes building fast when
            weights are loaded next. It is not part of `get_config`.
        dtype: Keras dtype policy, or `None` for the global one.
        name: str or `None`.
        gradient_checkpointing: bool, whether training keeps only the inputs of each of the
            `blocks` and computes the blocks once more for the gradients (Chen et al. 2016): less
            memory, more time, the same numbers. It is not part of `get_config`.
    """

    architecture_class: type

    def __init__(
        self,
        architecture=None,
        *,
        initialize=True,
        dtype=None,
        name=None,
        gradient_checkpointing=False,
    ):
        if architecture is None:
            architecture = self.architecture_class()
        elif isinstance(architecture, dict):
            architecture = self.architecture_class(**architecture)
        elif not isinstance(architecture, self.architecture_class):
            raise ValueError(
                f"`architecture` must be a `{self.architecture_class.__name__}` or a dictionary "
                f"of its fields. Received: {architecture!r}"
            )
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        initializer = "glorot_uniform" if initialize else Uninitialized()
        options = {"kernel_initializer": initializer, "dtype": policy}
        scope = contextlib.nullcontext()
        if gradient_checkpointing:
            blocks = self.blocks(architecture)
            if not blocks:
                raise ValueError(
                    f"{type(self).__name__} has no blocks to checkpoint. "
                    "Received: gradient_checkpointing=True. Use False."
                )
            scope = keras.RematScope("list_of_layers", layer_names=blocks)
        with scope:
            inputs, outputs = self.graph(architecture, options)
        super().__init__(inputs=inputs, outputs=outputs, name=name)
        # A functional model has the global policy whatever its layers have.
        self.dtype_policy = policy
        self.architecture = architecture
        self.gradient_checkpointing = gradient_checkpointing

    @staticmethod
    def graph(architecture, options):
        """Build the network of symbolic tensors.

        Args:
            architecture: the record.
            options: dict, keyword arguments that every layer with kernels takes.

        Returns:
            The `keras.Input`, or a dictionary of several, and the symbolic outputs.
        """
        raise NotImplementedError

    @staticmethod
    def blocks(architecture):
        """Return the names of the layers that gradient checkpointing computes twice.

        Args:
            architecture: the record.

        Returns:
            List of str, empty if the model is not worth it. Names without a layer do no harm.
        """
        return []

    def get_config(self):
        return {
            "architecture": records.fields(self.architecture),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)
