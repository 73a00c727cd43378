"""Pictures from pictures on the command line: with a stand-in, and with the tiny model."""

import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
from cli_stand_in import Step, files, generate
from PIL import Image

import kdiffusion
from kdiffusion import Guidance, Sampler, cli
from kdiffusion.cli import files as cli_files
from kdiffusion.pipelines.metadata import read_parameters

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("stand_in")]


@pytest.mark.parametrize(
    "options, asked, told",
    [
        ([], {"task": "image_to_image", "strength": 0.8}, {"strength": 0.8}),
        (["--strength", "0.3"], {"strength": 0.3}, {"strength": 0.3}),
        (
            ["--mask", "mask.png"],
            {"task": "inpaint", "mask": Path("mask.png"), "strength": 1.0},
            {"strength": 1.0, "others": {"Mask mode": "Inpaint masked", "Mask blur": "0"}},
        ),
        (["--mask", "mask.png", "--strength", "0.5"], {"strength": 0.5}, {"strength": 0.5}),
        (["--eta", "0.5"], {"sampler": Sampler("ddim", eta=0.5)}, {"others": {"Eta DDIM": "0.5"}}),
        (
            ["--sampler", "euler_a", "--eta", "0"],
            {"sampler": Sampler("euler_a", eta=0.0)},
            {"sampler": "euler_a", "others": {"Eta": "0.0"}},
        ),
        (
            ["--sampler", "deis", "--order", "3"],
            {"sampler": Sampler("deis", order=3)},
            {"sampler": "deis", "others": {"Order": "3"}},
        ),
        (
            ["--guidance-rescale", "0.7", "--guidance-interval", "0.1", "0.8"],
            {"guidance": Guidance(0.7, (0.1, 0.8))},
            {"others": {"Guidance rescale": "0.7", "Guidance interval": "0.1 to 0.8"}},
        ),
    ],
)
def test_what_is_asked_of_the_model_is_told_in_the_file(options, asked, told, stand_in):
    for name in ("picture.png", "mask.png"):
        Image.new("L", (16, 8)).save(name)
    assert generate("cat", "--image", "picture.png", "--output", "cat.png", *options) == cli.OK
    assert stand_in.asked["image"] == Path("picture.png")
    assert {name: stand_in.asked[name] for name in asked} == asked
    made = read_parameters("cat.png")
    assert {name: getattr(made, name) for name in told} == told


def test_denoising_strength_is_written_as_automatic1111_writes_it():
    Image.new("L", (16, 8)).save("picture.png")
    assert generate("cat", "--image", "picture.png", "--seed", "1", "--noise", "cuda") == cli.OK
    with Image.open("cat-1.png") as image:
        text = image.info["parameters"]
    assert "Model: shapes, Denoising strength: 0.8, RNG: NV, Version: " in text


@pytest.mark.parametrize("option", ["--image", "--mask"])
@pytest.mark.parametrize(
    "name, message",
    [("gone.png", "'gone.png', is not a file"), ("notes.png", "'notes.png', cannot be opened")],
)
def test_pictures_that_cannot_be_read_are_told_before_the_work(
    option, name, message, capsys, stand_in
):
    Image.new("L", (16, 8)).save("picture.png")
    Path("notes.png").write_text("no picture")
    pictures = {"--image": "picture.png", "--mask": "picture.png", option: name}
    assert generate("cat", *(word for pair in pictures.items() for word in pair)) == cli.FAILED
    err = capsys.readouterr().err
    assert f"error: `{option}`, {message}" in err and err.count("\n") == 1
    assert not stand_in.asked


def test_preview_shows_every_step_side_by_side(stand_in, monkeypatch):
    shown = []
    genuine = os.replace

    def watched(source, target):
        genuine(source, target)
        if target.name == "preview.png":
            with Image.open(target) as image:
                shown.append(np.asarray(image))

    monkeypatch.setattr(os, "replace", watched)
    stand_in.steps = [Step(level, count=2) for level in (0, 77)]
    options = ["--batch-size", "2", "--output", "cat.png", "--preview", "preview.png"]
    assert generate("cat", *options) == cli.OK
    assert len(shown) == 2
    for picture, step in zip(shown, stand_in.steps):
        np.testing.assert_array_equal(picture, np.concatenate([*step.preview], axis=1))
    assert files() == ["cat-0.png", "cat-1.png", "preview.png"]


