"""Architecture fields from config.json files, and back."""

import pytest

from weights_conversion import CheckpointMismatch, configs

# The published config files of the repositories, verbatim but for paths and versions.
SD15_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD21_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "class_embed_type": None,
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SD15_FIELDS = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": (320, 640, 1280, 1280),
    "layers_per_level": 2,
    "depths": (1, 1, 1, 0),
    "mid_depth": 1,
    "num_heads": (8, 8, 8, 8),
    "context_width": 768,
    "num_classes": None,
    "linear_projection": False,
    "num_groups": 32,
    "epsilon": 1e-5,
}
SD_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD15_TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
PNDM = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def reads(function, config):
    """Tell if a config is read, or return its error."""
    try:
        function(config)
    except CheckpointMismatch as error:
        return str(error)
    return True


# ── diffusion model ───────────────────────────────────────────────────────────────────────────


def test_sd15_unet():
    assert configs.diffusion_model_fields(SD15_UNET) == SD15_FIELDS


def test_sd21_unet():
    assert configs.diffusion_model_fields(SD21_UNET) == SD15_FIELDS | {
        "num_heads": (5, 10, 20, 20),
        "context_width": 1024,
        "linear_projection": True,
    }


def test_class_defaults_of_the_unet():
    fields = configs.diffusion_model_fields({"_class_name": "UNet2DConditionModel"})
    assert fields == SD15_FIELDS | {"context_width": 1280}


def test_head_count_and_depth_by_level():
    fields = configs.diffusion_model_fields(
        SD15_UNET | {"num_attention_heads": 4, "transformer_layers_per_block": [1, 2, 3, 4]}
    )
    assert fields["num_heads"] == (4, 4, 4, 4)
    assert fields["depths"] == (1, 2, 3, 0)
    assert fields["mid_depth"] == 4


@pytest.mark.parametrize(
    "fields",
    [
        SD15_FIELDS,
        SD15_FIELDS | {"num_heads": (5, 10, 20, 20), "linear_projection": True, "in_channels": 9},
        SD15_FIELDS | {"depths": (0, 1, 2, 3), "mid_depth": 3},
        SD15_FIELDS | {"depths": (0, 2, 10, 0), "mid_depth": 10, "epsilon": 1e-6},
    ],
)
def test_unet_fields_survive_writing(fields):
    config = configs.diffusion_model_config(fields, sample_size=64)
    assert config["sample_size"] == 64
    assert configs.diffusion_model_fields(config) == fields


def test_a_middle_that_diffusers_cannot_say():
    with pytest.raises(CheckpointMismatch, match="mid_depth = 2"):
        configs.diffusion_model_config(SD15_FIELDS | {"depths": (1, 1, 1, 1), "mid_depth": 2})


