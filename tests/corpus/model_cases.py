"""Threats 74 to 76 and 80: other models, parts, other names, and paths that are no file."""

import os
from pathlib import Path

import numpy as np
from corpus.case import Case
from corpus.models import FIELDS, KINDS, averaged, pickled, tensors, training_leftovers, weights
from safetensors.numpy import save

from weights_conversion import CheckpointError, CheckpointMismatch, open_single_file, read, rows

UNET = "model.diffusion_model."
SD1, SD2 = tensors("sd1"), tensors("sd2")


def read_model(path, kinds=KINDS, **settings):
    model = open_single_file(path, **settings)
    return {f"{kind}/{key}": array for kind in kinds for key, array in model.arrays(kind)}


def read_diffusion_model(path):
    return read_model(path, ["diffusion_model"])


def read_raw(path):
    return read_model(path, weights="raw")


def read_as_inpainting(path):
    table = rows("diffusion_model", FIELDS["sd1-inpaint"]["unet"])
    return dict(read(table, open_single_file(path).tensors("diffusion_model"), "compvis"))


def read_schedule(path):
    return open_single_file(path).schedule


def read_sd2(path):
    return read_model(path, prediction_type="v")


def expected(family="sd1", kinds=KINDS):
    return {
        f"{kind}/{key}": array
        for kind in kinds
        for key, array in weights(kind, FIELDS[family][KINDS[kind]]).items()
    }


def zeros(**shapes):
    return save({name: np.zeros(shape, np.float16) for name, shape in shapes.items()})


UNET_IN = f"{UNET}input_blocks.0.0.weight"
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "Stable Diffusion XL": {"conditioner.embedders.1.model.ln_final.weight": (8,)},
    "refiner": {"conditioner.embedders.0.model.ln_final.weight": (8,)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (8, 8)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x.weight": (8, 8)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "LoRA": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)},
    "textual inversion": {"emb_params": (2, 768)},
    "autoencoder alone": {"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)},
    "upscaler": {UNET_IN: (8, 7, 3, 3), CONTEXT: (8, 1024)},
    "with depth": {UNET_IN: (8, 5, 3, 3), CONTEXT: (8, 1024)},
    "nothing that is known": {"layer.weight": (8, 8)},
}
WITHOUT_ONE = {name: a for name, a in SD1.items() if name != f"{UNET}out.2.bias"}
FLAT = {
    name: a.reshape(a.shape[:2]) if "proj_in.w" in name or "proj_out.w" in name else a
    for name, a in SD1.items()
}
OLD_NAMES = {name.replace(".text_model.", "."): array for name, array in SD1.items()}
BARE = {name.removeprefix(UNET): a for name, a in SD1.items() if name.startswith(UNET)}
NO_VAE = {name: array for name, array in SD1.items() if "first_stage" not in name}

CASES = [
    *(
        Case(74, f"looks like {title}", zeros(**shapes), CheckpointMismatch, title, use=read_model)
        for title, shapes in OTHERS.items()
    ),
    Case(
        74,
        "Stable Diffusion 1 into an inpainting model",
        save(SD1),
        CheckpointMismatch,
        "of another shape",
        use=read_as_inpainting,
    ),
    Case(
        74,
        "Stable Diffusion 2 that does not tell its prediction",
        save(SD2),
        CheckpointMismatch,
        "prediction_type=",
        use=read_schedule,
    ),
    Case(75, "a missing key", save(WITHOUT_ONE), CheckpointMismatch, "1 missing", use=read_model),
    Case(
        75,
        "an extra key",
        save(SD1 | {f"{UNET}extra.weight": np.zeros(3)}),
        CheckpointMismatch,
        "1 unexpected",
        use=read_model,
    ),
    Case(
        75,
        "a wrong shape",
        save(SD1 | {f"{UNET}out.2.bias": np.zeros(3, np.float32)}),
        CheckpointMismatch,
        "1 of another shape",
        use=read_model,
    ),
    Case(75, "2-D projections in version 1", save(FLAT), expected=expected(), use=read_model),
    Case(
        76,
        "module. before every name",
        save({f"module.{k}": v for k, v in SD1.items()}),
        expected=expected(),
        use=read_model,
    ),
    Case(
        76,
        "the diffusion model without prefix",
        save(BARE),
        expected=expected(kinds=["diffusion_model"]),
        use=read_diffusion_model,
    ),
    Case(76, "text_model. left out", save(OLD_NAMES), expected=expected(), use=read_model),
    Case(
        76,
        "with a moving average, raw weights",
        save(SD1 | averaged(SD1)),
        expected=expected(),
        use=read_raw,
    ),
    Case(
        76, "no autoencoder", save(NO_VAE), CheckpointMismatch, "no image_encoder", use=read_model
    ),
    Case(
        "valid",
        "a .ckpt of Stable Diffusion 1 with leftovers of training",
        pickled(SD1 | averaged(SD1) | training_leftovers(), {"global_step": 470_000}),
        expected=expected(),
        use=read_raw,
    ),
    Case(
        "valid",
        "a .ckpt of Stable Diffusion 2",
        pickled(SD2 | {"cond_stage_model.model.logit_scale": np.zeros((), np.float32)}),
        expected=expected("sd2"),
        use=read_sd2,
    ),
]


def folder(place):
    return place


def pipe(place):
    os.mkfifo(place / "pipe")
    return place / "pipe"


def dangling(place):
    (place / "link").symlink_to(place / "nothing")
    return place / "link"


def named(name):
    def make(place):
        path = Path(os.fsdecode(os.fsencode(place) + b"/" + name))
        path.write_bytes(save({"x": np.zeros(1, np.float32)}))
        return path

    return make


def unreadable(place):
    path = named(b"locked.safetensors")(place)
    path.chmod(0)
    return path


def through_a_file(place):
    return named(b"a.safetensors")(place) / "b.safetensors"


X = {"x": np.zeros(1, np.float32)}
CASES += [
    Case(80, "a folder", folder, CheckpointError, "folder", seconds=1),
    Case(80, "a pipe", pipe, CheckpointError, "not a file", seconds=1),
    Case(
        80, "/dev/zero", lambda place: Path("/dev/zero"), CheckpointError, "not a file", seconds=1
    ),
    Case(80, "a link to nothing", dangling, CheckpointError, "cannot be read", seconds=1),
    Case(80, "no such file", lambda place: place / "x", CheckpointError, "No such", seconds=1),
    Case(80, "a path through a file", through_a_file, CheckpointError, "cannot be read", seconds=1),
    Case(80, "no permission", unreadable, CheckpointError, "Permission denied", seconds=1),
    Case(80, "a name that is not UTF-8", named(b"\xff\xfe.safetensors"), expected=X, seconds=1),
    Case(80, "a NUL in the path", lambda place: place / "a\0b", CheckpointError, seconds=1),
]
