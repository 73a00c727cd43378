"""Writes components.npz: what diffusers and transformers compute with tiny random networks.

    python tests/golden/make_components.py

Each case holds a config, inputs and float64 outputs, channels last; the weights are not stored,
`random_weights.py` makes them from their names.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from random_weights import random_weight
from transformers import CLIPTextConfig, CLIPTextModel

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "bos_token_id": 62,
    "eos_token_id": 63,
}
DIFFUSION = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SD2 = {**DIFFUSION, "use_linear_projection": True, "attention_head_dim": [2, 4]}
AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CONFIGS = {
    "text_encoder of SD 1": {**TEXT, "hidden_act": "quick_gelu"},
    "text_encoder of SD 2": {**TEXT, "hidden_act": "gelu"},
    "image_encoder": AUTOENCODER,
    "image_decoder": AUTOENCODER,
    "diffusion_model of SD 1": {**DIFFUSION, "attention_head_dim": 4},
    "diffusion_model of SD 2": SD2,
    "diffusion_model for inpainting": {**SD2, "in_channels": 9},
}


def main():
    torch.set_grad_enabled(False)
    arrays = {}
    for case, config in CONFIGS.items():
        run = RUNS[case.split()[0]]
        inputs, outputs = run(config, np.random.default_rng(0))
        arrays[f"{case}|config"] = np.array(json.dumps(config))
        arrays |= {f"{case}|input|{name}": array for name, array in inputs.items()}
        arrays |= {
            f"{case}|output|{name}": tensor.numpy().astype(np.float32)
            for name, tensor in outputs.items()
        }
    np.savez_compressed(Path(__file__).with_name("components.npz"), **arrays)


def encode_text(config, generator):
    tokens = generator.integers(0, 62, (2, 12), dtype=np.int32)
    tokens[0, 5:], tokens[1, -1] = 63, 63
    model = filled(CLIPTextModel(CLIPTextConfig(**config)))
    outputs = model(torch.from_numpy(tokens).long())
    return {"tokens": tokens}, {
        "context": outputs.last_hidden_state,
        "pooled": outputs.pooler_output,
    }


def encode_image(config, generator):
    images = generator.uniform(-1.0, 1.0, (1, 40, 56, 3)).astype(np.float32)
    model = filled(AutoencoderKL.from_config(config))
    distribution = model.encode(channels_first(images)).latent_dist
    scale = model.config.scaling_factor
    return {"images": images}, {
        "mean": channels_last(distribution.mean * scale),
        "logvar": channels_last(distribution.logvar + 2.0 * np.log(scale)),
    }


def decode(config, generator):
    latents = generator.standard_normal((1, 5, 7, 4), np.float32)
    model = filled(AutoencoderKL.from_config(config))
    images = model.decode(channels_first(latents) / model.config.scaling_factor).sample
    return {"latents": latents}, {"images": channels_last(images)}


def predict(config, generator):
    model = filled(UNet2DConditionModel.from_config(config))
    channels, width = model.config.in_channels, model.config.cross_attention_dim
    inputs = {
        "latents": generator.standard_normal((3, 7, 5, channels), np.float32),
        "timestep": np.array([981.0, 17.5, 1.0], np.float32),
        "context": generator.standard_normal((3, 9, width), np.float32),
    }
    prediction = model(
        channels_first(inputs["latents"]),
        torch.from_numpy(inputs["timestep"]),
        torch.from_numpy(inputs["context"]).double(),
    ).sample
    return inputs, {"prediction": channels_last(prediction)}


RUNS = {
    "text_encoder": encode_text,
    "image_encoder": encode_image,
    "image_decoder": decode,
    "diffusion_model": predict,
}


def filled(model):
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(random_weight(name, tuple(tensor.shape))))
    return model.eval().double()


def channels_first(images):
    return torch.from_numpy(images).double().movedim(-1, 1)


def channels_last(images):
    return images.movedim(1, -1)


if __name__ == "__main__":
    main()
