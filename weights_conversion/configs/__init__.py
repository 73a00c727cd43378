"""The config.json files of diffusers and transformers, to fields and back."""

from weights_conversion.configs.autoencoder import (
    autoencoder_config,
    autoencoder_fields,
)
from weights_conversion.configs.clip import (
    clip_config,
    clip_fields,
    image_tower_config,
    image_tower_fields,
    preprocessor_config,
    text_encoder_config,
    text_encoder_fields,
)
from weights_conversion.configs.diffusion_model import (
    diffusion_model_config,
    diffusion_model_fields,
)
from weights_conversion.configs.scheduler import scheduler_config, scheduler_fields

__all__ = [
    "autoencoder_config",
    "autoencoder_fields",
    "clip_config",
    "clip_fields",
    "diffusion_model_config",
    "diffusion_model_fields",
    "image_tower_config",
    "image_tower_fields",
    "preprocessor_config",
    "scheduler_config",
    "scheduler_fields",
    "text_encoder_config",
    "text_encoder_fields",
]