@pytest.mark.parametrize(
    "preview, message",
    [
        ("preview.jpg", "--preview must be the name of a PNG file"),
        ("nowhere/preview.png", "no folder 'nowhere'"),
        ("taken.png", "taken.png exists already; overwrite with --force"),
        ("cat.png", "--preview and --output both name 'cat.png'"),
    ],
)
def test_preview_that_cannot_be_written_is_told_before_the_work(preview, message, capsys, stand_in):
    Path("taken.png").write_text("precious")
    assert generate("cat", "--output", "cat.png", "--preview", preview) == cli.FAILED
    assert message in capsys.readouterr().err
    assert not stand_in.asked and files() == ["taken.png"]


def test_preview_that_fails_is_no_reason_to_lose_the_picture(capsys, stand_in, monkeypatch):
    def full(path, picture):
        raise OSError("disk full")

    monkeypatch.setattr(cli_files, "replace_picture", full)
    stand_in.steps = [Step(0)]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert generate("cat", "--output", "cat.png", "--preview", "preview.png") == cli.OK
    assert "warning: the preview cannot be written: disk full" in capsys.readouterr().err
    assert files() == ["cat.png"]


def test_interrupt_tells_that_only_the_preview_was_written(capsys, stand_in):
    stand_in.steps = [Step(0)]
    stand_in.error = KeyboardInterrupt()
    options = ["--output", "cat.png", "--preview", "preview.png"]
    assert generate("cat", *options) == cli.INTERRUPTED
    assert "written: preview.png; not written: cat.png" in capsys.readouterr().err
    assert files() == ["preview.png"]


@pytest.fixture
def real(monkeypatch, tiny, tmp_path):
    """The tiny random model in place of the stand-in, a picture and a mask of its left half."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kdiffusion, "open_model", lambda *_, **__: tiny)
    colours = np.random.default_rng(3).integers(0, 256, (43, 24, 3), np.uint8)
    Image.fromarray(colours).save("picture.png")
    mask = np.zeros((43, 24), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save("mask.png")
    return tiny


SETTINGS = ["--steps", "4", "--seed", "5", "--guidance-scale", "2", "--output", "cat.png"]
SETTINGS += ["--preset", "random-tiny"]


def pixels(name):
    with Image.open(name) as image:
        return np.asarray(image)


@pytest.mark.parametrize("masked", [False, True])
def test_pictures_from_pictures_are_the_models_own_and_of_their_size(masked, real, capsys):
    inputs = {"image": "picture.png", "strength": 0.5}
    options = ["--image", "picture.png", "--strength", "0.5", "--preview", "preview.png"]
    options += ["--sampler", "euler_a", "--eta", "0.5"]
    draw = real.image_to_image
    if masked:
        options += ["--mask", "mask.png"]
        inputs["mask"], draw = "mask.png", real.inpaint
    assert generate("cat", *SETTINGS, *options) == cli.OK, capsys.readouterr().err
    picture = pixels("cat.png")
    assert picture.shape == (40, 24, 3)
    settings = {"num_steps": 4, "seed": 5, "unconditional_guidance_scale": 2.0, "verbose": 0}
    expected = draw(prompt="cat", sampler=Sampler("euler_a", eta=0.5), **inputs, **settings)[0]
    np.testing.assert_array_equal(picture, expected)
    preview = pixels("preview.png")
    assert preview.shape[1] * 40 == preview.shape[0] * 24
    made = read_parameters("cat.png")
    assert (made.strength, made.width, made.height) == (0.5, 24, 40)
    assert made.others["Eta"] == "0.5"
    assert ("Mask mode" in made.others) == masked


def test_interrupt_while_drawing_leaves_a_whole_preview_and_nothing_else(real, monkeypatch, capsys):
    previews = []
    genuine = cli_files.replace_picture

    def interrupted(path, picture):
        genuine(path, picture)
        previews.append(picture)
        if len(previews) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli_files, "replace_picture", interrupted)
    options = [*SETTINGS, "--preview", "preview.png"]
    assert generate("cat", *options) == cli.INTERRUPTED
    assert "written: preview.png; not written: cat.png" in capsys.readouterr().err
    np.testing.assert_array_equal(pixels("preview.png"), previews[1])
    assert files() == ["mask.png", "picture.png", "preview.png"]
    assert generate("cat", *options, "--force") == cli.OK
    expected = real.text_to_image(
        "cat", num_steps=4, seed=5, unconditional_guidance_scale=2.0, verbose=0
    )
    np.testing.assert_array_equal(pixels("cat.png"), expected[0])
