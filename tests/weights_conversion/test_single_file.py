"""Single files in CompVis names: families, parts, prefixes, averages and predictions."""

import json

import ml_dtypes
import numpy as np
import pytest
from corpus.models import FIELDS, KINDS, averaged, pickled, tensors, training_leftovers, weights
from safetensors.numpy import save_file

from weights_conversion import CheckpointMismatch, NonFiniteWeights, open_single_file
from weights_conversion.models.families import UNKNOWN, identify

SD1, SD2, INPAINT = tensors("sd1"), tensors("sd2"), tensors("sd1-inpaint")


@pytest.fixture
def opened(tmp_path):
    def save_and_open(found, metadata=None, **settings):
        path = tmp_path / "model.safetensors"
        save_file({name: np.asarray(array) for name, array in found.items()}, path, metadata)
        return open_single_file(path, **settings)

    return save_and_open


def check_arrays(model, family, seed=0, dtype=np.float32, kinds=KINDS):
    for kind in kinds:
        found = dict(model.arrays(kind))
        expected = weights(kind, FIELDS[family][KINDS[kind]], seed, dtype)
        assert found.keys() == expected.keys()
        for path, array in expected.items():
            assert found[path].dtype == array.dtype
            np.testing.assert_array_equal(found[path], array)


# ── what is told from a file ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FIELDS)
def test_architecture_and_weights(opened, family):
    model = opened(tensors(family), prediction_type="epsilon")
    assert model.family.name == family
    for kind, component in KINDS.items():
        assert model.fields(kind) == FIELDS[family][component]
    check_arrays(model, family)
    assert model.dropped == []


def test_schedule_sampling_and_padding(opened):
    model = opened(SD1)
    assert model.schedule["prediction"] == "epsilon"
    assert (model.schedule["beta_start"], model.schedule["beta_end"]) == (0.00085, 0.012)
    assert model.schedule["trained_betas"] is None
    assert model.sampling["sampler"] == "ddim"
    assert model.pad_id() is None
    assert model.sample_size == 64
    model = opened(SD2, prediction_type="v_prediction")
    assert model.schedule["prediction"] == "v"
    assert model.pad_id() == 0
    assert model.sample_size == 96


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_stay(opened, dtype):
    check_arrays(opened(tensors("sd1", dtype=dtype)), "sd1", dtype=dtype)


def test_leftovers_of_training_are_dropped_and_listed(opened):
    model = opened(SD1 | training_leftovers())
    check_arrays(model, "sd1")
    assert model.dropped == sorted(training_leftovers())
    assert model.schedule["trained_betas"] is None


def test_own_betas_and_scale(opened):
    betas = np.linspace(1e-4, 2e-2, 500).astype(np.float32)
    model = opened(SD1 | {"betas": betas, "scale_factor": np.array(0.5, np.float32)})
    assert model.schedule["num_timesteps"] == 500
    assert model.schedule["trained_betas"] == tuple(betas.astype(float).tolist())
    assert model.fields("image_decoder")["latent_scale"] == 0.5
    with pytest.raises(CheckpointMismatch, match="betas"):
        opened(SD1 | {"betas": -betas}).schedule
    with pytest.raises(CheckpointMismatch, match="scale_factor"):
        opened(SD1 | {"scale_factor": np.array(-1, np.float32)}).fields("image_decoder")


def test_markers(opened):
    marks = {"v_pred": np.empty(0, np.float32), "ztsnr": np.empty(0, np.float32)}
    schedule = opened(SD1 | marks).schedule
    assert schedule["prediction"] == "v"
    assert schedule["rescale_zero_terminal_snr"]


# ── one model, many names ─────────────────────────────────────────────────────────────────────


def bare(found, prefix):
    return {name.removeprefix(prefix): a for name, a in found.items() if name.startswith(prefix)}


def without_text_model(name):
    return name.replace("transformer.text_model.", "transformer.")


def test_names_of_novelais_time(opened):
    check_arrays(opened({without_text_model(name): array for name, array in SD1.items()}), "sd1")


def test_parallel_training(opened):
    check_arrays(opened({f"module.{name}": array for name, array in SD1.items()}), "sd1")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model."])
def test_a_diffusion_model_without_prefix(opened, prefix):
    model = opened(bare(SD1, prefix))
    check_arrays(model, "sd1", kinds=["diffusion_model"])
    with pytest.raises(CheckpointMismatch, match="has no text_encoder, only 'diffusion_model'"):
        model.fields("text_encoder")


