"""The model in the package, which `acceptance/shapes_diffusers.py` compares with diffusers."""

import json
from pathlib import Path

import kdiffusion
from kdiffusion import StableDiffusion
from kdiffusion.shapes.data import evaluation_scenes
from kdiffusion.shapes.detector import judge

FOLDER = Path(kdiffusion.__file__).parent / "shapes" / "model"


def test_it_draws_what_it_is_told():
    (scene,) = evaluation_scenes("held-out templates", 1)
    model = StableDiffusion.from_preset("shapes")
    (picture,) = model.text_to_image(scene.caption, num_steps=8, seed=0, verbose=0)
    assert judge(picture, scene.description)["all"], scene.caption


def test_it_is_small_and_says_what_it_is():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    assert "license: apache-2.0" in (FOLDER / "README.md").read_text("utf-8")
    manifest = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
    assert {"recipe", "versions", "autoencoder", "clip", "guided", "unguided"} <= manifest.keys()
