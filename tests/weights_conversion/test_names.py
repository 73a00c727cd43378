"""Name tables, layouts, and reading and writing through them."""

import math
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from weights_conversion import (
    CheckpointMismatch,
    DiffusersFolder,
    NonFiniteWeights,
    configs,
    read,
    rows,
    write,
    write_component,
)
from weights_conversion.names import layouts

SD1 = configs.diffusion_model_fields(
    {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}
)
SD2 = SD1 | {"num_heads": (5, 10, 20, 20), "context_width": 1024, "linear_projection": True}
INPAINT = SD1 | {"in_channels": 9}
TINY = SD1 | {
    "channels": (8, 16),
    "layers_per_level": 1,
    "depths": (2, 0),
    "mid_depth": 3,
    "num_heads": (2, 2),
    "context_width": 12,
    "num_groups": 4,
}
OF_CLASSES = TINY | {"context_width": None, "num_classes": 5}
WITHOUT_TRANSFORMERS_FIRST = TINY | {"channels": (8, 16, 24), "depths": (0, 1, 1)}
KL_F8 = configs.autoencoder_fields(
    {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
)
BARE = KL_F8 | {
    "channels": (8, 16),
    "num_groups": 4,
    "mid_attention": False,
    "quant_conv": False,
    "post_quant_conv": False,
}
CLIP_L = configs.text_encoder_fields(
    {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
)
OPEN_CLIP_H = CLIP_L | {
    "width": 1024,
    "depth": 23,
    "num_heads": 16,
    "mlp_width": 4096,
    "activation": "gelu",
}
PROJECTED = OPEN_CLIP_H | {"width": 8, "depth": 2, "mlp_width": 16, "projection_width": 6}
VIT_L = configs.image_tower_fields(
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    }
)
TINY_VIT = VIT_L | {
    "image_size": 12,
    "patch_size": 4,
    "image_channels": 2,
    "width": 8,
    "depth": 2,
    "mlp_width": 16,
    "projection_width": 6,
}

MODELS = {
    "SD1": ("diffusion_model", SD1),
    "SD2": ("diffusion_model", SD2),
    "inpaint": ("diffusion_model", INPAINT),
    "tiny": ("diffusion_model", TINY),
    "classes": ("diffusion_model", OF_CLASSES),
    "x4-like": ("diffusion_model", WITHOUT_TRANSFORMERS_FIRST),
    "encoder": ("image_encoder", KL_F8),
    "decoder": ("image_decoder", KL_F8),
    "bare encoder": ("image_encoder", BARE),
    "bare decoder": ("image_decoder", BARE),
    "CLIP-L": ("text_encoder", CLIP_L),
    "OpenCLIP-H": ("text_encoder", OPEN_CLIP_H),
    "projected": ("text_encoder", PROJECTED),
    "ViT-L": ("image_tower", VIT_L),
    "tiny ViT": ("image_tower", TINY_VIT),
}


def table(model):
    kind, fields = MODELS[model]
    return rows(kind, fields)


def random_weights(table, seed=0):
    generator = np.random.default_rng(seed)
    return {row.kdiffusion: generator.standard_normal(row.shape, np.float32) for row in table}


@pytest.fixture
def stored(tmp_path):
    """Return a function that writes tensors as a component and opens them."""
    count = iter(range(1000))

    def write_and_open(tensors):
        name = f"part{next(count)}"
        write_component(tmp_path, name, {}, tensors)
        return DiffusersFolder(tmp_path).weights(name)

    return write_and_open


# ── tables ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", MODELS)
def test_every_column_is_unique(model):
    names = table(model)
    assert len({row.kdiffusion for row in names}) == len(names)
    assert len({row.diffusers.name for row in names}) == len(names)
    assert len({row.compvis for row in names}) == len(names)
    shared = Counter(row.compvis.name for row in names)
    for name, count in shared.items():
        assert count == (3 if ".in_proj_" in name else 1)


@pytest.mark.parametrize(
    "models, tensors, parameters",
    [
        (["SD1"], 686, 859_520_964),
        (["SD2"], 686, 865_910_724),
        (["inpaint"], 686, 859_535_364),
        (["encoder", "decoder"], 248, 83_653_863),
        (["CLIP-L"], 196, 123_060_480),
        (["OpenCLIP-H"], 372, 340_387_840),
        (["ViT-L"], 392, 303_966_208),
    ],
)
def test_counts_are_those_of_the_published_models(models, tensors, parameters):
    names = [row for model in models for row in table(model)]
    assert len(names) == tensors
    assert sum(math.prod(row.shape) for row in names) == parameters


def test_open_clip_stacks_a_third_fewer_tensors():
    # Each of 23 layers has in_proj_weight and in_proj_bias in place of six tensors.
    assert len({row.compvis.name for row in table("OpenCLIP-H")}) == 372 - 23 * 4


@pytest.mark.parametrize(
    "model, kdiffusion, compvis, diffusers, shape",
    [
        (
            "SD1",
            "down_1_transformer_0/block_0/attn2/key/kernel",
            ("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"),
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            (768, 640),
        ),
        (
            "SD1",
            "down_2_downsample/conv/kernel",
            "model.diffusion_model.input_blocks.9.0.op.weight",
            "down_blocks.2.downsamplers.0.conv.weight",
            (3, 3, 1280, 1280),
        ),
        (
            "SD1",
            "up_0_upsample/conv/bias",
            "model.diffusion_model.output_blocks.2.1.conv.bias",
            "up_blocks.0.upsamplers.0.conv.bias",
            (1280,),
        ),
        (
            "SD1",
            "up_2_upsample/conv/bias",
            "model.diffusion_model.output_blocks.8.2.conv.bias",
            "up_blocks.2.upsamplers.0.conv.bias",
            (640,),
        ),
        (
            "SD1",
            "up_3_resnet_0/shortcut/kernel",
            "model.diffusion_model.output_blocks.9.0.skip_connection.weight",
            "up_blocks.3.resnets.0.conv_shortcut.weight",
            (1, 1, 960, 320),
        ),
        (
            "SD2",
            "mid_transformer/proj_in/kernel",
            "model.diffusion_model.middle_block.1.proj_in.weight",
            "mid_block.attentions.0.proj_in.weight",
            (1280, 1280),
        ),
        (
            "decoder",
            "up_0_resnet_2/conv1/kernel",
            "first_stage_model.decoder.up.3.block.2.conv1.weight",
            "decoder.up_blocks.0.resnets.2.conv1.weight",
            (3, 3, 512, 512),
        ),
        (
            "encoder",
            "mid_attention/out/kernel",
            "first_stage_model.encoder.mid.attn_1.proj_out.weight",
            "encoder.mid_block.attentions.0.to_out.0.weight",
            (512, 512),
        ),
        (
            "CLIP-L",
            "embedding/position_embedding",
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
            "text_model.embeddings.position_embedding.weight",
            (77, 768),
        ),
        (
            "classes",
            "label_embedding/table",
            "model.diffusion_model.label_emb.weight",
            "class_embedding.weight",
            (6, 32),
        ),
        (
            "OpenCLIP-H",
            "layer_22/attention/value/bias",
            "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias",
            "text_model.encoder.layers.22.self_attn.v_proj.bias",
            (1024,),
        ),
        (
            "projected",
            "projection/kernel",
            "cond_stage_model.model.text_projection",
            "text_projection.weight",
            (8, 6),
        ),
        (
            "tiny ViT",
            "embedding/patches/kernel",
            "visual.conv1.weight",
            "vision_model.embeddings.patch_embedding.weight",
            (4, 4, 2, 8),
        ),
        (
            "tiny ViT",
            "embedding/position_embedding",
            "visual.positional_embedding",
            "vision_model.embeddings.position_embedding.weight",
            (10, 8),
        ),
        (
            "tiny ViT",
            "layer_1/attention/key/kernel",
            "visual.transformer.resblocks.1.attn.in_proj_weight",
            "vision_model.encoder.layers.1.self_attn.k_proj.weight",
            (8, 8),
        ),
        ("tiny ViT", "projection/kernel", "visual.proj", "visual_projection.weight", (8, 6)),
    ],
)
def test_known_rows(model, kdiffusion, compvis, diffusers, shape):
    (row,) = [row for row in table(model) if row.kdiffusion == kdiffusion]
    assert row.compvis.name == compvis
    assert row.diffusers.name == diffusers
    assert row.shape == shape


def test_without_a_context_all_attention_is_to_the_feature_map():
    shapes = {row.kdiffusion: row.shape for row in table("classes")}
    for kind in ("key", "value"):
        assert shapes[f"down_0_transformer_0/block_0/attn2/{kind}/kernel"] == (8, 8)
        assert shapes[f"mid_transformer/block_0/attn2/{kind}/kernel"] == (16, 16)


def test_unknown_kind():
    with pytest.raises(ValueError, match="Known kinds: text_encoder, image_encoder"):
        rows("unet", SD1)


# ── layouts ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "layout, stored_shape, shape",
    [
        ("keep", (7,), (7,)),
        ("dense", (3, 2), (2, 3)),
        ("pointwise", (3, 2, 1, 1), (2, 3)),
        ("conv", (5, 4, 3, 2), (3, 2, 4, 5)),
    ],
)
def test_layouts_are_inverse_and_copy_nothing(layout, stored_shape, shape):
    array = np.arange(math.prod(stored_shape)).reshape(stored_shape)
    keras = layouts.to_keras(layout, array)
    assert keras.shape == shape
    assert np.shares_memory(keras, array)
    back = layouts.to_torch(layout, keras)
    np.testing.assert_array_equal(back, array)
    assert np.shares_memory(back, array)
    assert layouts.stored_shapes(layout, shape)[0] == stored_shape


