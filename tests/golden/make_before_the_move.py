"""Write `before_the_move/`: files of users, as the commit before modules moved wrote them.

    python tests/golden/make_before_the_move.py

They are written with public names alone and read by `test_before_the_move.py`, which takes the
runs from here too, and by `acceptance/moves.py`. Written anew by a later commit they would prove
nothing. Weights are multiples of 1/64 and files are compressed, so all is small.

- `*.keras` are networks of each kind, `weights.zip` holds some `.weights.h5` files of them, and
  `outputs.npz` what they compute;
- `runs.zip` holds runs of `Loop` after 3 of 6 steps, `trained.npz` the weights after 3, and after
  6 at a stretch;
- `cache.zip` holds what `cached` wrote, `cached.npz` its first batch;
- `folders.zip` holds whole models, and `clip.npz` what one of them makes of texts;
- `command_line.zip` holds pictures, and runs of `kdiffusion train` and a cache after 3 steps.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
from PIL import Image

from kdiffusion import (
    DiffusionModel,
    ImageDecoder,
    ImageEncoder,
    ImageTower,
    LatentDiffusion,
    PixelDiffusion,
    Schedule,
    SimpleTokenizer,
    StableDiffusion,
    TextEncoder,
)
from kdiffusion.training import (
    AutoencoderObjective,
    AutoencoderTrainer,
    CLIPTrainer,
    Data,
    DiffusionTrainer,
    Discriminator,
    InMemory,
    Loop,
    LoopSettings,
    Objective,
    Perceptual,
    Preprocessing,
    cached,
)

FOLDER = Path(__file__).with_name("before_the_move")
SIZE, COUNT, STEPS, STOP = 8, 5, 6, 3
SCHEDULE = Schedule(prediction="v")
CAPTIONS = ["a red circle", "", "a red circle", "blue", "two words"]
LABELS = [0, 1, 0, 1, 0]

TEXT = {
    "vocabulary_size": 514,
    "max_length": 16,
    "width": 4,
    "depth": 1,
    "num_heads": 2,
    "mlp_width": 8,
    "end_id": 513,
}
AUTOENCODER = {"channels": (4, 4), "layers_per_level": 1, "num_groups": 2, "latent_scale": 0.5}
CODEBOOK = {**AUTOENCODER, "channels": (4,), "mid_attention": False, "codebook_size": 8}
NETWORK = {
    "channels": (4,),
    "layers_per_level": 1,
    "depths": (1,),
    "num_heads": (2,),
    "context_width": 4,
    "num_groups": 2,
}
CLASSES = {**NETWORK, "context_width": None, "num_classes": 2}
CLASSES |= {"channels": (4, 4), "depths": (0, 1), "num_heads": (1, 2)}
PIXELS = {**NETWORK, "context_width": None, "num_classes": 2, "depths": (0,)}
PIXELS |= {"in_channels": 3, "out_channels": 3}
TOWER = {
    "image_size": SIZE,
    "patch_size": 4,
    "width": 4,
    "depth": 1,
    "num_heads": 2,
    "mlp_width": 8,
    "projection_width": 4,
}
MODELS = {
    "diffusion_model": (DiffusionModel, NETWORK),
    "diffusion_model_of_classes": (DiffusionModel, CLASSES),
    "diffusion_model_of_pixels": (DiffusionModel, PIXELS),
    "image_encoder": (ImageEncoder, AUTOENCODER),
    "image_decoder": (ImageDecoder, AUTOENCODER),
    "image_encoder_with_codebook": (ImageEncoder, CODEBOOK),
    "image_decoder_with_codebook": (ImageDecoder, CODEBOOK),
    "text_encoder": (TextEncoder, TEXT),
    "text_encoder_with_projection": (TextEncoder, {**TEXT, "projection_width": 4}),
    "image_tower": (ImageTower, TOWER),
    "discriminator": (Discriminator, {"channels": 4, "depth": 1}),
    "perceptual": (Perceptual, {"channels": (4, 4), "layers_per_level": (1, 1)}),
}
WEIGHTS = ("diffusion_model", "image_decoder", "text_encoder", "image_tower")
# Whole models: their class and their networks.
WHOLE = {
    "stable_diffusion": (
        StableDiffusion,
        ("text_encoder", "image_encoder", "image_decoder", "diffusion_model"),
    ),
    "latent_diffusion": (
        LatentDiffusion,
        ("image_encoder", "image_decoder", "diffusion_model_of_classes"),
    ),
    "pixel_diffusion": (PixelDiffusion, ("diffusion_model_of_pixels",)),
}


def main():
    FOLDER.mkdir()  # which fails where files are: nobody can write them again
    for write in (write_models, write_runs, write_cache, write_folders, write_command_line):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))


def write_models(folder):
    generator = np.random.default_rng(0)
    outputs = {}
    for name, (make, architecture) in MODELS.items():
        model = make(architecture, name=name)
        for variable in model.variables:
            values = generator.uniform(-0.5, 0.5, variable.shape)
            variable.assign(np.round(64 * values) / 64 + variable.path.endswith("gamma"))
        model.save(folder / "model.keras")
        compress(folder / "model.keras", FOLDER / f"{name}.keras")
        if name in WEIGHTS:
            (folder / "weights").mkdir(exist_ok=True)
            model.save_weights(folder / "weights" / f"{name}.weights.h5")
        inputs = inputs_of(name, generator)
        outputs |= {f"{name}|input|{key}": array for key, array in inputs.items()}
        outputs |= {f"{name}|output|{key}": array for key, array in compute(model, inputs).items()}
    np.savez_compressed(FOLDER / "outputs.npz", **outputs)
    pack(folder / "weights")


def compress(source, destination):
    """The same zip file, smaller."""
    with zipfile.ZipFile(source) as old:
        with zipfile.ZipFile(destination, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))


def pack(folder):
    """Write a folder as a zip file of its name."""
    with zipfile.ZipFile(FOLDER / f"{folder.name}.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))


def unpack(name, folder):
    """The folder that was packed under this name, in another one."""
    with zipfile.ZipFile(FOLDER / f"{name}.zip") as file:
        file.extractall(Path(folder, name))
    return Path(folder, name)


def inputs_of(name, generator):
    """Inputs of a network, by name; one alone has the name ""."""
    pictures = generator.uniform(-1.0, 1.0, (2, SIZE, SIZE, 3)).astype(np.float32)
    latents = generator.standard_normal((2, 3, 5, 4)).astype(np.float32)
    context = generator.standard_normal((2, 6, 4)).astype(np.float32)
    tokens = np.array([[512, 1, 2, 513, 513, 513], [512, 5, 6, 7, 8, 513]], np.int32)
    if name == "perceptual":
        return {"0": pictures, "1": pictures[::-1]}
    if name.startswith("diffusion_model"):
        given = {"latents": latents, "timestep": np.array([981.0, 17.5], np.float32)}
        if name.endswith("classes") or name.endswith("pixels"):
            given["label"] = np.array([0, 2], np.int32)
        else:
            given["context"] = context
        if name.endswith("pixels"):
            given["latents"] = pictures
        return given
    if name.startswith("text_encoder"):
        return {"": tokens}
    return {"": latents if name.startswith("image_decoder") else pictures}


def compute(model, inputs):
    """Return the outputs of a network, by name."""
    if "" in inputs:
        outputs = model(inputs[""])
    elif "0" in inputs:
        outputs = model(inputs["0"], inputs["1"])
    else:
        outputs = model(inputs)
    outputs = outputs if isinstance(outputs, dict) else {"": outputs}
    return {name: keras.ops.convert_to_numpy(array) for name, array in outputs.items()}


def load(name):
    """The network of this name."""
    return keras.saving.load_model(FOLDER / f"{name}.keras")


def pictures():
    """(5, 8, 8, 3) uint8, of the size that is asked for, so that nobody resizes them."""
    return np.random.default_rng(1).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)


def tokenizer():
    return SimpleTokenizer.byte_level(max_length=TEXT["max_length"])


def data():
    source = InMemory(pictures(), CAPTIONS, LABELS)
    return Data(source, Preprocessing(SIZE, SIZE, flip=True), tokenizer(), seed=3)


def diffusion_loop(folder):
    """Averages and clipping."""
    trainer = DiffusionTrainer(
        load("diffusion_model_of_pixels"),
        SCHEDULE,
        objective=Objective(caption_dropout=0.3, offset_noise=0.1),
    )
    optimizer = keras.optimizers.AdamW(1e-3, epsilon=1e-3)
    settings = {"clip_norm": 1.0, "ema_decay": 0.9}
    return make_loop(trainer, optimizer, folder, **settings)


def autoencoder_loop(folder):
    """Two groups, each with an optimizer, and a network that is not trained."""
    trainer = AutoencoderTrainer(
        load("image_encoder_with_codebook"),
        load("image_decoder_with_codebook"),
        perceptual=load("perceptual"),
        discriminator=load("discriminator"),
        objective=AutoencoderObjective(disc_start=1, disc_warmup=1),
    )
    optimizers = {
        "autoencoder": keras.optimizers.Adam(1e-3, epsilon=1e-3),
        "discriminator": keras.optimizers.SGD(1e-3, momentum=0.9),
    }
    return make_loop(trainer, optimizers, folder)


def clip_loop(folder):
    """A weight of the trainer's own."""
    towers = load("image_tower"), load("text_encoder_with_projection")
    # Keras numbers the trainers of a process that are given no names.
    trainer = CLIPTrainer(*towers, tokenizer=tokenizer(), name="clip_trainer")
    return make_loop(trainer, keras.optimizers.SGD(1e-2, momentum=0.9), folder)


