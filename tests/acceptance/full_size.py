"""Stable Diffusion 1 and 2 as files of random numbers, in full size or as toys."""

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from corpus import models  # noqa: E402

from kdiffusion.text.tokenizer import SimpleTokenizer  # noqa: E402
from weights_conversion import (  # noqa: E402
    FAMILIES,
    KINDS,
    Checkpoint,
    TensorInfo,
    rows,
    scheduler_config,
    write_component,
    write_index,
    write_scheduler,
)
from weights_conversion.names.layouts import stored_shapes  # noqa: E402

UNET = models.UNET | {"channels": (320, 640, 1280, 1280), "layers_per_level": 2}
UNET |= {"depths": (1, 1, 1, 0), "num_heads": (8, 8, 8, 8)}
VAE = models.VAE | {"channels": (128, 256, 512, 512), "layers_per_level": 2}
TEXT = models.TEXT | {"vocabulary_size": 49408, "end_id": 49407, "width": 768, "depth": 12}
TEXT |= {"num_heads": 12, "mlp_width": 3072}
FULL = {
    "sd1": {"unet": UNET, "vae": VAE, "text_encoder": TEXT},
    "sd2": {
        "unet": UNET
        | {"context_width": 1024, "linear_projection": True, "num_heads": (5, 10, 20, 20)},
        "vae": VAE,
        "text_encoder": TEXT
        | {"activation": "gelu", "width": 1024, "depth": 23, "num_heads": 16, "mlp_width": 4096},
    },
}
# A toy's text encoder has to be as wide as the context of its diffusion model.
TINY = {
    family: models.FIELDS[family]
    | {
        "text_encoder": models.FIELDS[family]["text_encoder"]
        | {"width": width, "num_heads": width // 64, "vocabulary_size": 514, "end_id": 513}
    }
    for family, width in (("sd1", 768), ("sd2", 1024))
}
PARTS = FAMILIES["sd1"].parts


def write_folder(path, family, fields, dtype=np.float16):
    """Writes a folder in diffusers' layout."""
    for component, kind in {part.folder: part.kind for part in PARTS}.items():
        tensors = random_tensors(tables(fields, component), "diffusers", dtype)
        config = KINDS[kind].config(fields[component], 64, 512)
        write_component(path, component, config, tensors)
    schedule = {
        "num_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction": "v" if family == "sd2" else "epsilon",
        "rescale_zero_terminal_snr": False,
        "trained_betas": None,
    }
    sampling = {
        "sampler": "ddim",
        "timestep_spacing": "leading",
        "sigma_spacing": None,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    write_scheduler(path, scheduler_config({"schedule": schedule, "sampling": sampling}))
    SimpleTokenizer.byte_level().save(path / "tokenizer")
    write_index(path)
    return path


def tables(fields, *components):
    """The rows of all models in some components."""
    parts = (part for part in PARTS if part.folder in components)
    return [row for part in parts for row in rows(part.kind, fields[part.folder])]


def random_tensors(table, dialect, dtype):
    """A checkpoint in one dialect's names that makes each tensor when it is asked for."""
    stored = [getattr(row, dialect) for row in table]
    shapes = {
        place.name: stored_shapes(place.layout, row.shape)[0] for place, row in zip(stored, table)
    }

    def load(name):
        generator = np.random.default_rng(list(name.encode()))
        return generator.standard_normal(shapes[name], np.float32).astype(dtype, copy=False)

    infos = {name: TensorInfo(shape, np.dtype(dtype)) for name, shape in shapes.items()}
    return Checkpoint(Path("random"), infos, load)