def test_conv_is_in_the_right_order():
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # out, in, height, width
    assert layouts.to_keras("conv", array)[3, 4, 2, 1] == array[1, 2, 3, 4]


def test_stacked_thirds():
    array = np.arange(6 * 4).reshape(6, 4)
    for place in range(3):
        third = layouts.to_keras(f"dense[{place}]", array)
        np.testing.assert_array_equal(third, array[2 * place : 2 * place + 2].T)
    assert layouts.stored_shapes("dense[1]", (4, 2))[0] == (6, 4)
    assert layouts.stored_shapes("keep[1]", (2,)) == ((6,),)


def test_unknown_layout():
    with pytest.raises(ValueError, match="Known layouts: keep, dense, pointwise, conv"):
        layouts.to_keras("nchw", np.zeros(1))


# ── reading and writing ───────────────────────────────────────────────────────────────────────

SMALL = ["tiny", "classes", "x4-like", "bare encoder", "bare decoder", "projected", "tiny ViT"]


@pytest.mark.parametrize("dialect", ["compvis", "diffusers"])
@pytest.mark.parametrize("model", SMALL)
def test_round_trip(stored, model, dialect):
    weights = random_weights(table(model))
    tensors = write(table(model), weights, dialect)
    found = dict(read(table(model), stored(tensors), dialect))
    assert found.keys() == weights.keys()
    for path, array in weights.items():
        np.testing.assert_array_equal(found[path], array)