@pytest.mark.parametrize(
    "key, value",
    [
        ("_class_name", "UNet2DModel"),
        ("_class_name", None),
        ("_class_name", ["UNet2DConditionModel"]),
        ("act_fn", "gelu"),
        ("act_fn", None),
        ("addition_embed_type", "text_time"),
        ("addition_time_embed_dim", 256),
        ("attention_head_dim", [5, 10, 20]),
        ("attention_head_dim", 7),
        ("attention_head_dim", 0),
        ("attention_head_dim", True),
        ("attention_type", "gated"),
        ("block_out_channels", [320, 640, 1280, 1290]),
        ("block_out_channels", []),
        ("block_out_channels", "320"),
        ("center_input_sample", True),
        ("class_embed_type", "projection"),
        ("class_embeddings_concat", True),
        ("conv_in_kernel", 1),
        ("conv_out_kernel", 1),
        ("cross_attention_dim", [768, 768, 768, 1024]),
        ("cross_attention_norm", "layer_norm"),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
        ("down_block_types", [{}] * 4),
        ("downsample_padding", 0),
        ("dual_cross_attention", True),
        ("encoder_hid_dim", 768),
        ("encoder_hid_dim_type", "text_proj"),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("in_channels", "4"),
        ("layers_per_block", [2, 2, 2, 1]),
        ("layers_per_block", 2.0),
        ("mid_block_only_cross_attention", True),
        ("mid_block_scale_factor", 2),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("mid_block_type", None),
        ("norm_eps", 0.5j),
        ("norm_eps", float("nan")),
        ("norm_num_groups", None),
        ("num_attention_heads", [1, 2]),
        ("num_class_embeds", 1),
        ("num_class_embeds", 0),
        ("only_cross_attention", True),
        ("only_cross_attention", [False, True, True, False]),
        ("projection_class_embeddings_input_dim", 2816),
        ("resnet_out_scale_factor", 2.0),
        ("resnet_skip_time_act", True),
        ("resnet_time_scale_shift", "scale_shift"),
        ("reverse_transformer_layers_per_block", [[1]]),
        ("time_cond_proj_dim", 256),
        ("time_embedding_act_fn", "silu"),
        ("time_embedding_dim", 512),
        ("time_embedding_type", "fourier"),
        ("timestep_post_act", "silu"),
        ("transformer_layers_per_block", [[1], 1, 1, 1]),
        ("transformer_layers_per_block", 0),
        ("up_block_types", ["UpBlock2D"] * 4),
        ("up_block_types", None),
        ("use_linear_projection", "yes"),
        ("something_of_2030", "on"),
        ("something_of_2030", 3),
        ("something_of_2030", [3]),
    ],
)
def test_options_of_the_unet_that_change_the_computation(key, value):
    assert f"{key} = " in reads(configs.diffusion_model_fields, SD15_UNET | {key: value})


@pytest.mark.parametrize(
    "change, fields",
    [
        ({"cross_attention_dim": [320, 640, 1280, 1280]}, {"context_width": None}),
        ({"num_class_embeds": 1001}, {"num_classes": 1000}),
    ],
)
def test_unets_without_text_and_with_classes(change, fields):
    read = configs.diffusion_model_fields(SD15_UNET | change)
    assert read == SD15_FIELDS | fields
    written = configs.diffusion_model_config(read)
    assert {key: written[key] for key in change} == change
    assert configs.diffusion_model_fields(written) == read


def test_diffusers_has_no_middle_without_attention():
    fields = SD15_FIELDS | {"depths": (0, 0, 0, 0), "mid_depth": 0}
    with pytest.raises(CheckpointMismatch, match="mid_depth = 0"):
        configs.diffusion_model_config(fields)


@pytest.mark.parametrize(
    "key, value",
    [
        ("_name_or_path", "somewhere"),
        ("addition_embed_type_num_heads", 64),
        ("attention_type", "default"),
        ("dropout", 0.1),
        ("layers_per_block", [2, 2, 2, 2]),
        ("mid_block_only_cross_attention", None),
        ("only_cross_attention", [False] * 4),
        ("resnet_out_scale_factor", 1.0),
        ("sample_size", [64, 96]),
        ("something_of_2030", None),
        ("something_of_2030", False),
        ("something_of_2030", []),
        ("upcast_attention", True),
    ],
)
def test_options_of_the_unet_that_change_nothing(key, value):
    assert configs.diffusion_model_fields(SD15_UNET | {key: value}) == SD15_FIELDS


# ── autoencoder ───────────────────────────────────────────────────────────────────────────────


def test_sd_vae():
    assert configs.autoencoder_fields(SD_VAE) == {
        "image_channels": 3,
        "latent_channels": 4,
        "channels": (128, 256, 512, 512),
        "layers_per_level": 2,
        "num_groups": 32,
        "latent_scale": 0.18215,
        "latent_shift": 0.0,
        "mid_attention": True,
        "quant_conv": True,
        "post_quant_conv": True,
        "codebook_size": None,
    }