def make_loop(trainer, optimizer, folder, **settings):
    settings = {"batch_size": 4, "log_every": STEPS, "verbose": False, **settings}
    settings = LoopSettings(**settings, jit_compile=False)
    return Loop(trainer, optimizer, data(), folder, settings)


RUNS = {"diffusion": diffusion_loop, "autoencoder": autoencoder_loop, "clip": clip_loop}
FINISHED = ("diffusion", "clip")  # the other takes too long


def trained(loop):
    """All trainable variables and their averages, in the loop's order."""
    variables = [v for group in loop.trainer.groups.values() for v in group]
    values = [keras.ops.convert_to_numpy(variable.value) for variable in variables]
    with loop.averages.applied():
        values += [keras.ops.convert_to_numpy(variable.value) for variable in variables]
    return np.concatenate([np.ravel(value) for value in values])


def write_runs(folder):
    arrays = {}
    for name, make in RUNS.items():
        loop = make(folder / "runs" / name)
        loop.run(STOP)
        arrays[f"{name} {STOP}"] = trained(loop)
        thin(folder / "runs" / name)
        if name in FINISHED:
            loop = make(folder / "whole" / name)
            loop.run(STEPS)
            arrays[f"{name} {STEPS}"] = trained(loop)
    np.savez_compressed(FOLDER / "trained.npz", **arrays)
    pack(folder / "runs")


