"""CLIP's text encoder and image tower."""

import dataclasses

import numpy as np
import pytest
from keras import ops
from tiny_networks import TEXT, TOWER, call

from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder


def test_pooled_is_the_state_of_the_first_end_token():
    outputs = call(TextEncoder(TEXT), np.array([[38, 5, 39, 39], [38, 39, 5, 39]], "int32"))
    np.testing.assert_array_equal(outputs["pooled"][0], outputs["context"][0, 2])
    np.testing.assert_array_equal(outputs["pooled"][1], outputs["context"][1, 1])


def test_a_token_does_not_see_those_after_it():
    encoder = TextEncoder(TEXT)
    first = call(encoder, np.array([[38, 5, 6, 39]], "int32"))["context"]
    second = call(encoder, np.array([[38, 5, 7, 9]], "int32"))["context"]
    np.testing.assert_allclose(first[:, :2], second[:, :2], atol=1e-6)
    assert np.abs(first[:, 2:] - second[:, 2:]).min(axis=-1).max() > 1e-4


def test_skipping_layers_equals_a_shallower_encoder():
    encoder = TextEncoder(TEXT)
    shallow = TextEncoder(dataclasses.replace(TEXT, depth=2))
    values = {v.path: v for v in encoder.variables}
    for variable in shallow.variables:
        variable.assign(values[variable.path])
    tokens = np.array([[38, 1, 2, 39]], "int32")
    skipped = ops.convert_to_numpy(encoder(tokens, skip_layers=1)["context"])
    np.testing.assert_allclose(skipped, call(shallow, tokens)["context"], atol=1e-6)
    with pytest.raises(ValueError, match="skip_layers=3"):
        encoder(tokens, skip_layers=3)


def test_projection_width_adds_a_projection():
    encoder = TextEncoder(dataclasses.replace(TEXT, projection_width=5))
    assert call(encoder, np.array([[38, 39]], "int32"))["pooled"].shape == (1, 5)


def test_the_image_tower_normalizes_images():
    plain, own = (
        ImageTower(dataclasses.replace(TOWER, mean=(mean,) * 3, std=(std,) * 3))
        for mean, std in ((0.5, 0.5), (0.25, 2.0))
    )
    own.set_weights(plain.get_weights())
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 6, 6, 3)).astype("float32")
    by_hand = ((picture + 1) / 2 - 0.25) / 2
    np.testing.assert_allclose(
        call(own, picture)["pooled"], call(plain, by_hand)["pooled"], atol=1e-5
    )


def test_the_image_tower_sees_every_patch_and_where_it_is():
    tower = ImageTower(TOWER)
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 6, 6, 3)).astype("float32")
    before = call(tower, picture)
    assert before["states"].shape == (1, 5, 12) and before["pooled"].shape == (1, 5)
    # Left and right patches exchanged; the last row blackened.
    for changed in (np.roll(picture, 3, axis=2), picture * (np.arange(6) < 5)[:, None, None]):
        assert np.abs(call(tower, changed)["pooled"] - before["pooled"]).max() > 1e-4
    first = tower.get_layer("post_norm")(before["states"][:, 0])
    pooled = ops.convert_to_numpy(tower.get_layer("projection")(first))
    np.testing.assert_allclose(pooled, before["pooled"], atol=1e-6)
