"""Tiny Stable Diffusion files in CompVis names, made of the name tables and random numbers.

Shapes are told apart by what tells the families apart: contexts of 768 and 1024, groups of 32.
"""

import numpy as np

from weights_conversion import rows, write

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": (64, 128),
    "layers_per_level": 1,
    "depths": (1, 0),
    "mid_depth": 1,
    "num_heads": (8, 8),
    "context_width": 768,
    "num_classes": None,
    "linear_projection": False,
    "num_groups": 32,
    "epsilon": 1e-5,
}
VAE = {
    "image_channels": 3,
    "latent_channels": 4,
    "channels": (32, 64),
    "layers_per_level": 1,
    "num_groups": 32,
    "latent_scale": 0.18215,
    "latent_shift": 0.0,
    "mid_attention": True,
    "quant_conv": True,
    "post_quant_conv": True,
    "codebook_size": None,
}
TEXT = {
    "vocabulary_size": 80,
    "max_length": 77,
    "width": 64,
    "depth": 2,
    "num_heads": 1,
    "mlp_width": 128,
    "activation": "quick_gelu",
    "epsilon": 1e-5,
    "projection_width": None,
    "end_id": 79,
}
FIELDS = {
    "sd1": {"unet": UNET, "vae": VAE, "text_encoder": TEXT},
    "sd1-inpaint": {"unet": UNET | {"in_channels": 9}, "vae": VAE, "text_encoder": TEXT},
    "sd2": {
        "unet": UNET | {"context_width": 1024, "linear_projection": True, "num_heads": (1, 2)},
        "vae": VAE,
        "text_encoder": TEXT | {"activation": "gelu"},
    },
}
KINDS = {
    "text_encoder": "text_encoder",
    "image_encoder": "vae",
    "image_decoder": "vae",
    "diffusion_model": "unet",
}


def weights(kind, fields, seed=0, dtype=np.float32):
    """Random variables of a kind of model, by kdiffusion path."""
    generator = np.random.default_rng([seed, *kind.encode()])
    return {
        row.kdiffusion: generator.standard_normal(row.shape, np.float32).astype(dtype)
        for row in rows(kind, fields)
    }


def tensors(family="sd1", kinds=KINDS, seed=0, dtype=np.float32, dialect="compvis"):
    """The tensors of a family's file, contiguous, by name."""
    found = {}
    for kind in kinds:
        fields = FIELDS[family][KINDS[kind]]
        found |= write(rows(kind, fields), weights(kind, fields, seed, dtype), dialect)
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def averaged(found, seed=1):
    """The moving average of the diffusion model in a file, under the names of training."""
    generator = np.random.default_rng(seed)
    return {
        "model_ema."
        + name.removeprefix("model.").replace(".", ""): generator.standard_normal(
            array.shape, np.float32
        )
        for name, array in found.items()
        if name.startswith("model.diffusion_model.")
    } | {
        "model_ema.decay": np.array(0.9999, np.float32),
        "model_ema.num_updates": np.array(7),
    }


def training_leftovers():
    """Tensors that CompVis's training leaves in its files and no model takes."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return {
        "betas": betas.astype(np.float32),
        "alphas_cumprod": np.cumprod(1 - betas).astype(np.float32),
        "scale_factor": np.array(0.18215, np.float32),
        "logvar": np.zeros(1000, np.float32),
        "first_stage_model.loss.logvar": np.zeros((), np.float32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
    }


def pickled(found, numbers=(), **entries):
    """A .ckpt file's content with these tensors in its state dict, and further entries."""
    from corpus.pickles import archive, dictionary, number, storage, tensor

    kinds = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}
    values, storages = {}, {}
    for name, array in found.items():
        array = np.asarray(array)
        key = str(len(storages))
        strides = [stride // array.itemsize for stride in np.ascontiguousarray(array).strides]
        kind = f"{kinds[array.dtype.name]}Storage"
        strides = strides if array.ndim else []
        values[name] = tensor(storage(key, kind, array.size), array.shape, strides)
        storages[key] = array.tobytes()
    counters = {name: number(value) for name, value in dict(numbers).items()}
    content = dictionary(state_dict=dictionary(**values), **counters, **entries)
    return archive(content, storages)