@pytest.mark.parametrize(
    "name, latent_channels, codebook_size", [("AutoencoderKL", 4, None), ("VQModel", 3, 256)]
)
def test_class_defaults_of_the_vae(name, latent_channels, codebook_size):
    fields = configs.autoencoder_fields({"_class_name": name})
    assert fields["channels"] == (64,)
    assert fields["layers_per_level"] == 1
    assert fields["latent_channels"] == latent_channels
    assert fields["codebook_size"] == codebook_size


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scaling_factor": 0.13025},
        {"use_quant_conv": False, "mid_block_add_attention": False},
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        {"latents_mean": [0.1, -0.2, 0, 4], "latents_std": [0.5, 1, 2, 4], "scaling_factor": 1},
    ],
)
def test_vae_fields_survive_writing(changes):
    fields = configs.autoencoder_fields(SD_VAE | changes)
    config = configs.autoencoder_config(fields)
    assert configs.autoencoder_fields(config) == fields
    assert {key: config[key] for key in changes} == changes


def test_latents_by_channel():
    config = SD_VAE | {"latents_mean": [1, 0, 0, 0], "latents_std": [4, 2, 1, 1]}
    fields = configs.autoencoder_fields(config | {"scaling_factor": 0.5})
    assert fields["latent_scale"] == (0.125, 0.25, 0.5, 0.5)
    assert fields["latent_shift"] == (1.0, 0.0, 0.0, 0.0)


VQ = {key: value for key, value in SD_VAE.items() if key != "_class_name"} | {
    "_class_name": "VQModel",
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "vq_embed_dim": 3,
    "scaling_factor": 1.0,
}


def test_vq_fields_survive_writing():
    fields = configs.autoencoder_fields(VQ)
    assert (fields["codebook_size"], fields["latent_scale"]) == (8192, 1.0)
    assert (fields["quant_conv"], fields["post_quant_conv"]) == (True, True)
    assert configs.autoencoder_fields(configs.autoencoder_config(fields)) == fields


@pytest.mark.parametrize(
    "key, value",
    [
        ("latents_mean", [0, 0, 0]),
        ("lookup_from_codebook", True),
        ("norm_type", "spatial"),
        ("num_vq_embeddings", 0),
        ("shift_factor", 0.1),
        ("use_quant_conv", True),
        ("vq_embed_dim", 4),
    ],
)
def test_options_of_a_vq_model_that_change_the_computation(key, value):
    assert f"{key} = " in reads(configs.autoencoder_fields, VQ | {key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("latent_scale", (1.0, 1.0, 2.0)),
        ("latent_shift", 0.5),
        ("post_quant_conv", False),
        ("quant_conv", False),
    ],
)
def test_what_no_vq_model_can_be(key, value):
    fields = configs.autoencoder_fields(VQ) | {key: value}
    assert f"{key} = " in reads(configs.autoencoder_config, fields)


@pytest.mark.parametrize(
    "key, value",
    [
        ("_class_name", "AsymmetricAutoencoderKL"),
        ("act_fn", "relu"),
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("down_block_types", ["DownEncoderBlock2D"] * 3),
        ("layers_per_block", [2, 2, 2, 2]),
        ("out_channels", 1),
        ("scaling_factor", 0),
        ("scaling_factor", "0.18215"),
        ("shift_factor", "0.1159"),
        ("up_block_types", ["UpDecoderBlock2D"] * 5),
        ("something_of_2030", "on"),
    ],
)
def test_options_of_the_vae_that_change_the_computation(key, value):
    assert f"{key} = " in reads(configs.autoencoder_fields, SD_VAE | {key: value})


