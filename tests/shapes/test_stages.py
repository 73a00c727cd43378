"""The stages of `shapes` and their data; shapes_micro.py shows that it learns."""

import dataclasses
import json

import numpy as np
import pytest

from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.shapes import stages
from kdiffusion.shapes.data import SceneData, SceneSource
from kdiffusion.shapes.recipe import MICRO
from kdiffusion.shapes.report import card, gallery, plot_stages
from kdiffusion.shapes.scenes import Words, render
from kdiffusion.training.data.batches import Data
from kdiffusion.training.loop.report import read_log

BINDING = {"n": 4, "both": 0.5, "crossed": 0.25}
NEAREST = {"n": 4096, "pictures": 20.0, "new_scenes": 21.0}
WORDS = Words(("red", "blue"), ("circle", "cross"), ("white", "black"), pairs=0.0)


def test_a_source_has_the_scenes_of_training_as_samples():
    data = SceneData(seed=3, image_size=16, words=WORDS)
    source, scenes = SceneSource(data, 40), data.scenes(0, 40)
    assert [sample["caption"] for sample in source] == [scene.caption for scene in scenes]
    np.testing.assert_array_equal([sample["image"] for sample in source], render(scenes, 16))
    with pytest.raises(IndexError):
        source[40]


def test_batches_of_a_source_are_pictures_as_training_sees_them():
    data = SceneData(seed=3, image_size=16, words=WORDS)
    batch = Data(SceneSource(data, 40), Preprocessing(16, 16), data.tokenizer).batch(1, 8)
    every = data.batch(0, 40)
    np.testing.assert_array_equal(batch["tokens"], every["tokens"][batch["sample"]])
    np.testing.assert_allclose(batch["images"], every["images"][batch["sample"]], atol=1e-6)


def test_a_stage_whose_result_is_there_is_not_done_again(monkeypatch, tmp_path):
    done = []

    def stage(name):
        def make(recipe, folder):
            done.append(name)
            (folder / name).write_text("done")

        return make

    monkeypatch.setattr(stages, "STAGES", {name: stage(name) for name in ("one", "two", "three")})
    (tmp_path / "two").write_text("from before")
    stages.run(MICRO, tmp_path)
    assert done == ["one", "three"]


def test_a_folder_of_another_recipe_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "STAGES", {})
    for _ in range(2):
        stages.run(MICRO, tmp_path)
    with pytest.raises(ValueError, match="recipe.json that differs"):
        stages.run(dataclasses.replace(MICRO, seed=1), tmp_path)


def test_a_bad_clip_stops_the_run(monkeypatch, tmp_path):
    figures = {"text_to_image@1": 0.95, "image_to_text@1": 0.5}
    monkeypatch.setattr(stages, "_train", lambda *_: None)
    monkeypatch.setattr(stages, "measure_clip", lambda *_: figures)
    recipe = dataclasses.replace(MICRO, min_retrieval=0.9)
    with pytest.raises(ValueError, match="must find 90% of held-out .* Received: 50.0%"):
        stages.train_clip(recipe, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_of_the_model_as_it_is_shipped(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    numbers = {"rows": {}, "shuffled": {}, "binding": BINDING, "nearest": NEAREST}
    generated, retrieval = [], {"text_to_image@1": 0.9, "image_to_text@1": 0.8}

    def generate(model, prompts, **settings):
        generated.append((model, settings))
        return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    def evaluate(generate, *settings):
        generate(["a red circle"])
        assert settings == (16, 0, 2048)
        return numbers

    monkeypatch.setattr(stages, "generate", generate)
    monkeypatch.setattr(stages, "evaluate", evaluate)
    monkeypatch.setattr(stages, "measure_clip", lambda clip, *_: retrieval | {"of": clip})
    monkeypatch.setattr(stages, "_parts", lambda folder, *_: {"folder": folder.name})
    monkeypatch.setattr(stages, "reconstruct", lambda folder, images: images)
    monkeypatch.setattr(stages.StableDiffusion, "from_preset", lambda folder: folder.name)
    monkeypatch.setattr(stages.CLIPTrainer, "from_folder", lambda folder, _: folder.name)
    recipe = dataclasses.replace(MICRO, reported=True)
    stages.report(recipe, tmp_path)
    unguided = {"unconditional_guidance_scale": 1.0}
    assert generated == [("model", settings) for settings in ({}, {}, unguided)]
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["guided"] == manifest["unguided"] == numbers
    assert manifest["clip"]["of"] == "clip" and manifest["autoencoder"]["all"] == 1.0
    assert manifest["recipe"]["prompts"] == 16 and "keras" in manifest["versions"]
    assert "90.0% of 8 held-out captions" in (tmp_path / "model" / "README.md").read_text()
    assert (tmp_path / "gallery.png").exists()


def test_a_bad_autoencoder_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "_parts", lambda *_: {})
    monkeypatch.setattr(stages, "reconstruct", lambda images: images // 2)
    recipe = dataclasses.replace(MICRO, prompts=8)
    with pytest.raises(ValueError, match="must reach 20.0 dB and 25% right reconstructions"):
        stages.check_autoencoder(recipe, tmp_path)
    assert (tmp_path / "autoencoder.png").exists() and not (tmp_path / "autoencoder.json").exists()
    monkeypatch.setattr(stages, "reconstruct", lambda images: images)
    stages.check_autoencoder(recipe, tmp_path)
    assert json.loads((tmp_path / "autoencoder.json").read_text())["all"] == 1.0


def test_the_card_tells_what_was_measured():
    numbers = {
        "rows": {"seen, one thing": {"n": 8, "all": 0.25}},
        "shuffled": {"seen, one thing": {"n": 8, "all": 0.125}},
        "binding": BINDING,
        "nearest": NEAREST,
    }
    clip = {"text_to_image@1": 0.911, "image_to_text@1": 0.922}
    text = card(
        {"autoencoder": {"psnr": 34.56, "all": 0.991}, "clip": clip, "recipe": {"prompts": 512}}
        | {"guided": numbers, "unguided": numbers}
    )
    figures = ("34.6 dB", "99.1%", "91.1%", "92.2%", "of 256", "| 25.0 |", "license: apache-2.0")
    assert [figure for figure in figures if figure not in text] == []


def test_a_gallery_shows_pictures_above_their_captions():
    pictures = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (10, 90, 170)])
    whole = np.asarray(gallery(pictures, ["a red circle", "a cross", ""], columns=2))
    for place, level in enumerate((10, 90, 170)):
        y, x = (10 + (place // 2) * 80, 10 + (place % 2) * 26)
        assert np.all(whole[y : y + 16, x : x + 16] == level)
    assert whole[26:90, 10:26].min() < 100  # text
    assert np.all(whole[106:] == 255)  # and none below the last


def test_curves_show_every_stage(tmp_path):
    pytest.importorskip("matplotlib")
    names = {"autoencoder": "psnr", "clip": "text_to_image@1", "diffusion": "loss"}
    for stage, name in names.items():
        (tmp_path / stage / "run").mkdir(parents=True)
        lines = [json.dumps({"step": step, name: 0.5 * step}) for step in (10, 20)]
        (tmp_path / stage / "run" / "log.jsonl").write_text("\n".join([*lines, '{"step": 30}']))
        assert len(read_log(tmp_path / stage / "run")) == 3
    path = plot_stages(tmp_path)
    assert path == tmp_path / "curves.png" and path.stat().st_size > 5000
