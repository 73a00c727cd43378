"""`kdiffusion train`, with tiny models: from a folder of pictures to a model that draws."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from kdiffusion import cli
from kdiffusion.training.loop.report import read_log

pytestmark = pytest.mark.backend

ROOT = Path(__file__).parents[2]

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}
TEXT_ENCODER = {
    **{"vocabulary_size": 514, "end_id": 513, "max_length": 24},
    **{"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 16},
}
NETWORK = {
    **{"channels": [8, 8], "layers_per_level": 1, "num_groups": 4},
    **{"depths": [0, 0], "mid_depth": 1, "num_heads": [1, 1]},
}
PIXELS = NETWORK | {"in_channels": 3, "out_channels": 3, "context_width": None, "num_classes": 4}
AUTOENCODER = {"channels": [8, 8], "layers_per_level": 1, "num_groups": 4, "mid_attention": False}
# Plain graphs where there are any: compiling takes longer than these runs.
LOOP = {"batch_size": 4, "log_every": 1, "save_every": 2, "jit_compile": False}
SIZE = {"height": 8, "width": 8}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder, with pictures of four colours in `data`."""
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"))
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    rows = []
    for label, (name, colour) in enumerate(COLOURS.items()):
        for number in range(2):
            file = f"{name}{number}.png"
            Image.new("RGB", (10 + number, 8), colour).save(Path("data", file))
            rows.append({"file_name": file, "text": f"a {name} square", "label": label})
    Path("data/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def train(kind, *options, output="run", **values):
    command = ["train", kind, "--output", output, *options]
    if values:
        Path("config.json").write_text(json.dumps({"data": {"folder": "data", **SIZE}, **values}))
        command += ["--config", "config.json"]
    return cli.main(command)


def size(path):
    with Image.open(path) as image:
        return image.size


def losses(folder="run"):
    return [entry["loss"] for entry in read_log(Path(folder)) if "loss" in entry]


def test_a_new_model_of_classes_is_trained_resumed_and_drawn_from(capsys):
    classes = {
        "model": {"diffusion_model": PIXELS, "schedule": {"prediction": "v"}},
        "data": {
            **{"folder": "data", **SIZE, "flip": True},
            "augmentation": [{"layer": "RandomBrightness", "factor": 0.1}],
        },
        "loop": LOOP | {"sample_every": 2, "num_samples": 5},
        "samples": {"num_steps": 2},
        "optimizer": {"warmup_steps": 2, "decay": "cosine"},
        "steps": 4,
    }
    assert train("diffusion", output="whole", **classes) == cli.OK
    assert capsys.readouterr().out == f"{Path('whole', 'model')}\n"
    assert size("whole/samples/step-00000004.png") == (24, 16)
    made = json.loads(Path("whole/config.json").read_text())
    assert made["kind"] == "diffusion" and made["model"]["diffusion_model"]["num_classes"] == 4
    assert made["objective"]["caption_dropout"] == 0.1 and made["loop"]["clip_norm"] == 1.0

    # What a run leaves that was killed between the steps 2 and 4, and moved.
    shutil.copytree("whole", "run", ignore=shutil.ignore_patterns("step-00000004", "model"))
    Path("config.json").unlink()
    assert train("diffusion", "--resume") == cli.OK
    out, err = capsys.readouterr()
    assert "Resumed from step-00000002" in err
    assert losses() == losses("whole") and len(losses()) == 4
    name = Path("model/unet/diffusion_pytorch_model.safetensors")
    assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()

    draw = ["generate", "--preset", "run/model", "--steps", "2", "--seed", "1"]
    assert cli.main([*draw, "--label", "3"]) == cli.OK
    assert size("class-3-1.png") == (8, 8)
    assert cli.main([*draw, "--label", "4"]) == cli.FAILED
    assert "from 0 to 3" in capsys.readouterr().err


def test_a_preset_goes_on_with_cached_latents_and_texts(capsys):
    values = {"data": {"folder": "data", "height": 32, "width": 32}, "loop": LOOP, "steps": 2}
    options = ("--preset", "random-tiny", "--cache", "cache", "--learning-rate", "1e-5")
    assert train("diffusion", *options, **values) == cli.OK
    out, err = capsys.readouterr()
    assert "cached 5" in err and "cached 8" in err  # four captions and none; eight pictures
    assert len(list(Path("cache").rglob("*.npy"))) == 13
    made = json.loads(Path("run/config.json").read_text())
    assert (made["preset"], made["optimizer"]["learning_rate"]) == ("random-tiny", 1e-5)
    draw = ["generate", "a red square", "--preset", "run/model", "--steps", "2", "--seed", "1"]
    assert cli.main(draw) == cli.OK
    assert size("a-red-square-1.png") == (32, 32)


def test_a_model_of_texts_from_an_autoencoder_and_a_clip_of_its_own():
    adam = {"name": "adam", "learning_rate": 1e-3, "settings": {"beta_1": 0.9}}
    halves = {"model": AUTOENCODER, "discriminator": {"channels": 4, "depth": 1}}
    assert train("autoencoder", output="vae", **halves, optimizer=adam, loop=LOOP, steps=2) == 0
    tower = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2}
    towers = {
        "image_tower": tower | {"mlp_width": 16, "projection_width": 8},
        "text_encoder": TEXT_ENCODER | {"projection_width": 8},
    }
    assert train("clip", output="clip", model=towers, loop=LOOP, steps=2) == cli.OK
    assert (Path("clip/model/text_encoder/model.safetensors")).is_file()
    parts = {
        "diffusion_model": NETWORK | {"context_width": 16},
        "autoencoder": "vae/model",
        "text_encoder": "clip/model",
    }
    assert train("diffusion", model=parts, loop=LOOP, steps=2) == cli.OK
    draw = ["generate", "a red square", "--preset", "run/model", "--steps", "2", "--seed", "1"]
    assert cli.main(draw) == cli.OK
    assert size("a-red-square-1.png") == (8, 8)
    new = parts | {"text_encoder": TEXT_ENCODER}
    assert train("diffusion", output="joint", model=new, loop=LOOP, steps=1) == cli.OK
    assert json.loads(Path("joint/config.json").read_text())["train_text_encoder"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modle": {}}, "the configuration has no 'modle'. Known keys: data, dtype, grad"),
        ({"loop": {"batchsize": 2}}, "loop has no 'batchsize'. Known keys: accumulation, batch_"),
        ({"loop": {"batch_size": "2"}}, 'loop.batch_size must be a whole number. Received: "2"'),
        ({"loop": {"seed": 2}}, "Give `seed` beside `loop`"),
        ({"steps": 0}, "`steps` must be 1 or more"),
        ({"steps": True}, "steps must be a whole number. Received: true"),
        ({}, "Give either `preset`, a model to go on from, or `model`"),
        ({"preset": "random-tiny", "model": {"diffusion_model": PIXELS}}, "Received: both"),
        ({"preset": "nowhere"}, "`preset` must be a known name"),
        ({"model": {"diffusion_model": {"channels": [8]}}}, "`depths` needs one value for each"),
        ({"model": {"diffusion_model": NETWORK}}, "context_width=768 and no text_encoder"),
        (
            {"model": {"diffusion_model": NETWORK, "text_encoder": "clip"}},
            "model: A model of texts draws latents: give `autoencoder` too",
        ),
        ({"model": {"diffusion_model": PIXELS | {"num_classes": 3}}}, "num_classes=4"),
        ({"model": {"diffusion_model": PIXELS}, "data": {"cache": "c"}}, "nothing to cache"),
        ({"preset": "random-tiny", "data": {"folder": None}}, "give the folder of the pictures"),
        ({"preset": "random-tiny", "data": {"crop": "top"}}, "`crop` must be one of"),
        ({"preset": "random-tiny", "optimizer": {"name": "sdg"}}, "one of adadelta, adafactor"),
        (
            {"preset": "random-tiny", "optimizer": {"settings": {"momentun": 1}}},
            "optimizer.settings: ",
        ),
        (
            {"preset": "random-tiny", "data": {"augmentation": [{"layer": "Sequential"}]}},
            "Received: 'Sequential'",
        ),
        (
            {"preset": "random-tiny", "data": {"augmentation": [{"layer": "RandomContrast"}]}},
            "data.augmentation, RandomContrast: ",
        ),
    ],
)
def test_configurations_that_are_wrong(values, message, capsys):
    values["data"] = {"folder": "data", **SIZE} | values.get("data", {})
    assert train("diffusion", **values) == cli.FAILED
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert message in err
    assert not Path("run").exists()