@pytest.mark.parametrize(
    "options, key",
    [
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "latents_std"),
        ({"latents_std": [1, 2, 3, 4]}, "latents_mean"),
        ({"latents_mean": [0, 0, 0], "latents_std": [1, 1, 1]}, "latents_std"),
        ({"latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 1, 0]}, "latents_std"),
        ({"latents_mean": [0] * 4, "latents_std": [1] * 4, "shift_factor": 0.1}, "shift_factor"),
    ],
)
def test_latents_by_channel_are_whole_or_refused(options, key):
    assert f"{key} = " in reads(configs.autoencoder_fields, SD_VAE | options)


@pytest.mark.parametrize(
    "key, value",
    [("force_upcast", True), ("shift_factor", 0), ("latents_mean", None), ("sample_size", 768)],
)
def test_options_of_the_vae_that_change_nothing(key, value):
    fields = configs.autoencoder_fields(SD_VAE | {key: value})
    assert fields == configs.autoencoder_fields(SD_VAE)


# ── text encoder ──────────────────────────────────────────────────────────────────────────────


def test_sd15_text_encoder():
    assert configs.text_encoder_fields(SD15_TEXT) == {
        "vocabulary_size": 49408,
        "max_length": 77,
        "width": 768,
        "depth": 12,
        "num_heads": 12,
        "mlp_width": 3072,
        "activation": "quick_gelu",
        "epsilon": 1e-5,
        "projection_width": None,
        "end_id": 49407,
    }


@pytest.mark.parametrize(
    "eos_token_id, vocab_size, end_id",
    [
        (49407, 49408, 49407),
        (49407, 49500, 49407),  # tokens of textual inversion come behind it
        (2, 49408, 49407),
        (49407, 1000, 999),
        (None, 1000, 999),
    ],
)
def test_end_id(eos_token_id, vocab_size, end_id):
    config = SD15_TEXT | {"eos_token_id": eos_token_id, "vocab_size": vocab_size}
    assert configs.text_encoder_fields(config)["end_id"] == end_id


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": 49407},
        {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 512},
        {"hidden_act": "gelu", "vocab_size": 514, "eos_token_id": 513},
    ],
)
def test_text_fields_survive_writing(changes):
    fields = configs.text_encoder_fields(SD15_TEXT | changes)
    assert configs.text_encoder_fields(configs.text_encoder_config(fields)) == fields


def test_projection():
    config = SD15_TEXT | {"architectures": ["CLIPTextModelWithProjection"]}
    assert configs.text_encoder_fields(config)["projection_width"] == 768


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "bert"),
        ("architectures", ["BertModel"]),
        ("architectures", [{}]),
        ("architectures", ["CLIPTextModel", "CLIPTextModel"]),
        ("hidden_act", "gelu_new"),
        ("hidden_act", []),
        ("num_attention_heads", 7),
        ("num_hidden_layers", 0),
        ("vocab_size", None),
    ],
)
def test_options_of_the_text_encoder_that_change_the_computation(key, value):
    assert f"{key} = " in reads(configs.text_encoder_fields, SD15_TEXT | {key: value})


@pytest.mark.parametrize("silent", [{}, {"architectures": None}])
def test_a_text_encoder_that_does_not_name_its_class(silent):
    config = {key: value for key, value in SD15_TEXT.items() if key != "architectures"}
    assert configs.text_encoder_fields(config | silent) == configs.text_encoder_fields(SD15_TEXT)


def test_generation_settings_of_transformers_are_passed_over():
    config = SD15_TEXT | {"top_k": 50, "id2label": {"0": "LABEL_0"}, "torchscript": False}
    assert configs.text_encoder_fields(config) == configs.text_encoder_fields(SD15_TEXT)


# ── scheduler ─────────────────────────────────────────────────────────────────────────────────


def test_sd15_scheduler():
    assert configs.scheduler_fields(PNDM) == {
        "schedule": {
            "num_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction": "epsilon",
            "rescale_zero_terminal_snr": False,
            "trained_betas": None,
        },
        "sampling": {
            "sampler": "pndm",
            "timestep_spacing": "leading",
            "sigma_spacing": None,
            "steps_offset": 1,
            "set_alpha_to_one": False,
        },
    }


def test_sd21_scheduler():
    config = PNDM | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    fields = configs.scheduler_fields(config)
    assert fields["schedule"]["prediction"] == "v"
    assert fields["sampling"]["sampler"] == "ddim"


