"""The command line, with a stand-in for the model."""

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from cli_stand_in import StandIn, files, generate
from PIL import Image

import kdiffusion
from kdiffusion import Guidance, Sampler, Spacing, cli
from kdiffusion.cli import generate as cli_generate
from kdiffusion.pipelines.metadata import Parameters, read_parameters

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("stand_in")]


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


def test_without_a_preset_the_model_is_named_and_the_way_to_another(stand_in, capsys):
    assert generate("a red circle", "--seed", "1") == cli.OK
    assert stand_in.asked["preset"] == "shapes"
    said = capsys.readouterr().err
    assert said.count("generated with shapes") == 1 and "--preset stable-diffusion-v1-5" in said
    for options in (["--preset", "some/folder"], ["--quiet"]):
        assert generate("a red circle", "--seed", "1", "--force", *options) == cli.OK
        assert "generated with" not in capsys.readouterr().err


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
    options += ["--preset", "random-tiny"]
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
    arguments = cli._parser().parse_args(["generate", "cat", "--preset", "random-tiny", *options])
    found, spacing = cli_generate._sampling(arguments, ("ddim", Spacing()))
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
        return StandIn.from_preset

    monkeypatch.delitem(vars(kdiffusion), "open_model")
    monkeypatch.setattr(kdiffusion, "__getattr__", importing)
    assert generate("cat", "--seed", "1") == cli.OK
    assert ("I0000" in capfd.readouterr().err) == bool(level)
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == (level or "3")
    os.write(2, b"heard again\n")
    assert capfd.readouterr().err == "heard again\n"


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
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "kdiffusion" in done.stdout


def test_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "kdiffusion", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == f"kdiffusion {kdiffusion.__version__}\n"


def test_checkpoint_commands_are_those_of_weights_conversion(capsys):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, "file.safetensors")
    assert cli.main(["inspect", "file.safetensors", "--json"]) == 0
    assert '"tensors": 1' in capsys.readouterr().out
    assert cli.main(["convert", "file.safetensors", "folder"]) == 1
    assert "file.safetensors" in capsys.readouterr().err
    assert files() == ["file.safetensors"]


def test_help_lists_every_command(capsys):
    from weights_conversion.cli import add_commands

    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out
    commands = argparse.ArgumentParser().add_subparsers()
    add_commands(commands)
    assert commands.choices.keys() == cli._CHECKPOINT_COMMANDS.keys()
    for name in ("generate", "samplers", *cli._CHECKPOINT_COMMANDS):
        assert f"\n    {name} " in listed
