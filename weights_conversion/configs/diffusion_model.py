"""The U-Net's config.json of diffusers, to architecture fields and back.

A config that changes the computation in a way the models here do not know is refused by key and
value; a key that is missing has the default of its diffusers or transformers class. In the config
of a diffusers model a key that is unknown here may stand only if it is null, false or empty, or
starts with an underscore.

Source: the signature of diffusers 0.42 `UNet2DConditionModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weights_conversion.configs.options import (
    Options,
    checked,
    flag,
    multiples,
    names,
    natural,
    number,
    per_level,
    same_on_levels,
    unsupported,
)

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
    "num_class_embeds": None,
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


def diffusion_model_fields(config: Options) -> dict[str, Any]:
    """Return the diffusion model's fields from a UNet2DConditionModel config.

    `attention_head_dim` is the number of heads there, by a mistake that could never be corrected
    (github.com/huggingface/diffusers/issues/2011), unless `num_attention_heads` is set.

    Raises:
        CheckpointMismatch: another class, or an option that the models here do not know.
    """
    options = checked(
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
        "context_width": _context_width(options, channels),
        "num_classes": _num_classes(options),
        "linear_projection": flag(options, "use_linear_projection"),
        "num_groups": natural(options, "norm_num_groups"),
        "epsilon": number(options, "norm_eps", 0, 1),
    }


def diffusion_model_config(
    fields: Options, sample_size: int | Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the UNet2DConditionModel config of a diffusion model.

    Args:
        fields: the architecture.
        sample_size: the latents' side, or height and width, that diffusers draws by default.
    """
    depths = list(fields["depths"])
    if depths[-1] not in (0, fields["mid_depth"]):
        raise unsupported("mid_depth", fields["mid_depth"], f"{depths[-1]}, the last level's depth")
    if fields["mid_depth"] == 0:
        raise unsupported("mid_depth", 0, "at least 1, as in every middle of diffusers")
    num_classes, context_width = fields["num_classes"], fields["context_width"]
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
        "cross_attention_dim": context_width or list(fields["channels"]),
        "num_class_embeds": None if num_classes is None else num_classes + 1,
        # diffusers wants a number for levels without transformers too, and the middle's at the end
        "transformer_layers_per_block": _short(
            [depth or 1 for depth in depths[:-1]] + [fields["mid_depth"]]
        ),
        "attention_head_dim": _short(fields["num_heads"]),
        "use_linear_projection": fields["linear_projection"],
    }


def _context_width(options: Options, channels: tuple[int, ...]) -> int | None:
    """Return the width of the context; None if each level is to attend to its own tokens.

    diffusers does that when it is given no context; the widths of a list have to be the levels'.
    """
    if options["cross_attention_dim"] in (list(channels), channels):
        return None
    return same_on_levels(options, "cross_attention_dim", len(channels))


def _num_classes(options: Options) -> int | None:
    """Return the number of classes; the last embedding stands for none of them."""
    if options["num_class_embeds"] is None:
        return None
    if natural(options, "num_class_embeds") == 1:
        raise unsupported("num_class_embeds", 1, "at least 2, the last of them for no class")
    return options["num_class_embeds"] - 1


def _short(values: Sequence[int]) -> int | list[int]:
    """Return one number where all are equal, as the published configs have it."""
    return values[0] if len(set(values)) == 1 else list(values)