CLASSES = {
    "DDIMScheduler": ("ddim", "leading", 0.0001, "linear", True),
    "DDPMScheduler": ("ddpm", "leading", 0.0001, "linear", True),
    "PNDMScheduler": ("pndm", "leading", 0.0001, "linear", False),
    "LMSDiscreteScheduler": ("lms", "linspace", 0.0001, "linear", True),
    "EulerDiscreteScheduler": ("euler", "linspace", 0.0001, "linear", True),
    "EulerAncestralDiscreteScheduler": ("euler_a", "linspace", 0.0001, "linear", True),
    "HeunDiscreteScheduler": ("heun", "linspace", 0.00085, "linear", True),
    "KDPM2DiscreteScheduler": ("dpm2", "linspace", 0.00085, "linear", True),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_a", "linspace", 0.00085, "linear", True),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", "linspace", 0.0001, "linear", True),
    "DEISMultistepScheduler": ("deis", "linspace", 0.0001, "linear", True),
    "UniPCMultistepScheduler": ("unipc", "linspace", 0.0001, "linear", True),
    "LCMScheduler": ("lcm", "leading", 0.00085, "scaled_linear", True),
    "TCDScheduler": ("tcd", "leading", 0.00085, "scaled_linear", True),
    "IPNDMScheduler": ("ipndm", "leading", 0.0001, "linear", True),
    "DPMSolverSDEScheduler": ("dpmpp_sde", "linspace", 0.00085, "linear", True),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_defaults_of_schedulers(name):
    config = {"_class_name": name}
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    fields = configs.scheduler_fields(config)
    sampler, spacing, beta_start, beta_schedule, to_one = CLASSES[name]
    assert fields["sampling"] == {
        "sampler": sampler,
        "timestep_spacing": spacing,
        "sigma_spacing": None,
        "steps_offset": 0,
        "set_alpha_to_one": to_one,
    }
    assert fields["schedule"]["beta_start"] == beta_start
    assert fields["schedule"]["beta_schedule"] == beta_schedule
    assert configs.scheduler_fields(configs.scheduler_config(fields)) == fields


@pytest.mark.parametrize(
    "algorithm, order, sampler",
    [
        ("dpmsolver++", 2, "dpmpp_2m"),
        ("sde-dpmsolver++", 2, "dpmpp_2m_sde"),
        ("sde-dpmsolver++", 3, "dpmpp_3m_sde"),
    ],
)
def test_dpm_solvers(algorithm, order, sampler):
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": algorithm,
        "solver_order": order,
        "lambda_min_clipped": float("-inf"),
        "use_karras_sigmas": True,
    }
    fields = configs.scheduler_fields(config)
    assert fields["sampling"]["sampler"] == sampler
    assert fields["sampling"]["sigma_spacing"] == "karras"
    written = configs.scheduler_config(fields)
    assert (written["algorithm_type"], written["solver_order"]) == (algorithm, order)
    assert configs.scheduler_fields(written) == fields


@pytest.mark.parametrize("word", ["karras", "exponential", "beta"])
def test_sigma_spacings(word):
    config = {"_class_name": "EulerDiscreteScheduler", f"use_{word}_sigmas": True}
    assert configs.scheduler_fields(config)["sampling"]["sigma_spacing"] == word


def test_trained_betas():
    config = PNDM | {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}
    fields = configs.scheduler_fields(config)
    assert fields["schedule"]["trained_betas"] == (0.1, 0.2)
    assert configs.scheduler_config(fields)["trained_betas"] == [0.1, 0.2]