def thin(run):
    """Take out of a run's folder what nothing is resumed from."""
    for name in ("tensorboard", "model", "samples"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("curves.png", ".lock"):
        (run / name).unlink(missing_ok=True)


def fill_cache(folder):
    """Return what `cached` computes of the data, or finds in the folder."""
    encoders = {"image_encoder": load("image_encoder"), "text_encoder": load("text_encoder")}
    return cached(data(), folder, **encoders, batch_size=2).batch(0, COUNT)


def write_cache(folder):
    np.savez_compressed(FOLDER / "cached.npz", **fill_cache(folder / "cache"))
    pack(folder / "cache")


def write_folders(folder):
    for name, (model_class, networks) in WHOLE.items():
        parts = {network.partition("_of_")[0]: load(network) for network in networks}
        words = {"tokenizer": tokenizer()} if "text_encoder" in parts else {}
        model = model_class.from_parts(parts, SCHEDULE, (16, 16), **words, jit_compile=False)
        model.save(folder / "folders" / name)
    trainer = CLIPTrainer(load("image_tower"), load("text_encoder_with_projection"))
    trainer.save(folder / "folders" / "clip")
    vectors = trainer.encode_text(tokenizer().rows(CAPTIONS))
    np.savez_compressed(FOLDER / "clip.npz", vectors=vectors)
    pack(folder / "folders")


def write_command_line(folder):
    unpack("folders", folder)
    folder = folder / "command_line"
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for number, picture in enumerate(pictures()):
        Image.fromarray(picture).save(folder / "pictures" / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": CAPTIONS[number], "label": LABELS[number]}
        rows.append(json.dumps(row))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    common = {"loop": {"batch_size": 4, "ema_decay": 0.9, "jit_compile": False}}
    sizes = {"folder": "pictures", "height": SIZE, "width": SIZE, "flip": True}
    whole = "../folders/stable_diffusion"
    parts = {"diffusion_model": NETWORK, "schedule": {"prediction": "v"}}
    towers = {"image_tower": TOWER, "text_encoder": {**TEXT, "projection_width": 4}}
    configurations = {
        "diffusion": {
            "model": {**parts, "autoencoder": whole, "text_encoder": whole},
            "data": {**sizes, "cache": "cache"},
        },
        "clip": {"model": towers, "data": sizes},
    }
    for kind, configuration in configurations.items():
        path = folder / "configuration.json"
        path.write_text(json.dumps({**common, **configuration}), "utf-8")
        command = [sys.executable, "-m", "kdiffusion", "train", kind, "--quiet"]
        command += ["--config", path.name, "--output", kind, "--steps", str(STOP)]
        subprocess.run(command, cwd=folder, check=True)
        path.unlink()
        thin(folder / kind)
    pack(folder)


if __name__ == "__main__":
    main()
