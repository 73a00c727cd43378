"""The command line, with a stand-in for the model."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdiffusion
from kdiffusion import Guidance, Sampler, Spacing, cli, images
from kdiffusion.cli import files as cli_files
from kdiffusion.cli import generate as cli_generate
from kdiffusion.metadata import SAMPLER_LABELS, Parameters, read_parameters
from kdiffusion.sampling.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]


class StandIn:
    """Draws its seeds; remembers what it was asked."""

    error: BaseException | None = None
    asked: dict = {}
    steps: list = []

    @classmethod
    def from_preset(cls, preset, **settings):
        cls.asked = {"preset": preset, **settings}
        return cls()

    def text_to_image(self, prompt, *, seed, batch_size, height, width, callback, **settings):
        type(self).asked.update(settings, prompt=prompt, seed=seed, batch_size=batch_size)
        print("progress")
        for step in self.steps if callback else []:
            callback(step)
        if self.error:
            raise self.error
        shape = (batch_size, height or 16, width or 24, 3)
        return np.broadcast_to(np.arange(batch_size, dtype=np.uint8)[:, None, None, None], shape)

    def image_to_image(self, image, prompt, strength, **settings):
        type(self).asked.update(task="image_to_image", image=image, strength=strength)
        return self.text_to_image(prompt, **settings)

    def inpaint(self, image, mask, prompt, strength, **settings):
        type(self).asked.update(task="inpaint", image=image, mask=mask, strength=strength)
        return self.text_to_image(prompt, **settings)


class Step:
    """What a callback is told, as far as the command line asks."""

    def __init__(self, level, count=1):
        self.denoised = np.full((count, 2, 3, 4), level, np.float32)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    """A stand-in for the model, in an empty folder, with the user's environment put back."""

    class Fresh(StandIn):
        pass

    monkeypatch.setitem(vars(kdiffusion), "StableDiffusion", Fresh)
    monkeypatch.setattr(cli_generate, "_sampling", chosen_sampling)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"))
    monkeypatch.chdir(tmp_path)
    return Fresh


def chosen_sampling(arguments):
    sampler = Sampler(arguments.sampler or "ddim", arguments.eta, arguments.order)
    return sampler, Spacing.parse(arguments.spacing)


def generate(*arguments):
    return cli.main(["generate", *arguments])


def files():
    return sorted(path.name for path in Path().iterdir())


def test_picture_is_named_after_prompt_and_seed(capsys):
    assert generate("A red circle, on blue!", "--seed", "42") == cli.OK
    out, err = capsys.readouterr()
    assert out == "a-red-circle-on-blue-42.png\n"
    assert "progress" in err and "seed 42" in err
    assert files() == ["a-red-circle-on-blue-42.png"]


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("", "picture-1.png"),
        ("../../etc/passwd", "etc-passwd-1.png"),
        ("灯台 at dawn", "灯台-at-dawn-1.png"),
        ("x" * 10000, "x" * 40 + "-1.png"),
        ("-rf *", "rf-1.png"),
        ("a\nb\udcff", "a-b-1.png"),
    ],
)
def test_name_is_safe_whatever_the_prompt(prompt, name):
    assert generate("--seed=1", "--", prompt) == cli.OK
    assert files() == [name]


def test_settings_reach_the_model_and_the_file(stand_in):
    code = generate(
        *("a cat", "--negative-prompt", "a dog", "--preset", "models/my-model", "--steps", "20"),
        *("--sampler", "dpmpp_2m", "--spacing", "karras", "--guidance-scale", "3.5"),
        *("--seed", "7", "--height", "32", "--width", "40", "--dtype", "bfloat16"),
        *("--noise", "cuda", "--output", "cat.png", "--quiet"),
    )
    assert code == cli.OK
    assert stand_in.asked == {
        "preset": "models/my-model",
        "dtype": "bfloat16",
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "num_steps": 20,
        "unconditional_guidance_scale": 3.5,
        "seed": 7,
        "batch_size": 1,
        "sampler": Sampler("dpmpp_2m"),
        "spacing": Spacing(sigmas="karras"),
        "guidance": Guidance(),
        "noise": "cuda",
        "verbose": 0,
    }
    assert read_parameters("cat.png") == Parameters(
        prompt="a cat",
        negative_prompt="a dog",
        num_steps=20,
        sampler="dpmpp_2m",
        spacing="leading+karras",
        guidance_scale=3.5,
        seed=7,
        width=40,
        height=32,
        model="my-model",
        noise="cuda",
        version=f"kdiffusion {kdiffusion.__version__}",
        others={"Dtype": "bfloat16"},
    )