EULER, DPM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("FlowMatchEulerDiscreteScheduler", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("DPMSolverSinglestepScheduler", "_class_name", "DPMSolverSinglestepScheduler"),
        (None, "_class_name", None),
        (["DDIMScheduler"], "_class_name", ["DDIMScheduler"]),
        ("DDIMScheduler", "beta_schedule", "sigmoid"),
        ("DDIMScheduler", "beta_start", 2),
        ("DDIMScheduler", "num_train_timesteps", 0),
        ("DDIMScheduler", "prediction_type", "flow"),
        ("DDIMScheduler", "prediction_type", []),
        ("DDIMScheduler", "steps_offset", -1),
        ("DDIMScheduler", "thresholding", True),
        ("DDIMScheduler", "timestep_spacing", "cubic"),
        ("DDIMScheduler", "trained_betas", [0.1]),
        ("DDIMScheduler", "something_of_2030", "on"),
        ("DDPMScheduler", "variance_type", "learned_range"),
        ("PNDMScheduler", "skip_prk_steps", False),
        (EULER, "final_sigmas_type", "sigma_min"),
        (EULER, "interpolation_type", "log_linear"),
        (EULER, "sigma_max", 80),
        (EULER, "timestep_type", "continuous"),
        (DPM, "euler_at_final", True),
        (DPM, "lambda_min_clipped", -5.1),
        (DPM, "lower_order_final", False),
        (DPM, "solver_type", "heun"),
        (DPM, "use_flow_sigmas", True),
        (DPM, "use_lu_lambdas", True),
        ("DEISMultistepScheduler", "solver_order", 3),
        ("UniPCMultistepScheduler", "disable_corrector", [0]),
        ("UniPCMultistepScheduler", "predict_x0", False),
        ("UniPCMultistepScheduler", "solver_type", "bh1"),
        ("LCMScheduler", "original_inference_steps", 100),
        ("TCDScheduler", "timestep_scaling", 5),
    ],
)
def test_options_of_schedulers_that_change_the_computation(name, key, value):
    config = PNDM | {"_class_name": name, key: value}
    assert f"{key} = " in reads(configs.scheduler_fields, config)


@pytest.mark.parametrize(
    "algorithm, order", [("dpmsolver++", 3), ("dpmsolver", 2), ("sde-dpmsolver++", 1), ({}, [])]
)
def test_dpm_solvers_that_are_not_here(algorithm, order):
    config = {"_class_name": DPM, "algorithm_type": algorithm, "solver_order": order}
    assert "(algorithm_type, solver_order) = " in reads(configs.scheduler_fields, config)


def test_two_sigma_spacings():
    config = {"_class_name": EULER, "use_karras_sigmas": True, "use_beta_sigmas": True}
    assert "use_beta_sigmas = True" in reads(configs.scheduler_fields, config)


def test_prk_steps_must_be_switched_off_explicitly():
    config = {key: value for key, value in PNDM.items() if key != "skip_prk_steps"}
    assert "skip_prk_steps = None" in reads(configs.scheduler_fields, config)


@pytest.mark.parametrize(
    "key, value",
    [
        ("clip_sample", True),  # diffusers' Stable Diffusion pipelines turn it off
        ("solver_order", 3),  # an option of other classes
        ("rescale_betas_zero_snr", True),  # PNDM has no such option
        ("sample_max_value", 2.0),
        ("something_of_2030", False),
    ],
)
def test_options_that_pndm_does_not_have(key, value):
    assert configs.scheduler_fields(PNDM | {key: value}) == configs.scheduler_fields(PNDM)


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        ("sampling", "sampler", "dpmpp_2s_a", "sampler = 'dpmpp_2s_a'.* one of ddim, ddpm"),
        ("sampling", "sigma_spacing", "karras", "use_karras_sigmas = True.*PNDMScheduler has no"),
        ("schedule", "rescale_zero_terminal_snr", True, "rescale_betas_zero_snr = True"),
        ("schedule", "prediction", "flow", "prediction = 'flow'.* one of epsilon, v, sample"),
    ],
)
def test_fields_that_no_scheduler_of_diffusers_has(part, key, value, message):
    fields = configs.scheduler_fields(PNDM)
    fields[part][key] = value
    with pytest.raises(CheckpointMismatch, match=message):
        configs.scheduler_config(fields)
