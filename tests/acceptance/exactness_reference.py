"""The reference's side of `exactness.py`: full-size folders with random weights, and results.

    python tests/acceptance/reference.py sd15|sd21 FOLDER [--latents]

Writes FOLDER/checkpoint with diffusers and transformers, and FOLDER/components.npz or, with
`--latents`, FOLDER/latents.npz: inputs, and outputs in float32 and in float64, channels last.

diffusers rounds sinusoids and noise levels to float32 whatever the dtype of its networks. So that
float64 means float64, the modules that do so are given it under the name of float32.
"""

import argparse
import gzip
import json
import math
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models import embeddings
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_dpmsolver_multistep,
    scheduling_euler_discrete,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden.random_weights import random_weight  # noqa: E402

# What the published configs say beside the defaults of their classes.
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
FAMILIES = {
    "sd15": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
            "projection_dim": 768,
        },
        "scheduler": {"_class_name": "PNDMScheduler", **_SCHEDULER},
        "pad_token": "<|endoftext|>",
    },
    "sd21": {
        "unet": {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
            "projection_dim": 512,
        },
        "scheduler": {
            "_class_name": "DDIMScheduler",
            **_SCHEDULER,
            "prediction_type": "v_prediction",
        },
        "pad_token": "!",
    },
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_TEXT = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 49408}

