"""Weights conversion against diffusers and transformers: names, shapes, values and options."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from weights_conversion import (
    DiffusersFolder,
    configs,
    read,
    rows,
    staged,
    write,
    write_component,
    write_index,
    write_scheduler,
)
from weights_conversion.configs import autoencoder, clip, diffusion_model, scheduler
from weights_conversion.names import layouts

# diffusers' schedulers hand torch tensors to functions of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
UNETS = {
    "SD1": UNET,
    "SD2": UNET | {"use_linear_projection": True, "attention_head_dim": (2, 4), "sample_size": 8},
    "inpaint": UNET | {"in_channels": 9, "layers_per_block": 1},
    "x4-like": UNET
    | {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 3],
    },
    "four levels": UNET
    | {
        "block_out_channels": (8, 16, 24, 24),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "unconditional": UNET | {"cross_attention_dim": [8, 16]},
    "classes": UNET | {"cross_attention_dim": [8, 16], "num_class_embeds": 6},
    "classes and text": UNET | {"num_class_embeds": 6},
    "one level": UNET
    | {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
}
VAE = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "layers_per_block": 2,
}
VAES = {
    "SD": VAE,
    "bare": VAE
    | {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False},
    "grey": VAE | {"in_channels": 1, "out_channels": 1, "latent_channels": 3},
}
VQ = VAE | {"latent_channels": 3, "num_vq_embeddings": 7}
TEXT = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 7,
    "bos_token_id": 18,
    "eos_token_id": 19,
}
SD1_UNET = {
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
}
SD2_UNET = SD1_UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
VQ_F4 = {
    "block_out_channels": (128, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
OPEN_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
}


def unet(options):
    return diffusers.UNet2DConditionModel(**options)


def vae(options):
    return diffusers.AutoencoderKL(**options)


def vq(options):
    return diffusers.VQModel(**options)


def text(options):
    return CLIPTextModel(CLIPTextConfig(**options))


def text_with_projection(options):
    return CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=6, **options))


TINY = {
    **{f"unet {name}": (unet, options) for name, options in UNETS.items()},
    **{f"vae {name}": (vae, options) for name, options in VAES.items()},
    "vq": (vq, VQ),
    "text CLIP": (text, TEXT),
    "text OpenCLIP": (text, TEXT | {"hidden_act": "gelu"}),
    "text projected": (text_with_projection, TEXT | {"hidden_act": "gelu"}),
}
FULL_SIZE = {
    "unet SD1": (unet, SD1_UNET),
    "unet SD1 inpaint": (unet, SD1_UNET | {"in_channels": 9}),
    "unet SD2": (unet, SD2_UNET),
    "vae SD": (vae, SD_VAE),
    "vq f4": (vq, VQ_F4),
    "text CLIP-L": (text, CLIP_L),
    "text OpenCLIP-H": (text, OPEN_CLIP_H),
}


def made(make, options, seed=0):
    """A model with random values in every parameter, norms and biases too."""
    torch.manual_seed(seed)
    model = make(options).eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def config_of(model):
    """A model's config.json."""
    to_json = getattr(model.config, "to_json_string", None) or model.to_json_string
    config = json.loads(to_json())
    if isinstance(model, diffusers.ModelMixin):
        return config
    return config | {"architectures": [type(model).__name__]}


def tables_of(config):
    """The fields of a config and the name tables of the models that its weights hold."""
    kinds = {
        "UNet2DConditionModel": (configs.diffusion_model_fields, ["diffusion_model"]),
        "AutoencoderKL": (configs.autoencoder_fields, ["image_encoder", "image_decoder"]),
        "VQModel": (configs.autoencoder_fields, ["image_encoder", "image_decoder"]),
        None: (configs.text_encoder_fields, ["text_encoder"]),
    }
    to_fields, names = kinds[config.get("_class_name")]
    fields = to_fields(config)
    return fields, [rows(name, fields) for name in names]


