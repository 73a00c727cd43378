"""The recipe of `shapes`: its stages and its cache; that it learns is shown by shapes_micro.py."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion.training import scenes_latents, shapes
from kdiffusion.training.scenes import Words
from kdiffusion.training.scenes_data import SceneData
from kdiffusion.training.scenes_latents import CHUNK, SceneLatents
from kdiffusion.training.shapes_report import card

WORDS = Words(("red", "blue"), ("circle", "cross"), ("white", "black"), pairs=0.0)


@pytest.fixture(autouse=True)
def plain_graphs(monkeypatch):
    """Where there are any, because compiling takes longer than all else here."""
    monkeypatch.setattr(scenes_latents.backend, "use_jit", lambda *_: False)


@pytest.fixture(scope="module")
def image_encoder():
    """What an `ImageEncoder` returns, by two layers, which compile soon."""
    pictures = keras.Input((16, 16, 3))
    parts = {name: keras.layers.Conv2D(4, 4, 4)(pictures) for name in ("mean", "logvar")}
    return keras.Model(pictures, parts)


@pytest.fixture(scope="module")
def data():
    return SceneData(seed=3, image_size=16, words=WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def latents(data, image_encoder, folder):
    return SceneLatents(data, image_encoder, folder, 2 * CHUNK)


def test_latents_are_those_of_the_encoder(latents, data, image_encoder):
    batch = latents.batch(5, 16)
    scenes = data.batch(0, 2 * CHUNK)
    moments = image_encoder(ops.convert_to_tensor(scenes["images"][batch["sample"]]))
    for name in ("mean", "logvar"):
        assert batch[name].dtype == np.float32
        np.testing.assert_allclose(
            batch[name], ops.convert_to_numpy(moments[name]), rtol=1e-3, atol=1e-3
        )
    np.testing.assert_array_equal(batch["tokens"], scenes["tokens"][batch["sample"]])
    np.testing.assert_array_equal(batch["index"], np.arange(16))


def test_each_epoch_has_every_scene_in_another_order(latents):
    count = 2 * CHUNK
    epochs = [
        np.concatenate([latents.batch(epoch * 8 + step, count // 8)["sample"] for step in range(8)])
        for epoch in range(2)
    ]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    assert not np.array_equal(*epochs)
    # A batch may reach from one epoch into the next.
    across = latents.batch(1, 300)["sample"]
    np.testing.assert_array_equal(across, np.concatenate(epochs)[300:600])


def test_latents_on_the_disk_are_not_made_again(latents, data, folder):
    again = SceneLatents(data, None, folder, 2 * CHUNK)
    np.testing.assert_array_equal(again.batch(1, 8)["mean"], latents.batch(1, 8)["mean"])


def test_a_count_must_fill_whole_files(data, image_encoder, tmp_path):
    with pytest.raises(ValueError, match=f"multiple of {CHUNK}. Received: 100"):
        SceneLatents(data, image_encoder, tmp_path / "latents", 100)
    assert not (tmp_path / "latents").exists()


def test_a_stage_whose_result_is_there_is_not_done_again(monkeypatch, tmp_path):
    done = []

    def stage(name):
        def make(recipe, folder):
            done.append(name)
            (folder / name).write_text("done")

        return make

    monkeypatch.setattr(shapes, "STAGES", {name: stage(name) for name in ("one", "two", "three")})
    (tmp_path / "two").write_text("from before")
    shapes.run(shapes.MICRO, tmp_path)
    assert done == ["one", "three"]


def test_a_bad_autoencoder_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "_parts", lambda *_: {})
    monkeypatch.setattr(shapes, "reconstruct", lambda pictures: pictures // 2)
    recipe = dataclasses.replace(shapes.MICRO, prompts=8)
    with pytest.raises(ValueError, match="must reach 20.0 dB and 25% right reconstructions"):
        shapes.check_autoencoder(recipe, tmp_path)
    assert (tmp_path / "autoencoder.png").exists() and not (tmp_path / "autoencoder.json").exists()
    monkeypatch.setattr(shapes, "reconstruct", lambda pictures: pictures)
    shapes.check_autoencoder(recipe, tmp_path)
    assert json.loads((tmp_path / "autoencoder.json").read_text())["all"] == 1.0


def test_the_card_tells_what_was_measured():
    numbers = {
        "rows": {"seen, one thing": {"n": 8, "all": 0.25}},
        "shuffled": {"seen, one thing": {"n": 8, "all": 0.125}},
        "binding": {"n": 4, "both": 0.5, "crossed": 0.25},
        "nearest": {"n": 4096, "pictures": 20.0, "new_scenes": 21.0},
    }
    clip = {"text_to_image@1": 0.911, "image_to_text@1": 0.922}
    text = card(
        {"autoencoder": {"psnr": 34.56, "all": 0.991}, "clip": clip}
        | {"guided": numbers, "unguided": numbers}
    )
    for figure in ("34.6 dB", "99.1%", "91.1%", "92.2%", "| 25.0 |", "license: apache-2.0"):
        assert figure in text
