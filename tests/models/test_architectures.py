"""Records of architectures: what they refuse."""

import dataclasses

import pytest
from tiny_networks import AUTOENCODER, TEXT, TOWER, UNET

from kdiffusion.models.diffusion_model import DiffusionModel


@pytest.mark.parametrize(
    "record, changes, message",
    [
        (UNET, {"num_heads": (3, 4)}, "num_heads"),
        (UNET, {"depths": (1,)}, "depths"),
        (UNET, {"num_groups": 5}, "num_groups"),
        (UNET, {"num_classes": 0}, "num_classes=0"),
        (UNET, {"context_width": 0}, "context_width=0"),
        (AUTOENCODER, {"num_groups": 3}, "num_groups"),
        (TEXT, {"num_heads": 5}, "num_heads"),
        (TEXT, {"activation": "relu"}, "relu"),
    ],
)
def test_records_refuse_what_cannot_be_built(record, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(record, **changes)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"patch_size": 4}, "image_size=6, patch_size=4"),
        ({"num_heads": 5}, "width=12, num_heads=5"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"mean": (0.5,)}, "each of the 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, "must be positive"),
    ],
)
def test_image_towers_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TOWER, **wrong)


def test_a_record_of_another_model_is_refused():
    with pytest.raises(ValueError, match="DiffusionArchitecture"):
        DiffusionModel(AUTOENCODER)