def test_files_that_are_no_configurations(capsys):
    for text, message in (
        ("[1]", "holds a list"),
        ("{", "cannot be read as JSON"),
        ('{"steps": NaN}', "NaN is no number of JSON"),
        ('{"steps": 1, "steps": 2}', "the key 'steps' stands there twice"),
        ('{"kind": "clip"}', "is the configuration of a run of 'clip'"),
    ):
        Path("config.json").write_text(text)
        assert cli.main(["train", "diffusion", "--output", "run", "--config", "config.json"]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["train", "diffusion", "--output", "run", "--config", "nowhere.json"]) == 1
    assert "'nowhere.json' cannot be read" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_not_touched_unless_resumed(capsys):
    Path("run/step-00000001").mkdir(parents=True)
    assert train("diffusion", "--preset", "random-tiny") == cli.FAILED
    assert "go on with it by --resume" in capsys.readouterr().err
    assert [path.name for path in Path("run").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["diffusion"],
        ["lora", "--output", "run"],
        ["clip", "--output", "run", "--steps", "0"],
        ["clip", "--output", "run", "--learning-rate", "-1"],
        ["clip", "--output", "run", "--learning-rate", "nan"],
    ],
)
def test_command_lines_that_are_wrong(arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", *arguments])
    assert left.value.code == 2


def python(*arguments, **settings):
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def test_help_imports_no_framework():
    script = """
import sys
from kdiffusion import cli
try:
    cli.main(["train", "--help"])
finally:
    assert not {"keras", "tensorflow", "jax", "numpy"} & sys.modules.keys()
"""
    out, err = python("-c", script).communicate(timeout=60)
    assert err == "" and "--resume" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_leave_with_their_codes(number):
    values = {
        "model": {"diffusion_model": PIXELS},
        "data": {"folder": "data", **SIZE},
        "loop": LOOP | {"save_every": 10**6},
    }
    Path("config.json").write_text(json.dumps(values))
    command = ["train", "diffusion", "--config", "config.json", "--output", "run"]
    process = python("-m", "kdiffusion", *command)
    try:
        begin = time.monotonic()
        while not losses() and process.poll() is None and time.monotonic() < begin + 300:
            time.sleep(0.2)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert out == "" and "Traceback" not in err
    saved = [path.name for path in Path("run").glob("step-*")]
    assert saved == [f"step-{len(losses()):08d}"]
    assert not Path("run/model").exists()