def test_pruned_files_say_what_is_missing(opened):
    model = opened(tensors("sd1", ["diffusion_model", "text_encoder"]))
    check_arrays(model, "sd1", kinds=["diffusion_model", "text_encoder"])
    for kind in ("image_encoder", "image_decoder"):
        with pytest.raises(CheckpointMismatch, match=f"pruned: it has no {kind}"):
            model.arrays(kind)


def test_the_last_layer_of_open_clip_is_not_used(opened):
    extra = {
        "cond_stage_model.model.text_projection": np.zeros((64, 64), np.float32),
        "cond_stage_model.model.logit_scale": np.zeros((), np.float32),
    }
    model = opened(SD2 | extra, prediction_type="epsilon")
    check_arrays(model, "sd2")
    assert model.dropped == sorted(extra)


def test_the_projection_of_clip_is_not_used(opened):
    extra = {"cond_stage_model.transformer.text_projection.weight": np.zeros((64, 64), np.float32)}
    model = opened(SD1 | extra)
    check_arrays(model, "sd1")
    assert model.dropped == sorted(extra)


def test_open_clip_with_all_24_layers(opened, monkeypatch):
    monkeypatch.setattr("weights_conversion.models.from_shapes._OPEN_CLIP_DEPTH", 1)
    model = opened(SD2, prediction_type="epsilon")
    assert model.fields("text_encoder")["depth"] == 1
    assert len(dict(model.arrays("text_encoder"))) == 2 + 16 + 2
    assert len(model.dropped) == 12
    assert all(".resblocks.1." in name for name in model.dropped)


def test_moving_average_or_raw(opened):
    found = SD1 | averaged(SD1)
    raw = opened(found, weights="raw")
    check_arrays(raw, "sd1")
    assert all(name.startswith("model_ema.") for name in raw.dropped)
    model = opened(found)
    arrays = dict(model.arrays("diffusion_model"))
    conv_in = found["model_ema.diffusion_modelinput_blocks00weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(arrays["conv_in/kernel"], conv_in)
    check_arrays(model, "sd1", kinds=["text_encoder", "image_decoder"])
    assert "model.diffusion_model.input_blocks.0.0.weight" in model.dropped
    assert "model_ema.decay" in model.dropped
    assert len(model.dropped) == len(bare(SD1, "model.diffusion_model.")) + 2


def test_half_an_average(opened):
    found = SD1 | averaged(SD1)
    del found["model_ema.diffusion_modelout2weight"]
    with pytest.raises(CheckpointMismatch, match="lacks 1 of .* weights='raw'"):
        opened(found)
    check_arrays(opened(found, weights="raw"), "sd1")


def test_ckpt_equals_safetensors(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickled(SD1 | averaged(SD1) | training_leftovers(), {"global_step": 470000}))
    model = open_single_file(path, weights="raw")
    check_arrays(model, "sd1")
    assert model.checkpoint.metadata == {"global_step": "470000"}


def test_two_names_of_one_tensor(opened):
    name = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    with pytest.raises(CheckpointMismatch, match="under two names"):
        opened(SD1 | {without_text_model(name): SD1[name]})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.pop("model.diffusion_model.out.2.bias"), "1 missing"),
        (lambda f: f.update({"model.diffusion_model.odd": f["betas"]}), "1 unexpected"),
        (lambda f: f.update({"model.diffusion_model.out.2.bias": f["betas"]}), "of another shape"),
    ],
)
def test_strict_both_ways(opened, change, message):
    found = SD1 | training_leftovers()
    change(found)
    with pytest.raises(CheckpointMismatch, match=message):
        opened(found).arrays("diffusion_model")


def test_rank_of_projections(opened):
    flat = {
        name: a.reshape(a.shape[:2]) if "proj_in.weight" in name or "proj_out.w" in name else a
        for name, a in SD1.items()
    }
    check_arrays(opened(flat), "sd1")


def test_non_finite_weights(opened):
    found = dict(SD1)
    name = "model.diffusion_model.out.2.weight"
    found[name] = np.where(found[name] > 2, np.nan, found[name])
    model = opened(found)
    with pytest.raises(NonFiniteWeights, match="out.2.weight"):
        dict(model.arrays("diffusion_model"))
    assert dict(model.arrays("diffusion_model", allow_nonfinite=True))


# ── what the model predicts ───────────────────────────────────────────────────────────────────


def test_prediction_must_be_told(opened):
    with pytest.raises(CheckpointMismatch, match="Pass prediction_type='epsilon'"):
        opened(SD2).schedule
    with pytest.raises(CheckpointMismatch, match="one of epsilon"):
        opened(SD2, prediction_type="noise").schedule