def config_from(fields):
    """The config.json that is written for fields."""
    if "quant_conv" in fields:
        return configs.autoencoder_config(fields)
    if "vocabulary_size" in fields:
        return configs.text_encoder_config(fields)
    return configs.diffusion_model_config(fields)


def prefixed(name):
    """The name with the prefix that newer transformers leave out."""
    first = name.split(".")[0]
    is_bare = first in ("embeddings", "final_layer_norm") or name.startswith("encoder.layers.")
    return f"text_model.{name}" if is_bare else name


def state_of(model):
    return {
        prefixed(name): tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }


def assert_rows_are(tables, state):
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert {
        row.diffusers.name: layouts.stored_shapes(row.diffusers.layout, row.shape)[0]
        for table in tables
        for row in table
    } == expected


def weights_of(tables, checkpoint):
    """The variables of each model in a checkpoint."""
    return [
        dict(read(table, checkpoint, "diffusers", beside=[r for t in tables for r in t]))
        for table in tables
    ]


# ── names, shapes and values ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", TINY)
def test_rows_cover_the_state_dict(case):
    model = made(*TINY[case])
    _, tables = tables_of(config_of(model))
    assert_rows_are(tables, state_of(model))


@pytest.mark.parametrize("case", FULL_SIZE)
def test_rows_cover_the_full_size_state_dict(case):
    make, options = FULL_SIZE[case]
    with torch.device("meta"):
        model = make(options)
    _, tables = tables_of(config_of(model))
    assert_rows_are(tables, state_of(model))


@pytest.mark.parametrize("case", TINY)
def test_there_and_back(tmp_path, case):
    """Read what they save, and let them load what is written from it: all values are the same."""
    model = made(*TINY[case])
    model.save_pretrained(tmp_path / "theirs")
    folder = DiffusersFolder(tmp_path)
    fields, tables = tables_of(folder.config("theirs"))
    weights = weights_of(tables, folder.weights("theirs"))
    tensors = {}
    for table, values in zip(tables, weights):
        tensors |= write(table, values, "diffusers")
    write_component(tmp_path, "ours", config_from(fields), tensors)
    assert tables_of(folder.config("ours"))[0] == fields

    loaded, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["unet SD2", "vae SD", "vq", "text CLIP"])
