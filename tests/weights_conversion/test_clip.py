"""Architecture fields of CLIP's towers from config.json files, and back."""

import pytest

from weights_conversion import CheckpointMismatch, configs

# openai/clip-vit-large-patch14, without what transformers passes over too.
TEXT = {
    "eos_token_id": 2,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "top_k": 50,
}
VISION = {
    "dropout": 0.0,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
CLIP = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "logit_scale_init_value": 2.6592,
    "projection_dim": 768,
    "text_config": TEXT,
    "text_config_dict": {"hidden_size": 768, "projection_dim": 768},
    "vision_config": VISION | {"hidden_size": 512},
    "vision_config_dict": {"hidden_size": 1024, "projection_dim": 768},
}
VIT_L = {
    "image_size": 224,
    "patch_size": 14,
    "image_channels": 3,
    "width": 1024,
    "depth": 24,
    "num_heads": 16,
    "mlp_width": 4096,
    "activation": "quick_gelu",
    "epsilon": 1e-5,
    "projection_width": 768,
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


def test_vit_l():
    assert configs.image_tower_fields(VISION | {"projection_dim": 768}) == VIT_L


def test_a_whole_clip():
    text, image = configs.clip_fields(CLIP)
    assert image == VIT_L
    assert text["projection_width"] == 768
    assert (text["width"], text["depth"], text["end_id"]) == (768, 12, 49407)


def test_both_towers_survive_writing():
    text, image = configs.clip_fields(CLIP)
    image |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.25, 1.0), "image_size": 28}
    written = configs.clip_config(text, image)
    preprocessor = configs.preprocessor_config(image)
    assert configs.clip_fields(written, preprocessor) == (text, image)
    assert preprocessor["crop_size"] == {"height": 28, "width": 28}


def test_pictures_that_are_not_normalized():
    fields = configs.image_tower_fields(VISION, {"do_normalize": False, "image_mean": [9.0]})
    assert (fields["mean"], fields["std"]) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "siglip_vision_model"),
        ("architectures", ["CLIPVisionModel"]),
        ("hidden_act", "gelu_new"),
        ("image_size", [224, 224]),
        ("patch_size", 15),
        ("num_attention_heads", 7),
        ("projection_dim", None),
    ],
)
def test_options_of_the_image_tower_that_change_the_computation(key, value):
    with pytest.raises(CheckpointMismatch, match=f"{key} = "):
        configs.image_tower_fields(VISION | {key: value})


@pytest.mark.parametrize(
    "key, value",
    [("image_mean", [0.5]), ("image_mean", 0.5), ("image_std", [0.5, 0, 0.5])],
)
def test_normalizations_that_are_none(key, value):
    with pytest.raises(CheckpointMismatch, match=f"{key} = "):
        configs.image_tower_fields(VISION, {key: value})


@pytest.mark.parametrize(
    "key, value", [("model_type", "siglip"), ("text_config", [1]), ("projection_dim", None)]
)
def test_configs_that_are_no_clip(key, value):
    with pytest.raises(CheckpointMismatch, match=f"{key} = "):
        configs.clip_fields(CLIP | {key: value})


def test_towers_of_different_widths_are_no_clip():
    text, image = configs.clip_fields(CLIP)
    with pytest.raises(ValueError, match="projection_width=768 and 512"):
        configs.clip_config(text, image | {"projection_width": 512})