def test_the_message_suggests_but_does_not_decide(opened, monkeypatch):
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.norm1.bias"
    monkeypatch.setattr("weights_conversion.models.prediction._LAST_NORM", name)
    for deviation, word in ((0.01, "epsilon"), (0.3, "v")):
        bias = np.tile(np.float32([-deviation, deviation]), len(SD2[name]) // 2)
        with pytest.raises(CheckpointMismatch, match=f"suggests '{word}'"):
            opened(SD2 | {name: bias}).schedule


METADATA = [
    ({"modelspec.prediction_type": "v"}, "v"),
    ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
    ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
    ({"global_step": "875000"}, "epsilon"),
    ({"global_step": "110000"}, "v"),
]


@pytest.mark.parametrize("metadata, expected", METADATA)
def test_prediction_from_metadata(opened, metadata, expected):
    assert opened(SD2, metadata).schedule["prediction"] == expected


def test_prediction_from_files_beside(opened, tmp_path):
    yaml = tmp_path / "model.yaml"
    yaml.write_text('model:\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n')
    assert opened(SD2).prediction == "v"
    yaml.write_text("model:\n  params:\n    linear_start: 0.00085\n")
    assert opened(SD2).prediction == "epsilon"
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert opened(SD2).prediction == "v"
    assert opened(SD2, {"modelspec.prediction_type": "epsilon"}).prediction == "epsilon"
    assert opened(SD2, prediction_type="sample").prediction == "sample"


# ── other models ──────────────────────────────────────────────────────────────────────────────

UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "flux": {"double_blocks.0.img_attn.qkv.weight": (9, 3)},
    "sd3": {"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (9, 3)},
    "video": {f"{CONTEXT}.time_mixer.mix_factor": (1,)},
    "controlnet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "t2i-adapter": {"adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)},
    "ip-adapter": {"ip_adapter.1.to_k_ip.weight": (320, 768)},
    "lora": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 1280)},
    "textual-inversion": {"emb_params": (2, 768)},
    "sdxl": {"conditioner.embedders.1.model.ln_final.weight": (1280,), UNET_IN: (320, 4, 3, 3)},
    "sdxl-refiner": {"conditioner.embedders.0.model.ln_final.weight": (1280,)},
    "playground-v2.5": {"edm_mean": (4,), UNET_IN: (320, 4, 3, 3)},
    "x4-upscaler": {UNET_IN: (256, 7, 3, 3), CONTEXT: (256, 1024)},
    "sd2-depth": {UNET_IN: (320, 5, 3, 3), CONTEXT: (320, 1024)},
    "class-conditional": {
        UNET_IN: (320, 4, 3, 3),
        CONTEXT: (320, 1024),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2048),
    },
    "ldm": {UNET_IN: (224, 3, 3, 3)},
    "ldm-text": {UNET_IN: (320, 4, 3, 3), CONTEXT: (320, 1280)},
    "vae": {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
    "text-encoder": {"cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,)},
    "diffusers-part": {"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
    "unknown": {"layer.weight": (3, 3)},
}


@pytest.mark.parametrize("family, shapes", OTHERS.items(), ids=OTHERS)
def test_other_families_are_named(family, shapes):
    found = identify(shapes)
    assert found.name == family
    assert found.use


@pytest.mark.parametrize("family", ["flux", "lora", "sdxl", "controlnet", "unknown", "vae"])
def test_other_families_are_refused(opened, family):
    found = {name: np.zeros([min(n, 9) for n in s], "f4") for name, s in OTHERS[family].items()}
    with pytest.raises(CheckpointMismatch, match="looks like .*[Nn]ame|looks like .*(use|Load)"):
        opened(found)


def test_an_empty_file_is_unknown():
    assert identify({}) is UNKNOWN


def test_architectures_that_no_family_has(opened):
    found = {name: a for name, a in SD1.items() if ".input_blocks.2." not in name}
    with pytest.raises(CheckpointMismatch, match="levels whose layers are not alike|missing"):
        opened(found).arrays("diffusion_model")
    name = "first_stage_model.quantize.embedding.weight"
    with pytest.raises(CheckpointMismatch, match="codebook"):
        opened(SD1 | {name: np.zeros((8, 4), np.float32)}).fields("image_decoder")


def test_the_arguments_words(opened):
    with pytest.raises(ValueError, match="ema, raw"):
        opened(SD1, weights="best")