def test_ranks_that_are_written():
    weights = random_weights(table("tiny"))
    name = "down_blocks.0.attentions.0.proj_in.weight"
    assert write(table("tiny"), weights, "diffusers")[name].shape == (8, 8, 1, 1)
    linear = rows("diffusion_model", TINY | {"linear_projection": True})
    assert write(linear, weights, "diffusers")[name].shape == (8, 8)
    encoder = rows("image_encoder", BARE | {"mid_attention": True})
    weights = random_weights(encoder)
    name = "encoder.mid_block.attentions.0.to_q.weight"
    assert write(encoder, weights, "diffusers")[name].shape == (16, 16)
    name = "first_stage_model.encoder.mid.attn_1.q.weight"
    assert write(encoder, weights, "compvis")[name].shape == (16, 16, 1, 1)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_any_rank_of_a_projection_is_read(stored, rank):
    weights = random_weights(table("tiny"))
    tensors = write(table("tiny"), weights, "diffusers")
    for name in tensors:
        if ".proj_" in name and name.endswith(".weight"):
            tensors[name] = tensors[name].reshape(tensors[name].shape[:2] + (1,) * (rank - 2))
    found = dict(read(table("tiny"), stored(tensors), "diffusers"))
    path = "mid_transformer/proj_out/kernel"
    np.testing.assert_array_equal(found[path], weights[path])


@pytest.mark.parametrize("rank", [2, 4])
def test_old_attention_names_are_read(stored, rank):
    encoder = rows("image_encoder", BARE | {"mid_attention": True})
    weights = random_weights(encoder)
    tensors = write(encoder, weights, "diffusers")
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        for leaf in ("weight", "bias"):
            tensor = tensors.pop(f"encoder.mid_block.attentions.0.{new}.{leaf}")
            if leaf == "weight":
                tensor = tensor.reshape(tensor.shape + (1,) * (rank - 2))
            tensors[f"encoder.mid_block.attentions.0.{old}.{leaf}"] = tensor
    found = dict(read(encoder, stored(tensors), "diffusers"))
    for path, array in weights.items():
        np.testing.assert_array_equal(found[path], array)


def test_text_prefix_may_be_missing(stored):
    clip = rows("text_encoder", PROJECTED | {"projection_width": None})
    weights = random_weights(clip)
    tensors = write(clip, weights, "diffusers")
    assert all(name.startswith("text_model.") for name in tensors)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    assert dict(read(clip, stored(bare), "diffusers")).keys() == weights.keys()


