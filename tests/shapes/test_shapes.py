"""The model in the package, beside what diffusers draws with it.

`acceptance/shapes_diffusers.py --golden` made `golden/shapes.npz`.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import kdiffusion
from kdiffusion import StableDiffusion
from kdiffusion.shapes.data import evaluation_scenes
from kdiffusion.shapes.detector import judge

FOLDER = Path(kdiffusion.__file__).parent / "shapes" / "model"
GOLDEN = Path(__file__).parents[1] / "golden" / "shapes.npz"
SCENES = evaluation_scenes("held-out templates", 4)


@pytest.fixture(scope="module")
def pictures():
    model = StableDiffusion.from_preset("shapes")
    return model.text_to_image([scene.caption for scene in SCENES], num_steps=20, seed=0, verbose=0)


def test_it_draws_what_diffusers_draws(pictures):
    with np.load(GOLDEN) as file:
        difference = np.abs(np.subtract(pictures, file["pictures"], dtype=np.int32))
    assert difference.max() <= 2


def test_it_draws_what_it_is_told(pictures):
    for picture, scene in zip(pictures, SCENES):
        assert judge(picture, scene.description)["all"], scene.caption


def test_it_is_small_and_says_what_it_is():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    assert "license: apache-2.0" in (FOLDER / "README.md").read_text("utf-8")
    manifest = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
    assert {"recipe", "versions", "autoencoder", "clip", "guided", "unguided"} <= manifest.keys()