def test_the_written_config_computes_the_same(tmp_path, case):
    make, options = TINY[case]
    model = made(make, options)
    fields, _ = tables_of(config_of(model))
    (tmp_path / "config.json").write_text(json.dumps(config_from(fields)))
    if make is text:
        again = CLIPTextModel(CLIPTextConfig.from_pretrained(tmp_path))
        inputs = [torch.arange(14).reshape(2, 7)]
    else:
        again = type(model).from_config(type(model).load_config(tmp_path))
        inputs = [torch.randn(2, 4, 8, 8), 7, torch.randn(2, 5, 12)]
        inputs = inputs if make is unet else [torch.randn(2, 3, 16, 16)]
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one, other in zip(again.eval()(*inputs).to_tuple(), model(*inputs).to_tuple()):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_layouts_are_those_of_torchs_layers(tmp_path):
    """A value at a known place of each kind of layer, found where Keras wants it."""
    model = made(unet, UNETS["SD2"])
    model.save_pretrained(tmp_path / "unet")
    folder = DiffusersFolder(tmp_path)
    _, tables = tables_of(folder.config("unet"))
    (weights,) = weights_of(tables, folder.weights("unet"))
    inputs = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    with torch.no_grad():
        expected = model.time_embedding.linear_1(torch.tensor(inputs)).numpy()
        kernel = weights["time_embedding/linear_1/kernel"]
        ours = inputs @ kernel + weights["time_embedding/linear_1/bias"]
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        image = torch.zeros(1, 4, 3, 3)
        image[0, 2, 0, 1] = 1  # one row above the middle of the window
        expected = (model.conv_in(image) - model.conv_in.bias[:, None, None])[0, :, 1, 1].numpy()
    np.testing.assert_allclose(weights["conv_in/kernel"][0, 1, 2], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_variants_and_shards(tmp_path, dtype):
    model = made(unet, UNET).to(dtype)
    model.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    folder = DiffusersFolder(tmp_path)
    fields, tables = tables_of(folder.config("unet"))
    (weights,) = weights_of(tables, folder.weights("unet", variant="fp16"))
    tensors = write(tables[0], weights, "diffusers")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensors[name].astype(np.float64), tensor.double().numpy())
    write_component(
        tmp_path, "ours", config_from(fields), tensors, variant="fp16", max_shard_bytes=20_000
    )
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path / "ours", variant="fp16", torch_dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_whole_pipeline(tmp_path):
    parts = {"unet": (unet, UNETS["SD1"]), "vae": (vae, VAE), "text_encoder": (text, TEXT)}
    models = {name: made(*part) for name, part in parts.items()}
    with staged(tmp_path / "model") as folder:
        for name, model in models.items():
            fields, tables = tables_of(config_of(model))
            tensors = {key: tensor.numpy() for key, tensor in state_of(model).items()}
            write_component(folder, name, config_from(fields), tensors)
        config = {"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample": False}
        write_scheduler(folder, configs.scheduler_config(configs.scheduler_fields(config)))
        (folder / "tokenizer").mkdir()
        words = {"<|startoftext|>": 0, "<|endoftext|>": 1}
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
        (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
        write_index(folder)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler
    assert pipeline.safety_checker is None
    for name, model in models.items():
        loaded = getattr(pipeline, name).state_dict()
        for key, tensor in model.state_dict().items():
            assert torch.equal(loaded[key], tensor)


# ── the CompVis column, against diffusers' own converters ─────────────────────────────────────


def tensors_of(table, dialect):
    generator = np.random.default_rng(0)
    weights = {row.kdiffusion: generator.standard_normal(row.shape, np.float32) for row in table}
    tensors = write(table, weights, dialect)
    return {name: torch.tensor(np.ascontiguousarray(array)) for name, array in tensors.items()}


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("case", ["SD1", "SD2", "inpaint", "x4-like", "four levels"])
def test_unet_from_compvis(case):
    config = config_of(made(unet, UNETS[case]))
    _, (table,) = tables_of(config)
    found = single_file_utils.convert_ldm_unet_checkpoint(tensors_of(table, "compvis"), config)
    assert_equal_tensors(found, tensors_of(table, "diffusers"))


@pytest.mark.parametrize("case", VAES)
def test_vae_from_compvis(case):
    config = config_of(made(vae, VAES[case]))
    _, tables = tables_of(config)
    compvis, expected = {}, {}
    for table in tables:
        compvis |= tensors_of(table, "compvis")
        expected |= tensors_of(table, "diffusers")
    found = single_file_utils.convert_ldm_vae_checkpoint(compvis, config)
    assert_equal_tensors(found, expected)


def test_clip_from_compvis():
    _, (table,) = tables_of(config_of(made(text, TEXT)))
    found = single_file_utils.convert_ldm_clip_checkpoint(tensors_of(table, "compvis"))
    assert_equal_tensors(found, tensors_of(table, "diffusers"))


def test_open_clip_from_compvis():
    model = made(text_with_projection, TEXT | {"hidden_act": "gelu"})
    fields, _ = tables_of(config_of(model))
    table = rows("text_encoder", fields | {"projection_width": 8})  # square, as in OpenCLIP
    compvis = tensors_of(table, "compvis")
    ours, theirs = "cond_stage_model.model.", "conditioner.embedders.1.model."
    assert compvis[f"{ours}transformer.resblocks.2.attn.in_proj_bias"].shape == (24,)
    # Under SD 2's prefix the converter drops the projection, under SDXL's it keeps it.
    compvis = {name.replace(ours, theirs): tensor for name, tensor in compvis.items()}
    found = single_file_utils.convert_open_clip_checkpoint(model, compvis, prefix=theirs)
    assert_equal_tensors(found, tensors_of(table, "diffusers"))


@pytest.mark.parametrize(
    "case, total",
    [("unet SD1", 686), ("unet SD2", 686), ("vae SD", 248)],
)
def test_full_size_compvis_names(case, total):
    """Names only: every tensor is one element on the meta device."""
    make, options = FULL_SIZE[case]
    with torch.device("meta"):
        config = config_of(make(options))
    _, tables = tables_of(config)
    tensors = {
        row.compvis.name: torch.empty(
            layouts.stored_shapes(row.compvis.layout, row.shape)[0], device="meta"
        )
        for table in tables
        for row in table
    }
    convert = {
        unet: single_file_utils.convert_ldm_unet_checkpoint,
        vae: single_file_utils.convert_ldm_vae_checkpoint,
    }[make]
    found = convert(tensors, config)
    assert len(found) == total
    assert_rows_are(tables, found)


# ── options ───────────────────────────────────────────────────────────────────────────────────


def defaults_of(function):
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


@pytest.mark.parametrize(
    "cls, read_keys, neutral, without_effect",
    [
        (
            diffusers.UNet2DConditionModel,
            diffusion_model._UNET_DEFAULTS,
            diffusion_model._UNET_NEUTRAL,
            diffusion_model._UNET_WITHOUT_EFFECT,
        ),
        *(
            (
                getattr(diffusers, name),
                autoencoder._DEFAULTS[name],
                autoencoder._NEUTRAL[name],
                autoencoder._WITHOUT_EFFECT,
            )
            for name in autoencoder._DEFAULTS
        ),
    ],
)
def test_every_option_of_a_class_is_known(cls, read_keys, neutral, without_effect):
    theirs = defaults_of(cls.__init__)
    assert theirs.keys() == read_keys.keys() | neutral.keys() | without_effect
    for key, value in read_keys.items():
        assert theirs[key] == value
    for key, value in neutral.items():
        assert theirs[key] == value or not (theirs[key] or value)


def test_defaults_of_the_text_encoder():
    theirs = CLIPTextConfig()
    for key, value in clip._TEXT_DEFAULTS.items():
        assert getattr(theirs, key) == value


SCHEDULERS = sorted(
    set(scheduler._SCHEDULERS) - {"DPMSolverSDEScheduler"}  # its class needs torchsde
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_option_of_a_scheduler_is_known(name):
    theirs = defaults_of(getattr(diffusers, name).__init__)
    row = scheduler._SCHEDULERS[name]
    assert theirs.keys() <= row.defaults.keys() | row.required.keys() | scheduler._WITHOUT_EFFECT
    if name == "IPNDMScheduler":  # has betas of its own making, and almost no options
        return
    assert row.defaults.keys() | row.required.keys() <= theirs.keys()
    for key, value in {**row.required, **row.defaults}.items():
        assert (theirs[key] == value) == (key not in row.explicit)
    for key, value in row.explicit.items():
        assert theirs[key] != value


@pytest.mark.parametrize("name", SCHEDULERS)
def test_written_schedulers_are_loaded(tmp_path, name):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    row = scheduler._SCHEDULERS[name]
    config = {"_class_name": name, "prediction_type": "v_prediction", **betas, **row.explicit}
    fields = configs.scheduler_fields(config)
    write_scheduler(tmp_path, configs.scheduler_config(fields))
    loaded = getattr(diffusers, name).from_pretrained(tmp_path / "scheduler")
    for key, value in configs.scheduler_config(fields).items():
        if key != "_class_name" and name != "IPNDMScheduler":
            assert loaded.config[key] == value
    loaded.save_pretrained(tmp_path / "theirs" / "scheduler")
    theirs = DiffusersFolder(tmp_path / "theirs").config("scheduler")
    assert configs.scheduler_fields(theirs) == fields
