"""Architectures with as few layers as there are kinds, and inputs for them."""

import dataclasses

import keras
import numpy as np
from keras import ops

from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    ImageTowerArchitecture,
    TextEncoderArchitecture,
)

UNET = DiffusionArchitecture(
    channels=(8, 16),
    layers_per_level=1,
    depths=(1, 0),
    num_heads=(2, 4),
    context_width=12,
    num_groups=4,
)
UNCONDITIONAL = dataclasses.replace(UNET, context_width=None)
OF_CLASSES = dataclasses.replace(UNCONDITIONAL, num_classes=5)
AUTOENCODER = AutoencoderArchitecture(channels=(8, 16), layers_per_level=1, num_groups=4)
TEXT = TextEncoderArchitecture(
    vocabulary_size=40, width=12, depth=3, num_heads=2, mlp_width=24, end_id=39
)
TOWER = ImageTowerArchitecture(
    image_size=6, patch_size=3, width=12, depth=2, num_heads=2, mlp_width=24, projection_width=5
)


def unet_inputs(height=6, width=10, batch=2, channels=4):
    generator = np.random.default_rng(0)
    return {
        "latents": generator.normal(size=(batch, height, width, channels)).astype("float32"),
        "timestep": np.linspace(981, 1, batch).astype("float32"),
        "context": generator.normal(size=(batch, 7, 12)).astype("float32"),
    }


def label_inputs(labels=(0, 5)):
    inputs = unet_inputs(batch=len(labels))
    del inputs["context"]
    return {**inputs, "label": np.array(labels, "int32")}


def call(model, inputs):
    return keras.tree.map_structure(ops.convert_to_numpy, model(inputs))


def numbers(*shape, mean=3.0, std=2.0):
    return np.random.default_rng(0).normal(mean, std, shape).astype("float32")