PROMPTS = ("a red circle", "", "An astronaut riding a horse, oil on canvas (1890)")
# sampler and spacing: class and options of the scheduler
SCHEDULERS = {
    ("ddim", "leading"): (diffusers.DDIMScheduler, {"timestep_spacing": "leading"}),
    ("euler", "leading"): (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    ("dpmpp_2m", "karras"): (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
}
# latents' height and width: timestep and place of the prompt in PROMPTS, for each row of a batch
DIFFUSION_ROWS = {
    (16, 16): ((981, 0), (500.5, 0), (1, 0), (781, 0), (981, 2)),
    (7, 5): ((981, 0), (1, 0)),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=("components", "latents"))
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    checkpoint = arguments.folder / "checkpoint"
    if not (checkpoint / "model_index.json").exists():
        write_checkpoint(checkpoint, FAMILIES[arguments.family])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    makers = {"components": component_inputs, "latents": latents_inputs}
    results = {name: {"inputs": makers[name](pipeline)} for name in arguments.names}
    compute(pipeline, "float32", results)
    for model in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
        model.double()
    with exact():
        compute(pipeline, "float64", results)
    for name, groups in results.items():
        arrays = {
            f"{group}|{case}|{array_name}": array
            for group, cases in groups.items()
            for case, arrays in cases.items()
            for array_name, array in arrays.items()
        }
        np.savez(arguments.folder / f"{name}.npz", **arrays)


def compute(pipeline, dtype, results):
    """Adds the outputs of all cases in the pipeline's dtype."""
    networks = {
        "text_encoder": encode_text,
        "image_encoder": encode_image,
        "image_decoder": decode,
        "diffusion_model": predict,
    }
    for groups in results.values():
        groups[dtype] = {}
        for case, inputs in groups["inputs"].items():
            log(f"  {case} with diffusers in {dtype}")
            run = networks.get(case.split()[0], final_latents)
            groups[dtype][case] = run(pipeline, **inputs)


def write_checkpoint(folder, family):
    log(f"writing {folder}")
    write_tokenizer(folder / "tokenizer", family["pad_token"])
    scheduler = folder / "scheduler"
    scheduler.mkdir(exist_ok=True)
    (scheduler / "scheduler_config.json").write_text(json.dumps(family["scheduler"], indent=2))
    with torch.device("meta"):
        models = {
            "unet": diffusers.UNet2DConditionModel(**family["unet"]),
            "vae": diffusers.AutoencoderKL(**_VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**_TEXT, **family["text_encoder"])),
        }
    for name, model in models.items():
        model.to_empty(device="cpu")
        for tensor_name, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(random_weight(tensor_name, tuple(tensor.shape))))
        model.save_pretrained(folder / name)
    pipeline = diffusers.StableDiffusionPipeline(
        **models,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=getattr(diffusers, family["scheduler"]["_class_name"]).from_pretrained(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_config(folder)


def write_tokenizer(folder, pad_token):
    """CLIP's tokenizer as the published folders have it, from OpenAI's file of merges."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(os.environ["KDIFFUSION_CLIP_VOCAB"], "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    contents = {
        "vocab.json": json.dumps({token: index for index, token in enumerate(tokens)}),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(config),
        "special_tokens_map.json": json.dumps({**special, "pad_token": pad_token}),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def exact():
    """A scope in which diffusers' sinusoids and noise levels are float64."""
    with ExitStack() as stack:
        for module in (
            embeddings,
            scheduling_ddim,
            scheduling_euler_discrete,
            scheduling_dpmsolver_multistep,
        ):
            for library in ("torch", "np"):
                if hasattr(module, library):
                    doubled = _Doubled(getattr(module, library))
                    stack.enter_context(mock.patch.object(module, library, doubled))
        yield


class _Doubled:
    """A library whose float32 is float64."""

    def __init__(self, library):
        self._library = library

    def __getattr__(self, name):
        return getattr(self._library, "float64" if name == "float32" else name)


def component_inputs(pipeline):
    """Case to inputs; a case is the name of a network and a size."""
    generator = np.random.default_rng(0)
    cases = {"text_encoder 77": {"prompts": np.array(PROMPTS)}}
    for height, width in ((40, 56), (136, 72)):
        images = generator.uniform(-1.0, 1.0, (1, height, width, 3)).astype(np.float32)
        cases[f"image_encoder {height}x{width}"] = {"images": images}
    for height, width in ((7, 5), (16, 16)):
        latents = generator.standard_normal((1, height, width, 4), np.float32)
        cases[f"image_decoder {height}x{width}"] = {"latents": latents}
    context = encode_text(pipeline, PROMPTS)["context"]
    for (height, width), rows in DIFFUSION_ROWS.items():
        timesteps, prompts = zip(*rows)
        latents = generator.standard_normal((1, height, width, 4), np.float32)
        cases[f"diffusion_model {height}x{width}"] = {
            "latents": latents.repeat(len(rows), axis=0),
            "timestep": np.array(timesteps, np.float32),
            "context": context[list(prompts)],
        }
    return cases


def latents_inputs(pipeline):
    """Case to settings of `text_to_image`; a case is the name of a sampler and a size."""
    spacings = {"ddim": "leading", "euler": "leading", "dpmpp_2m": "karras"}
    sizes = {"ddim": (128, 128), "euler": (136, 72), "dpmpp_2m": (128, 128)}
    return {
        f"{sampler} {height}x{width}": {
            "prompt": np.array(PROMPTS[0]),
            "num_steps": np.array(20),
            "unconditional_guidance_scale": np.array(7.5),
            "seed": np.array(42),
            "sampler": np.array(sampler),
            "spacing": np.array(spacings[sampler]),
            "height": np.array(height),
            "width": np.array(width),
        }
        for sampler, (height, width) in sizes.items()
    }


def encode_text(pipeline, prompts):
    ids = pipeline.tokenizer(
        list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return {"context": pipeline.text_encoder(ids)[0].numpy()}


def encode_image(pipeline, images):
    distribution = pipeline.vae.encode(tensor(pipeline, images)).latent_dist
    scale = pipeline.vae.config.scaling_factor
    return {
        "mean": channels_last(distribution.mean * scale),
        "logvar": channels_last(distribution.logvar + 2.0 * math.log(scale)),
    }


def decode(pipeline, latents):
    codes = tensor(pipeline, latents) / pipeline.vae.config.scaling_factor
    return {"images": channels_last(pipeline.vae.decode(codes).sample)}


def predict(pipeline, latents, timestep, context):
    prediction = pipeline.unet(
        tensor(pipeline, latents),
        torch.from_numpy(timestep),
        torch.from_numpy(context).to(pipeline.dtype),
    ).sample
    return {"prediction": channels_last(prediction)}


def final_latents(
    pipeline, prompt, num_steps, unconditional_guidance_scale, seed, sampler, spacing, height, width
):
    generator = torch.Generator("cpu").manual_seed(int(seed))
    start = {"generator": generator}
    if pipeline.dtype == torch.float64:
        # The same numbers: float64 ones would be another stream.
        shape = (1, 4, int(height) // 8, int(width) // 8)
        start = {"latents": torch.randn(shape, generator=generator).double()}
    published = pipeline.scheduler
    scheduler, options = SCHEDULERS[str(sampler), str(spacing)]
    pipeline.scheduler = scheduler.from_config(published.config, **options)
    latents = pipeline(
        str(prompt),
        height=int(height),
        width=int(width),
        num_inference_steps=int(num_steps),
        guidance_scale=float(unconditional_guidance_scale),
        output_type="latent",
        **start,
    ).images
    pipeline.scheduler = published
    return {"latents": channels_last(latents)}


def tensor(pipeline, images):
    """Channels first, in the precision of the pipeline."""
    return torch.from_numpy(images).movedim(-1, 1).to(pipeline.dtype)


def channels_last(images):
    return images.movedim(1, -1).numpy()


def log(message):
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
