"""The command line from images to images: train, resume, generate, with tiny models.

    python tests/acceptance/training_command.py

A model of classes is trained, killed, moved and resumed to the same bytes; a preset is fine-tuned
with cached latents and texts; an autoencoder with a discriminator and a CLIP are trained, and then
diffusion models of both, with the text encoder of that CLIP and with a new one. Each of them
generates by `kdiffusion generate`. At last a run in a process of its own is stopped by Ctrl-C and
by SIGTERM.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from kdiffusion import cli
from kdiffusion.training.loop.report import read_log

ROOT = Path(__file__).parents[2]
LIMIT = 600  # seconds

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
TOWER = {
    **{"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2},
    **{"mlp_width": 16, "projection_width": 8},
}
# Plain graphs where there are any: compiling takes longer than these runs.
LOOP = {"batch_size": 4, "log_every": 1, "save_every": 2, "jit_compile": False}
SIZE = {"height": 8, "width": 8}


def main():
    checks = (check_classes, check_preset, check_parts, check_signals)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_data(Path("data"))
        for check in checks:
            begin = time.monotonic()
            try:
                check()
                outcome = "passed"
            except AssertionError as error:
                failed.append(check)
                outcome = f"FAILED: {error}"
            seconds = time.monotonic() - begin
            print(f"{check.__name__} {outcome} in {seconds:.0f} s", flush=True)
        os.chdir(ROOT)
    sys.exit(bool(failed))


def make_data(folder):
    """Make images of four colours, with captions and labels."""
    folder.mkdir()
    rows = []
    for label, (name, colour) in enumerate(COLOURS.items()):
        for number in range(2):
            file = f"{name}{number}.png"
            Image.new("RGB", (10 + number, 8), colour).save(folder / file)
            rows.append({"file_name": file, "text": f"a {name} square", "label": label})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def train(kind, *options, output, **values):
    """Run `kdiffusion train` in this process; return its standard error."""
    command = ["train", kind, "--output", output, *options]
    if values:
        Path("config.json").write_text(json.dumps({"data": {"folder": "data", **SIZE}, **values}))
        command += ["--config", "config.json"]
    return run(*command)


def run(*command):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*command])
    expect(code == cli.OK, f"{' '.join(command)}: code {code}, {err.getvalue()[-500:]}")
    return err.getvalue()


def expect(truth, message):
    if not truth:
        raise AssertionError(message)


def generate(preset, *options, height=8, width=8):
    """Generate an image with a trained model, of the size that it was trained for."""
    options = [*options, "--steps", "2", "--seed", "1", "--output", "made.png", "--force"]
    run("generate", *options, "--preset", preset)
    with Image.open("made.png") as image:
        expect(image.size == (width, height), f"{preset} generates {image.size}")


def losses(folder):
    return [entry["loss"] for entry in read_log(Path(folder)) if "loss" in entry]


def check_classes():
    """Train a new model of classes, kill, move and resume it."""
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
    train("diffusion", output="whole", **classes)
    with Image.open("whole/samples/step-00000004.png") as image:
        expect(image.size == (24, 16), f"a grid of {image.size}")
    # This is what a run leaves that was killed between the steps 2 and 4, and moved.
    shutil.copytree("whole", "parts", ignore=shutil.ignore_patterns("step-00000004", "model"))
    err = train("diffusion", "--resume", output="parts")
    expect("Resumed from step-00000002" in err, err)
    expect(losses("parts") == losses("whole"), "the losses of the parts differ")
    name = Path("model/unet/diffusion_pytorch_model.safetensors")
    same = Path("parts", name).read_bytes() == Path("whole", name).read_bytes()
    expect(same, "the weights of the parts differ")
    generate("parts/model", "--label", "3")


def check_preset():
    """Fine-tune a preset with cached latents and texts."""
    values = {"data": {"folder": "data", "height": 32, "width": 32}, "loop": LOOP, "steps": 2}
    options = ("--preset", "random-tiny", "--cache", "cache", "--learning-rate", "1e-3")
    err = train("diffusion", *options, output="tuned", **values)
    # There are four captions and none, and eight images.
    expect("cached 5" in err and "cached 8" in err, err)
    expect(len(list(Path("cache").rglob("*.npy"))) == 13, "the cache lacks files")
    generate("tuned/model", "a red square", height=32, width=32)


def check_parts():
    """Train an autoencoder, a CLIP, and diffusion models of them."""
    adam = {"name": "adam", "learning_rate": 1e-3, "settings": {"beta_1": 0.9}}
    halves = {
        "model": AUTOENCODER,
        "discriminator": {"channels": 4, "depth": 1},
        "objective": {"disc_start": 1},
    }
    train("autoencoder", output="vae", **halves, optimizer=adam, loop=LOOP, steps=3)
    names = {"loss/autoencoder", "loss/discriminator", "gradient_norm/discriminator"}
    (*_, last) = read_log(Path("vae"))
    expect(names <= last.keys() and all(last[name] for name in names), f"the log ends with {last}")
    towers = {"image_tower": TOWER, "text_encoder": TEXT_ENCODER | {"projection_width": 8}}
    train("clip", output="clip", model=towers, loop=LOOP, steps=2)
    parts = {
        "diffusion_model": NETWORK | {"context_width": 16},
        "autoencoder": "vae/model",
        "text_encoder": "clip/model",
    }
    train("diffusion", output="of-texts", model=parts, loop=LOOP, steps=2)
    generate("of-texts/model", "a red square")
    new = parts | {"text_encoder": TEXT_ENCODER}
    train("diffusion", output="joint", model=new, loop=LOOP, steps=1)
    joint = json.loads(Path("joint/config.json").read_text())
    expect(joint["train_text_encoder"], "the new text encoder does not learn")
    generate("joint/model", "a red square")
    train("autoencoder", "--preset", "vae/model", output="vae-2", loop=LOOP, steps=1)
    train("clip", "--preset", "clip/model", output="clip-2", loop=LOOP, steps=1)


def check_signals():
    """Stop runs in processes of their own."""
    values = {
        "model": {"diffusion_model": PIXELS},
        "data": {"folder": "data", **SIZE},
        "loop": LOOP | {"save_every": 10**6},
    }
    Path("config.json").write_text(json.dumps(values))
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = f"stopped-{int(number)}"
        command = ["train", "diffusion", "--config", "config.json", "--output", folder]
        process = start("-m", "kdiffusion", *command)
        try:
            begin = time.monotonic()
            while not losses(folder) and process.poll() is None:
                expect(time.monotonic() < begin + LIMIT, "no step was made")
                time.sleep(0.2)
            process.send_signal(number)
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
        expect(process.returncode == 128 + number, f"code {process.returncode}: {err}")
        expect(out == "" and "Traceback" not in err, err)
        saved = [path.name for path in Path(folder).glob("step-*")]
        expect(saved == [f"step-{len(losses(folder)):08d}"], f"saved {saved}")
        expect(not Path(folder, "model").exists(), "a stopped run has a model")


def start(*arguments):
    # Where this process ignores Ctrl-C, as in the background of a shell, its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    main()