def test_each_picture_of_a_batch_has_its_own_name_and_seed(capsys):
    assert generate("cat", "--batch-size", "3", "--seed", "5", "--output", "cat.png") == cli.OK
    assert capsys.readouterr().out == "cat-0.png\ncat-1.png\ncat-2.png\n"
    assert files() == ["cat-0.png", "cat-1.png", "cat-2.png"]
    assert [read_parameters(name).seed for name in files()] == [5, 6, 7]


def test_without_a_seed_a_random_one_is_told(capsys, stand_in):
    assert generate("cat") == cli.OK
    seed = stand_in.asked["seed"]
    assert 0 <= seed < 2**32
    assert f"seed {seed}" in capsys.readouterr().err
    assert read_parameters(f"cat-{seed}.png").seed == seed
    assert generate("cat") == cli.OK
    assert stand_in.asked["seed"] != seed


def test_output_may_be_a_folder():
    Path("pictures").mkdir()
    assert generate("cat", "--seed", "1", "--output", "pictures") == cli.OK
    assert [path.name for path in Path("pictures").iterdir()] == ["cat-1.png"]


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
    assert "Model: random-tiny, Denoising strength: 0.8, RNG: NV, Version: " in text


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
    stand_in.steps = [Step(level, count=2) for level in (-1.0, 0.5)]
    options = ["--batch-size", "2", "--output", "cat.png", "--preview", "preview.png"]
    assert generate("cat", *options) == cli.OK
    assert len(shown) == 2
    for picture, step in zip(shown, stand_in.steps):
        one = images.preview(step.denoised, 4)[0]
        assert one.shape == (8, 12, 3)
        np.testing.assert_array_equal(picture, np.concatenate([one, one], axis=1))
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
def test_preview_that_cannot_be_written_is_told_before_the_work(
    preview, message, capsys, stand_in
):
    Path("taken.png").write_text("precious")
    assert generate("cat", "--output", "cat.png", "--preview", preview) == cli.FAILED
    assert message in capsys.readouterr().err
    assert not stand_in.asked and files() == ["taken.png"]


