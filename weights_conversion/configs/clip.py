"""The config.json files of CLIP's towers in transformers, to architecture fields and back.

transformers scatters dozens of text generation settings over its configs, and CLIP has no other
options than those read here, so unknown keys are passed over, as transformers does itself. A value
that changes the computation in a way the models here do not know is refused; a key that is missing
has the default of its transformers class.

Source: the signatures of transformers 5.24 `CLIPTextConfig`, `CLIPVisionConfig`, `CLIPConfig` and
`CLIPImageProcessor`.
"""

from __future__ import annotations

from typing import Any

from weights_conversion.configs.options import (
    Options,
    flag,
    names,
    natural,
    number,
    numbers,
    one_of,
    unsupported,
)

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
_ACTIVATIONS = ("quick_gelu", "gelu")
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")

_IMAGE_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_IMAGE_CLASS = "CLIPVisionModelWithProjection"
_PREPROCESSOR_DEFAULTS = {
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


def text_encoder_fields(config: Options) -> dict[str, Any]:
    """Return the text encoder's fields from a CLIPTextModel(WithProjection) config.

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
    projects = architecture == "CLIPTextModelWithProjection"
    vocabulary_size, end_id = natural(options, "vocab_size"), options["eos_token_id"]
    if type(end_id) is not int or end_id == 2 or not 0 <= end_id < vocabulary_size:
        end_id = vocabulary_size - 1
    return {
        "vocabulary_size": vocabulary_size,
        "max_length": natural(options, "max_position_embeddings"),
        **_transformer_fields(options),
        "projection_width": natural(options, "projection_dim") if projects else None,
        "end_id": end_id,
    }


def text_encoder_config(fields: Options) -> dict[str, Any]:
    """Return the CLIPTextModel(WithProjection) config of a text encoder."""
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


def image_tower_fields(config: Options, preprocessor: Options | None = None) -> dict[str, Any]:
    """Return the image tower's fields from a CLIPVisionModelWithProjection config.

    Args:
        config: the config.
        preprocessor: what preprocessor_config.json says of a picture's mean and deviation; None
            for CLIP's own.

    Raises:
        CheckpointMismatch: another class, or an option that the models here do not know.
    """
    model_type = config.get("model_type", "clip_vision_model")
    if model_type != "clip_vision_model":
        raise unsupported("model_type", model_type, "clip_vision_model")
    options = {**_IMAGE_DEFAULTS, **config}
    options["architectures"] = options.get("architectures") or [_IMAGE_CLASS]
    names(options, "architectures", (_IMAGE_CLASS,), 1)
    image_size, patch_size = natural(options, "image_size"), natural(options, "patch_size")
    if image_size % patch_size:
        raise unsupported("patch_size", patch_size, f"a divisor of {image_size}")
    channels = natural(options, "num_channels")
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "image_channels": channels,
        **_transformer_fields(options),
        "projection_width": natural(options, "projection_dim"),
        **_normalization({**_PREPROCESSOR_DEFAULTS, **(preprocessor or {})}, channels),
    }


def _normalization(options: Options, channels: int) -> dict[str, tuple[float, ...]]:
    if not flag(options, "do_normalize"):
        return {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return {
        "mean": numbers(options, "image_mean", channels, -10, 10),
        "std": numbers(options, "image_std", channels, 1e-6, 10),
    }


def _transformer_fields(options: Options) -> dict[str, Any]:
    width, num_heads = natural(options, "hidden_size"), natural(options, "num_attention_heads")
    if width % num_heads:
        raise unsupported("num_attention_heads", num_heads, f"a divisor of {width}")
    return {
        "width": width,
        "depth": natural(options, "num_hidden_layers"),
        "num_heads": num_heads,
        "mlp_width": natural(options, "intermediate_size"),
        "activation": one_of(options, "hidden_act", _ACTIVATIONS),
        "epsilon": number(options, "layer_norm_eps", 0, 1),
    }


def image_tower_config(fields: Options) -> dict[str, Any]:
    """Return the CLIPVisionModelWithProjection config of an image tower."""
    return {
        "architectures": [_IMAGE_CLASS],
        "model_type": "clip_vision_model",
        "hidden_size": fields["width"],
        "intermediate_size": fields["mlp_width"],
        "projection_dim": fields["projection_width"],
        "num_hidden_layers": fields["depth"],
        "num_attention_heads": fields["num_heads"],
        "num_channels": fields["image_channels"],
        "image_size": fields["image_size"],
        "patch_size": fields["patch_size"],
        "hidden_act": fields["activation"],
        "layer_norm_eps": fields["epsilon"],
    }


def preprocessor_config(fields: Options) -> dict[str, Any]:
    """Return the CLIPImageProcessor config of an image tower."""
    side = fields["image_size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": fields["image_channels"] == 3,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # PIL's bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(fields["mean"]),
        "image_std": list(fields["std"]),
    }


def clip_fields(
    config: Options, preprocessor: Options | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the text encoder's and the image tower's fields from a CLIPModel config.

    Args:
        config: the config. In old ones `text_config_dict` and `vision_config_dict` stand beside
            the towers' configs and overrule them.
        preprocessor: see `image_tower_fields`.

    Raises:
        CheckpointMismatch: another class, or an option that the models here do not know.
    """
    if config.get("model_type") != "clip":
        raise unsupported("model_type", config.get("model_type"), "clip")
    projection = {"projection_dim": config.get("projection_dim", _TEXT_DEFAULTS["projection_dim"])}
    text, image = (_tower(config, name) for name in ("text_config", "vision_config"))
    return (
        text_encoder_fields(text | projection | {"architectures": [_TEXT_CLASSES[1]]}),
        image_tower_fields(image | projection | {"architectures": [_IMAGE_CLASS]}, preprocessor),
    )


def _tower(config: Options, name: str) -> dict[str, Any]:
    parts = [config.get(key) or {} for key in (name, f"{name}_dict")]
    for part in parts:
        if not isinstance(part, dict):
            raise unsupported(name, part, "an object")
    return {**parts[0], **parts[1]}


def clip_config(text_encoder: Options, image_tower: Options) -> dict[str, Any]:
    """Return the CLIPModel config of a text encoder and an image tower.

    Raises:
        ValueError: they project to different widths.
    """
    width = image_tower["projection_width"]
    if text_encoder["projection_width"] != width:
        raise ValueError(
            "Text encoder and image tower must project to the same width. Received: "
            f"projection_width={text_encoder['projection_width']} and {width}"
        )
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "text_config": text_encoder_config(text_encoder),
        "vision_config": image_tower_config(image_tower),
    }
