"""The config.json files of diffusers and transformers, to architecture fields and back.

A config that changes the computation in a way the models here do not know is refused by key and
value; a key that is missing has the default of its diffusers or transformers class. In the config
of a diffusers model a key that is unknown here may stand only if it is null, false or empty, or
starts with an underscore. transformers scatters dozens of text generation settings over its
configs and CLIP's text model has no other options than those read here, so there unknown keys
are passed over, as transformers does itself.

Sources: the signatures of diffusers 0.42 `UNet2DConditionModel` and `AutoencoderKL`, and
transformers 5.23 `CLIPTextConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weights_conversion.options import (
    Options,
    flag,
    is_neutral,
    multiples,
    names,
    natural,
    number,
    one_of,
    per_level,
    same_on_levels,
    unsupported,
)
from weights_conversion.schedulers import scheduler_config, scheduler_fields

__all__ = [
    "autoencoder_config",
    "autoencoder_fields",
    "diffusion_model_config",
    "diffusion_model_fields",
    "scheduler_config",
    "scheduler_fields",
    "text_encoder_config",
    "text_encoder_fields",
]

_UNET_DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
}
_UNET_NEUTRAL = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": False,
    "cross_attention_norm": None,
}
# A hint for the picture's size; training only; a float32 softmax, which is always used here; a
# part of addition_embed_type.
_UNET_WITHOUT_EFFECT = {
    "sample_size",
    "dropout",
    "upcast_attention",
    "addition_embed_type_num_heads",
}
_UP_BLOCK = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}

_AUTOENCODER_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_AUTOENCODER_NEUTRAL = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
_AUTOENCODER_WITHOUT_EFFECT = {"sample_size", "force_upcast"}

_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_TEXT_ACTIVATIONS = ("quick_gelu", "gelu")
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


def diffusion_model_fields(config: Options) -> dict[str, Any]:
    """Returns the diffusion model's fields from a UNet2DConditionModel config.

    `attention_head_dim` is the number of heads there, by a mistake that could never be corrected
    (github.com/huggingface/diffusers/issues/2011), unless `num_attention_heads` is set.

    Raises:
        CheckpointMismatch: another class, or an option that the models here do not know.
    """
    options = _check(
        config, "UNet2DConditionModel", _UNET_DEFAULTS, _UNET_NEUTRAL, _UNET_WITHOUT_EFFECT
    )
    channels = multiples(options, "block_out_channels", natural(options, "norm_num_groups"))
    levels = len(channels)
    blocks = names(options, "down_block_types", _UP_BLOCK, levels)
    mirrored = tuple(_UP_BLOCK[block] for block in reversed(blocks))
    if names(options, "up_block_types", _UP_BLOCK.values(), levels) != mirrored:
        raise unsupported("up_block_types", options["up_block_types"], f"{mirrored}")
    is_named_rightly = options["num_attention_heads"] is not None
    heads_key = "num_attention_heads" if is_named_rightly else "attention_head_dim"
    num_heads = per_level(options, heads_key, levels)
    if any(width % heads for width, heads in zip(channels, num_heads)):
        raise unsupported(heads_key, options[heads_key], f"divisors of {channels}")
    depths = per_level(options, "transformer_layers_per_block", levels)
    return {
        "in_channels": natural(options, "in_channels"),
        "out_channels": natural(options, "out_channels"),
        "channels": channels,
        "layers_per_level": same_on_levels(options, "layers_per_block", levels),
        "depths": tuple(0 if b == "DownBlock2D" else d for b, d in zip(blocks, depths)),
        "mid_depth": depths[-1],
        "num_heads": num_heads,
        "context_width": same_on_levels(options, "cross_attention_dim", levels),
        "linear_projection": flag(options, "use_linear_projection"),
        "num_groups": natural(options, "norm_num_groups"),
        "epsilon": number(options, "norm_eps", 0, 1),
    }


def diffusion_model_config(
    fields: Options, sample_size: int | Sequence[int] | None = None
) -> dict[str, Any]:
    """Returns the UNet2DConditionModel config of a diffusion model.

    Args:
        fields: the architecture.
        sample_size: the latents' side, or height and width, that diffusers draws by default.
    """
    depths = list(fields["depths"])
    if depths[-1] not in (0, fields["mid_depth"]):
        raise unsupported("mid_depth", fields["mid_depth"], f"{depths[-1]}, the last level's depth")
    blocks = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_channels"],
        "down_block_types": blocks,
        "up_block_types": [_UP_BLOCK[block] for block in reversed(blocks)],
        "block_out_channels": list(fields["channels"]),
        "layers_per_block": fields["layers_per_level"],
        "norm_num_groups": fields["num_groups"],
        "norm_eps": fields["epsilon"],
        "cross_attention_dim": fields["context_width"],
        # diffusers wants a number for levels without transformers too, and the middle's at the end
        "transformer_layers_per_block": _short(
            [depth or 1 for depth in depths[:-1]] + [fields["mid_depth"]]
        ),
        "attention_head_dim": _short(fields["num_heads"]),
        "use_linear_projection": fields["linear_projection"],
    }


def autoencoder_fields(config: Options) -> dict[str, Any]:
    """Returns the autoencoder's fields from an AutoencoderKL config.

    Raises:
        CheckpointMismatch: another class, or an option that the models here do not know.
    """
    options = _check(
        config,
        "AutoencoderKL",
        _AUTOENCODER_DEFAULTS,
        _AUTOENCODER_NEUTRAL,
        _AUTOENCODER_WITHOUT_EFFECT,
    )
    channels = multiples(options, "block_out_channels", natural(options, "norm_num_groups"))
    names(options, "down_block_types", ("DownEncoderBlock2D",), len(channels))
    names(options, "up_block_types", ("UpDecoderBlock2D",), len(channels))
    if options["out_channels"] != options["in_channels"]:
        raise unsupported("out_channels", options["out_channels"], f"{options['in_channels']}")
    if options["shift_factor"]:
        raise unsupported("shift_factor", options["shift_factor"], "null or 0")
    return {
        "image_channels": natural(options, "in_channels"),
        "latent_channels": natural(options, "latent_channels"),
        "channels": channels,
        "layers_per_level": natural(options, "layers_per_block"),
        "num_groups": natural(options, "norm_num_groups"),
        "latent_scale": number(options, "scaling_factor", 1e-6, 1e6),
        "latent_shift": 0.0,
        "mid_attention": flag(options, "mid_block_add_attention"),
        "quant_conv": flag(options, "use_quant_conv"),
        "post_quant_conv": flag(options, "use_post_quant_conv"),
    }


def autoencoder_config(fields: Options, sample_size: int = 512) -> dict[str, Any]:
    """Returns the AutoencoderKL config of an image encoder and decoder.

    Args:
        fields: the architecture.
        sample_size: the picture's height and width above which diffusers' tiling works in tiles.
    """
    levels = len(fields["channels"])
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": fields["image_channels"],
        "out_channels": fields["image_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(fields["channels"]),
        "layers_per_block": fields["layers_per_level"],
        "latent_channels": fields["latent_channels"],
        "norm_num_groups": fields["num_groups"],
        "scaling_factor": fields["latent_scale"],
        "shift_factor": fields["latent_shift"] or None,
        "use_quant_conv": fields["quant_conv"],
        "use_post_quant_conv": fields["post_quant_conv"],
        "mid_block_add_attention": fields["mid_attention"],
    }


def text_encoder_fields(config: Options) -> dict[str, Any]:
    """Returns the text encoder's fields from a CLIPTextModel(WithProjection) config.

    Old configs carry the id 2 for the end of text, which their models never used: they took the
    largest id of the row (github.com/huggingface/transformers/pull/24773), as is done here for
    every id that cannot be meant.

    Raises:
        CheckpointMismatch: another class, or an option that the models here do not know.
    """
    model_type = config.get("model_type", "clip_text_model")
    if model_type != "clip_text_model":
        raise unsupported("model_type", model_type, "clip_text_model")
    options = {**_TEXT_DEFAULTS, **config}
    options["architectures"] = options.get("architectures") or ["CLIPTextModel"]
    (architecture,) = names(options, "architectures", _TEXT_CLASSES, 1)
    width, num_heads = natural(options, "hidden_size"), natural(options, "num_attention_heads")
    if width % num_heads:
        raise unsupported("num_attention_heads", num_heads, f"a divisor of {width}")
    projects = architecture == "CLIPTextModelWithProjection"
    vocabulary_size, end_id = natural(options, "vocab_size"), options["eos_token_id"]
    if type(end_id) is not int or end_id == 2 or not 0 <= end_id < vocabulary_size:
        end_id = vocabulary_size - 1
    return {
        "vocabulary_size": vocabulary_size,
        "max_length": natural(options, "max_position_embeddings"),
        "width": width,
        "depth": natural(options, "num_hidden_layers"),
        "num_heads": num_heads,
        "mlp_width": natural(options, "intermediate_size"),
        "activation": one_of(options, "hidden_act", _TEXT_ACTIVATIONS),
        "epsilon": number(options, "layer_norm_eps", 0, 1),
        "projection_width": natural(options, "projection_dim") if projects else None,
        "end_id": end_id,
    }


def text_encoder_config(fields: Options) -> dict[str, Any]:
    """Returns the CLIPTextModel(WithProjection) config of a text encoder."""
    projects = fields["projection_width"] is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": fields["vocabulary_size"],
        "hidden_size": fields["width"],
        "intermediate_size": fields["mlp_width"],
        "projection_dim": fields["projection_width"] or fields["width"],
        "num_hidden_layers": fields["depth"],
        "num_attention_heads": fields["num_heads"],
        "max_position_embeddings": fields["max_length"],
        "hidden_act": fields["activation"],
        "layer_norm_eps": fields["epsilon"],
        "bos_token_id": fields["end_id"] - 1,  # CLIP's vocabularies end with these two
        "eos_token_id": fields["end_id"],
        "pad_token_id": 1,
    }


def _check(config: Options, expected_class: str, defaults, neutral, without_effect) -> Options:
    """Returns the options with the class's defaults, once each of them is understood."""
    name = config.get("_class_name")
    if name != expected_class:
        raise unsupported("_class_name", name, expected_class)
    for key, value in config.items():
        if key.startswith("_") or key in defaults or key in without_effect:
            continue
        if not is_neutral(value, neutral.get(key)):
            raise unsupported(key, value, repr(neutral.get(key, "no such option")))
    return {**defaults, **config}


def _short(values: Sequence[int]) -> int | list[int]:
    """Returns one number where all are equal, as the published configs have it."""
    return values[0] if len(set(values)) == 1 else list(values)