def test_preview_that_fails_is_no_reason_to_lose_the_picture(capsys, stand_in, monkeypatch):
    def full(path, picture):
        raise OSError("disk full")

    monkeypatch.setattr(cli_files, "replace_picture", full)
    stand_in.steps = [Step(0.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert generate("cat", "--output", "cat.png", "--preview", "preview.png") == cli.OK
    assert "warning: the preview cannot be written: disk full" in capsys.readouterr().err
    assert files() == ["cat.png"]


def test_interrupt_tells_that_only_the_preview_was_written(capsys, stand_in):
    stand_in.steps = [Step(0.0)]
    stand_in.error = KeyboardInterrupt()
    options = ["--output", "cat.png", "--preview", "preview.png"]
    assert generate("cat", *options) == cli.INTERRUPTED
    assert "written: preview.png; not written: cat.png" in capsys.readouterr().err
    assert files() == ["preview.png"]


@pytest.mark.parametrize(
    "output, message",
    [
        ("cat.jpg", "did you mean 'cat.jpg.png'?"),
        ("cat", "did you mean 'cat.png'?"),
        ("nowhere/cat.png", "no folder 'nowhere'"),
        ("taken.png", "taken.png exists already; overwrite with --force"),
        ("folder.png", "--force"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(output, message, capsys, stand_in):
    Path("taken.png").write_text("precious")
    Path("folder.png").mkdir()
    arguments = ["cat", "--output", output, "--batch-size", "1"]
    if output == "folder.png":
        Path("folder.png/cat-1.png").mkdir()
        arguments += ["--seed", "1"]
    assert generate(*arguments) == cli.FAILED
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert not stand_in.asked
    assert Path("taken.png").read_text() == "precious"


def test_one_taken_name_stops_the_whole_batch(stand_in):
    Path("cat-1.png").write_text("precious")
    assert generate("cat", "--output", "cat.png", "--batch-size", "3") == cli.FAILED
    assert files() == ["cat-1.png"] and not stand_in.asked


def test_force_overwrites():
    Path("cat.png").write_text("worthless")
    assert generate("cat", "--output", "cat.png", "--seed", "3", "--force") == cli.OK
    assert read_parameters("cat.png").seed == 3


def test_dangling_link_is_not_written_through():
    os.symlink("elsewhere.png", "cat.png")
    assert generate("cat", "--output", "cat.png") == cli.FAILED
    assert files() == ["cat.png"]


@pytest.mark.parametrize(
    "error, code, message",
    [
        (ValueError("bad\nsize"), 1, "kdiffusion: error: bad size\n"),
        (OSError("disk full"), 1, "kdiffusion: error: disk full\n"),
        (KeyError("x"), 1, "kdiffusion: error: KeyError: 'x' (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "kdiffusion: interrupted\n"),
    ],
)
def test_error_is_one_line_and_a_code(error, code, message, capsys, stand_in):
    stand_in.error = error
    assert generate("cat") == code
    out, err = capsys.readouterr()
    assert err == f"progress\n{message}kdiffusion: nothing was written\n" and not out
    assert not files()


def test_debug_shows_the_error(stand_in):
    stand_in.error = ValueError("bad size")
    with pytest.raises(ValueError, match="bad size"):
        generate("cat", "--debug")


def test_interrupt_after_writing_tells_what_was_written(capsys, monkeypatch):
    Path("cat-1.png").write_text("old")
    genuine = os.replace

    def interrupted(source, target):
        if target.name == "cat-1.png":
            raise KeyboardInterrupt
        genuine(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    code = generate("cat", "--output", "cat.png", "--batch-size", "2", "--force")
    assert code == cli.INTERRUPTED
    assert "written: cat-0.png; not written: cat-1.png" in capsys.readouterr().err
    assert files() == ["cat-0.png", "cat-1.png"]
    assert Path("cat-1.png").read_text() == "old"


def test_warnings_are_one_line(capsys, stand_in, monkeypatch):
    def warn(self, prompt, **settings):
        warnings.warn("the prompt was cut: ... dropped")
        return np.zeros((1, 8, 8, 3), np.uint8)

    monkeypatch.setattr(stand_in, "text_to_image", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert generate("cat") == cli.OK
    assert "kdiffusion: warning: the prompt was cut: ... dropped\n" in capsys.readouterr().err


def test_picture_of_random_tiny_can_be_drawn_again_from_its_text(monkeypatch, tmp_path):
    monkeypatch.undo()
    options = ["--seed", "42", "--batch-size", "2", "--steps", "3", "--guidance-scale", "2"]
    options += ["--sampler", "dpmpp_2m", "--spacing", "karras", "--noise", "cuda"]
    assert generate("a red circle", *options, "--output", str(tmp_path), "--quiet") == cli.OK
    path = tmp_path / "a-red-circle-42-1.png"
    made = read_parameters(path)
    assert (made.sampler, made.spacing) == ("dpmpp_2m", "leading+karras")
    again = kdiffusion.StableDiffusion.from_preset(made.model).text_to_image(
        made.prompt,
        num_steps=made.num_steps,
        unconditional_guidance_scale=made.guidance_scale,
        seed=made.seed,
        sampler=made.sampler,
        spacing=made.spacing,
        height=made.height,
        width=made.width,
        noise=made.noise,
        verbose=0,
    )
    with Image.open(path) as image:
        difference = np.abs(np.asarray(image).astype(int) - again[0])
    assert difference.max() <= 1


@pytest.fixture
def real(monkeypatch, tiny, tmp_path):
    """The tiny random model in place of the stand-in, a picture and a mask of its left half."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kdiffusion.StableDiffusion, "from_preset", lambda *_, **__: tiny)
    colours = np.random.default_rng(3).integers(0, 256, (43, 24, 3), np.uint8)
    Image.fromarray(colours).save("picture.png")
    mask = np.zeros((43, 24), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save("mask.png")
    return tiny


SETTINGS = ["--steps", "4", "--seed", "5", "--guidance-scale", "2", "--output", "cat.png"]


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
    expected = draw(
        prompt="cat", sampler=Sampler("euler_a", eta=0.5), **inputs, **settings
    )[0]
    np.testing.assert_array_equal(picture, expected)
    preview = pixels("preview.png")
    assert preview.shape[1] * 40 == preview.shape[0] * 24
    made = read_parameters("cat.png")
    assert (made.strength, made.width, made.height) == (0.5, 24, 40)
    assert made.others["Eta"] == "0.5"
    assert ("Mask mode" in made.others) == masked


def test_interrupt_while_drawing_leaves_a_whole_preview_and_nothing_else(
    real, monkeypatch, capsys
):
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


def samplers(*arguments):
    return cli.main(["samplers", *arguments])


def test_samplers_are_listed_each_with_its_options(capsys):
    assert samplers() == cli.OK
    head, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.split() == "name label orders eta calls noise spacings".split()
    assert [row.split()[0] for row in rows] == list(SAMPLERS)
    columns = [head.index(word) for word in head.split()] + [None]
    table = {
        row.split()[0]: [row[start:stop].strip() for start, stop in zip(columns, columns[1:])]
        for row in rows
    }
    both = "timesteps, sigmas"
    assert table["ddim"] == ["ddim", "DDIM", "-", "0", "1", "no", "timesteps"]
    assert table["unipc"][2:] == ["1 to 3, default 2", "-", "1", "no", both]
    assert table["dpm2_a"] == ["dpm2_a", "DPM2 a", "-", "1", "2", "yes", both]
    assert table["tcd"][2:] == ["-", "0.3", "1", "yes", "its own"]
    assert [name for name in table if table[name][4] == "2"] == [
        *("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde")
    ]


def test_samplers_as_json_can_be_chosen_from(capsys):
    assert samplers("--json") == cli.OK
    records = json.loads(capsys.readouterr().out)
    assert {record["name"]: record["label"] for record in records} == SAMPLER_LABELS
    assert samplers("--json", "--sampler", "lms", "lcm") == cli.OK
    lms, lcm = json.loads(capsys.readouterr().out)
    assert lms == {
        "name": "lms",
        "label": "LMS",
        "orders": [1, 2, 3, 4],
        "order": 4,
        "eta": None,
        "network_calls": 1,
        "fresh_noise": False,
        "timestep_spacings": ["leading", "trailing", "linspace"],
        "sigma_spacings": ["karras", "exponential", "beta"],
    }
    assert (lcm["timestep_spacings"], lcm["sigma_spacings"]) == ([], [])


def test_what_is_listed_of_a_sampler_is_what_it_takes(capsys):
    from kdiffusion.sampling.samplers import make_table
    from kdiffusion.sampling.schedule import Schedule

    assert samplers("--json") == cli.OK
    for record in json.loads(capsys.readouterr().out):
        name = record["name"]
        for order in record["orders"]:
            assert Sampler(name, order=order)
        with pytest.raises(ValueError, match="order"):
            Sampler(name, order=len(record["orders"]) + 1)
        for sigmas in ("karras", "exponential", "beta"):
            if sigmas in record["sigma_spacings"]:
                make_table(name, Schedule(), 5, Spacing(sigmas=sigmas))
                continue
            with pytest.raises(ValueError, match="takes no sigma spacing"):
                make_table(name, Schedule(), 5, Spacing(sigmas=sigmas))


def test_unknown_sampler_lists_the_known(capsys):
    assert samplers("--sampler", "eulre") == cli.FAILED
    assert "'eulre'. Use one of ['ddim', 'ddpm'" in capsys.readouterr().err


def test_samplers_are_plotted_to_a_file_that_is_not_overwritten(capsys, monkeypatch):
    asked = []

    def stand_in(path, *settings):
        asked.append(settings)
        path.write_text("a plot")

    monkeypatch.setattr("kdiffusion.plots.plot_samplers", stand_in)
    assert samplers("--plot", "samplers.png") == cli.OK
    options = ["--sampler", "heun", "lms", "--steps", "5", "--spacing", "karras"]
    assert samplers("--plot", "samplers.png", *options) == cli.FAILED
    assert samplers("--plot", "samplers.png", *options, "--force") == cli.OK
    out, err = capsys.readouterr()
    assert out == "samplers.png\n" * 2
    assert "samplers.png exists already; overwrite with --force" in err
    assert asked == [
        (list(SAMPLERS), 20, Spacing()),
        (["heun", "lms"], 5, Spacing(sigmas="karras")),
    ]
    assert samplers("--plot", "samplers.pdf") == cli.FAILED
    assert samplers("--plot", "nowhere/samplers.png") == cli.FAILED


@pytest.mark.parametrize(
    "options, sampler, timesteps",
    [
        ([], Sampler("ddim"), "leading"),
        (["--spacing", "trailing"], Sampler("ddim"), "trailing"),
        (["--eta", "0.5"], Sampler("ddim", eta=0.5), "leading"),
        (["--sampler", "unipc", "--order", "3"], Sampler("unipc", order=3), "leading"),
    ],
)
def test_sampler_and_spacing_are_the_models_own_where_none_is_chosen(
    options, sampler, timesteps, monkeypatch
):
    monkeypatch.undo()
    arguments = cli._parser().parse_args(["generate", "cat", *options])
    found, spacing = cli_generate._sampling(arguments)
    assert (found, spacing.timesteps) == (sampler, timesteps)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["draw", "cat"],
        ["generate"],
        ["generate", "cat", "--steps", "0"],
        ["generate", "cat", "--batch-size", "-1"],
        ["generate", "cat", "--height", "6.4"],
        ["generate", "cat", "--seed", "many"],
        ["generate", "cat", "--noise", "gpu"],
        ["generate", "cat", "--strange"],
        ["generate", "cat", "--mask", "mask.png"],
        ["generate", "cat", "--strength", "0.5"],
        ["generate", "cat", "--image", "cat.png", "--strength", "1.5"],
        ["generate", "cat", "--eta", "nan"],
        ["generate", "cat", "--order", "0"],
        ["generate", "cat", "--guidance-rescale", "-1"],
        ["generate", "cat", "--guidance-interval", "0.5"],
        ["samplers", "--plot", "samplers.png", "--json"],
        ["samplers", "--steps", "5"],
        ["samplers", "--spacing", "karras"],
        ["samplers", "--sampler"],
    ],
)
def test_wrong_usage_is_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: kdiffusion" in capsys.readouterr().err


@pytest.mark.parametrize("level", [None, "0"])
def test_frameworks_are_silent_unless_the_user_wants_to_hear(level, monkeypatch, capfd):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    if level:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)

    def importing(name):
        os.write(2, b"I0000 a library is loaded\n")
        return StandIn

    monkeypatch.delitem(vars(kdiffusion), "StableDiffusion")
    monkeypatch.setattr(kdiffusion, "__getattr__", importing)
    assert generate("cat", "--seed", "1") == cli.OK
    assert ("I0000" in capfd.readouterr().err) == bool(level)
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == (level or "3")
    os.write(2, b"heard again\n")
    assert capfd.readouterr().err == "heard again\n"


def test_listing_the_samplers_imports_no_framework():
    code = (
        "import sys\nfrom kdiffusion.cli import main\nmain(['samplers'])\n"
        "heavy = {'keras', 'tensorflow', 'jax'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--help"], ["samplers", "--help"]]
)
def test_help_imports_no_framework(arguments):
    code = (
        "import sys\nfrom kdiffusion.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as stopped: assert stopped.code == 0\n"
        "heavy = {'keras', 'tensorflow', 'jax', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "kdiffusion" in done.stdout


def test_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "kdiffusion", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == f"kdiffusion {kdiffusion.__version__}\n"