def test_text_prefix_may_be_missing_in_single_files(stored):
    clip = rows("text_encoder", PROJECTED | {"activation": "quick_gelu"})
    tensors = write(clip, random_weights(clip), "compvis")
    bare = {name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    assert len(dict(read(clip, stored(bare), "compvis"))) == len(clip)


def test_a_tensor_under_both_names_is_refused(stored):
    clip = rows("text_encoder", PROJECTED)
    tensors = write(clip, random_weights(clip), "diffusers")
    tensors["final_layer_norm.bias"] = tensors["text_model.final_layer_norm.bias"]
    with pytest.raises(CheckpointMismatch, match="under two names"):
        read(clip, stored(tensors), "diffusers")


def test_harmless_tensors_are_passed_over(stored):
    clip = rows("text_encoder", PROJECTED)
    extra = np.zeros(3, np.int64)
    tensors = write(clip, random_weights(clip), "diffusers")
    tensors["text_model.embeddings.position_ids"] = extra
    assert len(dict(read(clip, stored(tensors), "diffusers"))) == len(clip)
    tensors = write(clip, random_weights(clip), "compvis")
    tensors["cond_stage_model.model.logit_scale"] = extra
    tensors["cond_stage_model.model.attn_mask"] = extra
    tensors["betas"] = tensors["model_ema.decay"] = extra
    assert len(dict(read(clip, stored(tensors), "compvis"))) == len(clip)


def test_missing_unexpected_and_wrong_are_named_before_reading(stored):
    names = table("tiny")
    tensors = write(names, random_weights(names), "diffusers")
    del tensors["conv_in.bias"]
    tensors["class_embedding.weight"] = np.zeros((3, 3), np.float32)
    tensors["conv_out.bias"] = np.zeros(5, np.float32)
    tensors["conv_norm_out.bias"] = np.zeros(8, np.int64)
    with pytest.raises(CheckpointMismatch) as caught:
        read(names, stored(tensors), "diffusers")
    message = str(caught.value)
    assert "1 missing: 'conv_in.bias'" in message
    assert "1 unexpected: 'class_embedding.weight'" in message
    assert "1 of another shape: 'conv_out.bias: (5,) instead of (4,)'" in message
    assert "1 not of a float dtype: 'conv_norm_out.bias: int64'" in message


def test_long_lists_are_cut(stored):
    with pytest.raises(
        CheckpointMismatch, match=r"\d+ missing: .* and \d+ more; 1 unexpected: 'x'"
    ):
        read(table("tiny"), stored({"x": np.zeros(1, np.float32)}), "diffusers")


def test_unexpected_within_a_single_file(stored):
    names = table("tiny")
    tensors = write(names, random_weights(names), "compvis")
    tensors["model.diffusion_model.label_emb.0.0.weight"] = np.zeros(1, np.float32)
    with pytest.raises(CheckpointMismatch, match="1 unexpected: 'model.diffusion_model.label_emb"):
        read(names, stored(tensors), "compvis")


def test_models_that_share_a_file(stored):
    encoder, decoder = table("bare encoder"), table("bare decoder")
    tensors = write(encoder, random_weights(encoder), "diffusers")
    tensors |= write(decoder, random_weights(decoder, seed=1), "diffusers")
    checkpoint = stored(tensors)
    with pytest.raises(CheckpointMismatch, match="unexpected: 'decoder.conv_in.bias'"):
        read(encoder, checkpoint, "diffusers")
    assert len(dict(read(encoder, checkpoint, "diffusers", beside=decoder))) == len(encoder)
    for others in (encoder, (*encoder, *decoder)):
        assert len(dict(read(decoder, checkpoint, "diffusers", beside=others))) == len(decoder)


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused(stored, dtype, value):
    names = table("bare encoder")
    tensors = write(names, random_weights(names), "diffusers")
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    tensors["encoder.conv_in.bias"][3:5] = value
    checkpoint = stored(tensors)
    with pytest.raises(NonFiniteWeights, match="'encoder.conv_in.bias' holds 2 values"):
        dict(read(names, checkpoint, "diffusers"))
    found = dict(read(names, checkpoint, "diffusers", allow_nonfinite=True))
    assert found["conv_in/bias"].dtype == dtype
    assert not np.isfinite(found["conv_in/bias"][3])


def test_each_tensor_is_read_once(stored):
    names = table("projected")
    checkpoint = stored(write(names, random_weights(names), "compvis"))
    asked = []
    load = checkpoint._load
    checkpoint._load = lambda name: asked.append(name) or load(name)
    dict(read(names, checkpoint, "compvis"))
    assert sorted(asked) == sorted(checkpoint)


def test_write_is_strict():
    names = table("tiny")
    weights = random_weights(names)
    del weights["conv_in/bias"]
    weights["conv_up/bias"] = weights["conv_out/bias"]
    weights["conv_out/bias"] = weights["conv_out/bias"][:3]
    with pytest.raises(CheckpointMismatch) as caught:
        write(names, weights, "diffusers")
    assert "1 missing: 'conv_in/bias'" in str(caught.value)
    assert "1 unexpected: 'conv_up/bias'" in str(caught.value)
    assert "'conv_out/bias: (3,) instead of (4,)'" in str(caught.value)


def test_unknown_dialect():
    with pytest.raises(ValueError, match="Known dialects: compvis, diffusers"):
        write(table("tiny"), {}, "keras")
