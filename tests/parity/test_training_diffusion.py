"""Targets of diffusion models against diffusers, and trained models read there."""

import diffusers
import keras
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from keras import ops

from kdiffusion import (
    DiffusionModel,
    ImageDecoder,
    ImageEncoder,
    LatentDiffusion,
    PixelDiffusion,
    Schedule,
)
from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
)
from kdiffusion.training import DiffusionTrainer, Objective, random
from kdiffusion.training.trainers.diffusion_objective import loss_coefficients, noisy, target

# diffusers' schedulers hand torch tensors to functions of NumPy.
pytestmark = [
    pytest.mark.backend,
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
TIMESTEPS = np.arange(1000)
SHAPE = (1000, 4, 3, 2)  # height, width and channels of a sample for each timestep
NETWORK = {
    "channels": (8, 16),
    "layers_per_level": 1,
    "depths": (1, 2),
    "mid_depth": 2,
    "num_heads": (2, 4),
    "num_groups": 4,
}
CONDITIONS = {
    "text": {"context_width": 12},
    "unconditional": {"context_width": None},
    "classes": {"context_width": None, "num_classes": 5},
}
CODEC = AutoencoderArchitecture(channels=(8, 8), layers_per_level=1, num_groups=4)


@pytest.fixture
def check(record_property, request):
    """Asserts that an error is below its bar, and keeps both for the report."""

    def check(name, found, wanted, bar):
        found, wanted = np.asarray(found), np.asarray(wanted)
        assert found.shape == wanted.shape
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        record_property(f"{request.node.name}: {name}", f"{error:.1e} < {bar:.0e}")
        assert error < bar

    return check


def scheduler(schedule):
    return diffusers.DDPMScheduler(
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        prediction_type=PREDICTIONS[schedule.prediction],
        rescale_betas_zero_snr=schedule.rescale_zero_terminal_snr,
    )


def torch_images(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def min_snr_weight(schedule, gamma):
    """As diffusers' train_text_to_image.py has it."""
    snr = compute_snr(scheduler(schedule), torch.from_numpy(TIMESTEPS))
    weight = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    if schedule.prediction == "epsilon":
        return (weight / snr).numpy()
    if schedule.prediction == "v":
        return (weight / (snr + 1)).numpy()
    return weight.numpy()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(prediction, gamma, check):
    schedule = Schedule(prediction=prediction)
    weight = loss_coefficients(schedule, Objective("min_snr", min_snr_gamma=gamma)).weight
    check("weight", weight, min_snr_weight(schedule, gamma), 1e-5)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr(beta_schedule, check):
    schedule = Schedule(beta_schedule=beta_schedule, prediction="v", rescale_zero_terminal_snr=True)
    betas = scheduler(Schedule(beta_schedule=beta_schedule)).betas
    # The cosine's betas are float32 there.
    wanted = torch.cumprod(1 - rescale_zero_terminal_snr(betas.double()), dim=0)
    of = loss_coefficients(schedule, Objective())
    check("alphas_cumprod", of.a**2, wanted.numpy(), 1e-5)
    assert of.a[-1] == 0.0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero", [False, True])
def test_noisy_latents_and_targets(prediction, zero, check):
    schedule = Schedule(prediction="v" if zero else prediction, rescale_zero_terminal_snr=zero)
    latents, noise = np.random.default_rng(0).standard_normal((2, *SHAPE), np.float32)
    of = loss_coefficients(schedule, Objective())
    a, s = (x.astype("float32").reshape(-1, 1, 1, 1) for x in (of.a, of.s))
    theirs, timesteps = scheduler(schedule), torch.from_numpy(TIMESTEPS)
    pair = torch_images(latents), torch_images(noise)
    wanted = np.moveaxis(theirs.add_noise(*pair, timesteps).numpy(), 1, -1)
    # Without any signal DDPMScheduler puts 2**-24 as alphas_cumprod, so that sigmas are finite.
    bar = 3e-4 if zero else 1e-6
    check("noisy latents", noisy(latents, noise, a, s), wanted, bar)
    targets = {
        "epsilon": noise,
        "v": np.moveaxis(theirs.get_velocity(*pair, timesteps).numpy(), 1, -1),
        "sample": latents,
    }
    found = target(prediction, latents, noise, a, s)
    check("target", found, targets[prediction], bar)


def networks(conditions):
    """The same random network here and there."""
    keras.utils.set_random_seed(0)
    architecture = DiffusionArchitecture(**NETWORK, **conditions)
    ours = DiffusionModel(architecture)
    generator = np.random.default_rng(1)
    for variable in ours.variables:
        deviation = np.prod(variable.shape[:-1]) ** -0.5 if len(variable.shape) > 1 else 0.3
        mean = 1.0 if variable.path.endswith("gamma") else 0.0
        variable.assign(generator.normal(mean, deviation, variable.shape))
    return ours


def their_network(folder):
    return diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()


def inputs_of(conditions, generator):
    inputs = {}
    if conditions.get("context_width"):
        inputs["context"] = generator.standard_normal((3, 7, 12), np.float32)
    if conditions.get("num_classes"):
        inputs["label"] = np.array([0, 3, 5], np.int32)  # the last one is none of the classes
    return inputs


def their_inputs(inputs):
    context = torch.from_numpy(inputs["context"]) if "context" in inputs else None
    labels = torch.from_numpy(inputs["label"]).long() if "label" in inputs else None
    return {"encoder_hidden_states": context, "class_labels": labels}


@pytest.mark.parametrize("conditions", CONDITIONS.values(), ids=CONDITIONS)
def test_networks_of_each_condition(conditions, tmp_path, check):
    ours = networks(conditions)
    DiffusionTrainer(ours, Schedule()).save(tmp_path / "model")
    theirs = their_network(tmp_path / "model")
    generator = np.random.default_rng(2)
    latents = generator.standard_normal((3, 8, 12, 4), np.float32)
    timestep = np.array([1.0, 400.0, 999.0], np.float32)
    inputs = inputs_of(conditions, generator)
    found = ours({"latents": latents, "timestep": timestep, **inputs})
    with torch.no_grad():
        wanted = theirs(
            torch_images(latents), torch.from_numpy(timestep), **their_inputs(inputs)
        ).sample
    check("output", ops.convert_to_numpy(found), np.moveaxis(wanted.numpy(), 1, -1), 1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_whole_loss(prediction, weighting, tmp_path, check):
    """A training step of diffusers' train_text_to_image.py, with the trainer's own draws."""
    schedule = Schedule(prediction=prediction)
    conditions = {"context_width": 12, "num_classes": 5}
    trainer = DiffusionTrainer(
        networks(conditions), schedule, objective=Objective(weighting, offset_noise=0.1)
    )
    generator = np.random.default_rng(3)
    batch = {
        "mean": generator.standard_normal((3, 8, 8, 4), np.float32),
        "logvar": generator.uniform(-2, 0, (3, 8, 8, 4)).astype("float32"),
        **inputs_of(conditions, generator),
    }
    index = np.arange(3, dtype=np.int32)

    def normal(shape, purpose):
        return ops.convert_to_numpy(random.normal(7, 2, index, shape, purpose))

    share = ops.convert_to_numpy(random.stratified(7, 2, index))
    timesteps = torch.from_numpy(np.floor(1000 * share).astype(int))
    latents = batch["mean"] + np.exp(0.5 * batch["logvar"]) * normal((8, 8, 4), random.POSTERIOR)
    latents = torch_images(latents)
    noise = torch_images(normal((8, 8, 4), random.NOISE))
    noise = noise + 0.1 * torch_images(normal((1, 1, 4), random.OFFSET))
    trainer.save(tmp_path / "model")
    theirs = scheduler(schedule)
    with torch.no_grad():
        output = their_network(tmp_path / "model")(
            theirs.add_noise(latents, noise, timesteps), timesteps, **their_inputs(batch)
        ).sample
    wanted = {
        "epsilon": noise,
        "v": theirs.get_velocity(latents, noise, timesteps),
        "sample": latents,
    }[prediction]
    error = torch.nn.functional.mse_loss(output, wanted, reduction="none").mean(dim=(1, 2, 3))
    weight = min_snr_weight(schedule, 5.0)[timesteps] if weighting == "min_snr" else 1.0
    losses, _ = trainer.losses(batch, 7, 2)
    check("loss", ops.convert_to_numpy(losses["model"]), error.numpy() * weight, 1e-4)


@pytest.mark.parametrize("name", ["LatentDiffusion", "PixelDiffusion"])
def test_what_was_trained_is_read_there(name, tmp_path):
    schedule = Schedule(prediction="v", rescale_zero_terminal_snr=True)
    conditions = CONDITIONS["classes"]
    if name == "LatentDiffusion":
        parts = {
            "diffusion_model": networks(conditions),
            "image_encoder": ImageEncoder(CODEC),
            "image_decoder": ImageDecoder(CODEC),
        }
        LatentDiffusion.from_parts(parts, schedule, (16, 16)).save(tmp_path / "model")
        diffusers.AutoencoderKL.from_pretrained(tmp_path / "model/vae")
    else:
        parts = {"diffusion_model": networks(conditions)}
        PixelDiffusion.from_parts(parts, schedule, (16, 16)).save(tmp_path / "model")
    network = their_network(tmp_path / "model")
    assert network.config.num_class_embeds == 6
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "model/scheduler")
    assert theirs.config.prediction_type == "v_prediction"
    assert theirs.config.rescale_betas_zero_snr
    assert theirs.config.timestep_spacing == "trailing"
