"""The config.json of diffusers' autoencoders, to architecture fields and back.

The latent scale and shift have three forms there: latents = (code - shift_factor) * scaling_factor,
and in newer configs also (code - latents_mean) / latents_std * scaling_factor, by channel. A
`VQModel` has its scaling_factor only.

Sources: the signatures of diffusers 0.42 `AutoencoderKL` and `VQModel`, and how its Stable
Diffusion XL and Stable Diffusion 3 pipelines decode.
"""

from __future__ import annotations

from typing import Any

from weights_conversion.configs.options import (
    Options,
    checked,
    flag,
    multiples,
    names,
    natural,
    number,
    numbers,
    one_of,
    unsupported,
)

LATENT_SCALE = 0.18215  # of Stable Diffusion 1 and 2, and the default of the classes

_SHARED_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "scaling_factor": LATENT_SCALE,
    "mid_block_add_attention": True,
}
_DEFAULTS: dict[str, Options] = {
    "AutoencoderKL": {
        **_SHARED_DEFAULTS,
        "latent_channels": 4,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    "VQModel": {
        **_SHARED_DEFAULTS,
        "latent_channels": 3,
        "num_vq_embeddings": 256,
        "vq_embed_dim": None,
    },
}
_NEUTRAL: dict[str, Options] = {
    "AutoencoderKL": {"act_fn": "silu"},
    "VQModel": {"act_fn": "silu", "norm_type": "group", "lookup_from_codebook": False},
}
_WITHOUT_EFFECT = {"sample_size", "force_upcast"}
_SCALES = (1e-6, 1e6)
_SHIFTS = (-1e6, 1e6)


def autoencoder_fields(config: Options) -> dict[str, Any]:
    """Return the autoencoder's fields from an AutoencoderKL or VQModel config.

    Raises:
        CheckpointMismatch: another class, or an option that the models here do not know.
    """
    name = one_of({"_class_name": None, **config}, "_class_name", _DEFAULTS)
    options = checked(config, name, _DEFAULTS[name], _NEUTRAL[name], _WITHOUT_EFFECT)
    channels = multiples(options, "block_out_channels", natural(options, "norm_num_groups"))
    names(options, "down_block_types", ("DownEncoderBlock2D",), len(channels))
    names(options, "up_block_types", ("UpDecoderBlock2D",), len(channels))
    if options["out_channels"] != options["in_channels"]:
        raise unsupported("out_channels", options["out_channels"], f"{options['in_channels']}")
    has_codebook = name == "VQModel"
    scale, shift = _code_fields(options) if has_codebook else _latent_fields(options)
    return {
        "image_channels": natural(options, "in_channels"),
        "latent_channels": natural(options, "latent_channels"),
        "channels": channels,
        "layers_per_level": natural(options, "layers_per_block"),
        "num_groups": natural(options, "norm_num_groups"),
        "latent_scale": scale,
        "latent_shift": shift,
        "mid_attention": flag(options, "mid_block_add_attention"),
        "quant_conv": has_codebook or flag(options, "use_quant_conv"),
        "post_quant_conv": has_codebook or flag(options, "use_post_quant_conv"),
        "codebook_size": natural(options, "num_vq_embeddings") if has_codebook else None,
    }


def autoencoder_config(fields: Options, sample_size: int = 512) -> dict[str, Any]:
    """Return the AutoencoderKL or VQModel config of an image encoder and decoder.

    Args:
        fields: the architecture.
        sample_size: the picture's height and width above which diffusers' tiling works in tiles.

    Raises:
        CheckpointMismatch: a VQModel cannot be like this.
    """
    levels = len(fields["channels"])
    shared = {
        "sample_size": sample_size,
        "in_channels": fields["image_channels"],
        "out_channels": fields["image_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(fields["channels"]),
        "layers_per_block": fields["layers_per_level"],
        "latent_channels": fields["latent_channels"],
        "norm_num_groups": fields["num_groups"],
        "mid_block_add_attention": fields["mid_attention"],
    }
    if fields["codebook_size"] is None:
        return {
            "_class_name": "AutoencoderKL",
            **shared,
            **_latent_options(fields),
            "use_quant_conv": fields["quant_conv"],
            "use_post_quant_conv": fields["post_quant_conv"],
        }
    for key, only in (("quant_conv", True), ("post_quant_conv", True), ("latent_shift", 0.0)):
        if fields[key] != only:
            raise unsupported(key, fields[key], f"{only}, as in every VQModel")
    if not isinstance(fields["latent_scale"], float):
        raise unsupported("latent_scale", fields["latent_scale"], "one number for a VQModel")
    return {
        "_class_name": "VQModel",
        **shared,
        "num_vq_embeddings": fields["codebook_size"],
        "vq_embed_dim": fields["latent_channels"],
        "scaling_factor": fields["latent_scale"],
    }


def _latent_fields(options: Options) -> tuple[Any, Any]:
    """Return the latent scale and shift of an AutoencoderKL: a number, or one by channel."""
    factor = number(options, "scaling_factor", *_SCALES)
    shift = 0.0
    if options["shift_factor"] is not None:
        shift = number(options, "shift_factor", *_SHIFTS)
    if options["latents_mean"] is None and options["latents_std"] is None:
        return factor, shift
    if shift:
        raise unsupported("shift_factor", shift, "null or 0 beside latents_mean")
    channels = natural(options, "latent_channels")
    deviations = numbers(options, "latents_std", channels, *_SCALES)
    return tuple(factor / x for x in deviations), numbers(
        options, "latents_mean", channels, *_SHIFTS
    )


def _latent_options(fields: Options) -> dict[str, Any]:
    """Return the options of an AutoencoderKL that say its latent scale and shift."""
    scale, shift = fields["latent_scale"], fields["latent_shift"]
    if isinstance(scale, float) and isinstance(shift, float):
        return {"scaling_factor": scale, "shift_factor": shift or None}
    channels = fields["latent_channels"]
    scales = [scale] * channels if isinstance(scale, float) else scale
    return {
        "scaling_factor": 1.0,
        "latents_mean": [shift] * channels if isinstance(shift, float) else list(shift),
        "latents_std": [1.0 / x for x in scales],
    }


def _code_fields(options: Options) -> tuple[float, float]:
    """Return the latent scale and shift of a VQModel, whose codes are as wide as its latents."""
    width = natural(options, "latent_channels")
    if options["vq_embed_dim"] not in (None, width):
        raise unsupported("vq_embed_dim", options["vq_embed_dim"], f"null or {width}")
    return number(options, "scaling_factor", *_SCALES), 0.0
