"""The schedulers of diffusers, run in float64 on a toy network with given noise."""

import contextlib
import warnings
from typing import NamedTuple
from unittest import mock

import diffusers
import numpy as np
import torch

from kdiffusion.sampling.samplers import Sampler
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing

SIGMA_SPACINGS = (None, "karras", "exponential", "beta")
SIZE = 7
IMAGE = np.linspace(-1.0, 1.0, SIZE)


class Case(NamedTuple):
    sampler: Sampler
    num_steps: int
    timesteps: str = "leading"
    sigmas: str | None = None
    prediction: str = "epsilon"
    options: tuple[tuple[str, object], ...] = ()
    zero_terminal_snr: bool = False
    strength: float = 1.0

    def spacing(self):
        return Spacing(self.timesteps, self.sigmas, **dict(self.options))

    def schedule(self):
        return Schedule(
            prediction=self.prediction, rescale_zero_terminal_snr=self.zero_terminal_snr
        )


class Scheduler(NamedTuple):
    """A scheduler of diffusers: its class, what to construct it with, and what x it keeps."""

    type: type
    config: dict = {}
    sigma_space: bool = False
    sigma_spacings: tuple = (None,)
    predictions: tuple = ("epsilon", "v", "sample")
    options: tuple = ({},)


def network(x, timestep):
    """A smooth nonlinear stand-in for a network."""
    return 0.9 * np.tanh(1.3 * x + 0.2 * np.sin(timestep / 100.0)) + 0.1 * x


def noise(rows):
    return np.random.default_rng(0).standard_normal((rows + 1, SIZE))


@contextlib.contextmanager
def reference_in_float64():
    """Makes the float32 that diffusers asks for float64, and keeps its warnings to itself."""
    default = torch.get_default_dtype()
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(np, "float32", np.float64),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


FINAL = ({}, {"final_sigma": "sigma_min"})
LOWER = ({}, {"lower_order_final": False})
ALL = SIGMA_SPACINGS
SCHEDULERS = {
    "ddim": Scheduler(
        diffusers.DDIMScheduler,
        {"clip_sample": False},
        options=({}, {"set_alpha_to_one": True}),
    ),
    "ddpm": Scheduler(diffusers.DDPMScheduler, {"clip_sample": False}),
    "pndm": Scheduler(
        diffusers.PNDMScheduler,
        {"skip_prk_steps": True},
        predictions=("epsilon", "v"),
        options=({}, {"set_alpha_to_one": True}),
    ),
    "euler": Scheduler(diffusers.EulerDiscreteScheduler, {}, True, ALL, options=FINAL),
    "euler_a": Scheduler(
        diffusers.EulerAncestralDiscreteScheduler, {}, True, predictions=("epsilon", "v")
    ),
    "heun": Scheduler(diffusers.HeunDiscreteScheduler, {}, True, ALL),
    "lms": Scheduler(diffusers.LMSDiscreteScheduler, {}, True, ALL),
    "dpm2": Scheduler(
        diffusers.KDPM2DiscreteScheduler, {}, True, ALL, predictions=("epsilon", "v")
    ),
    "dpm2_a": Scheduler(
        diffusers.KDPM2AncestralDiscreteScheduler, {}, True, ALL, predictions=("epsilon", "v")
    ),
    "dpmpp_2m": Scheduler(
        diffusers.DPMSolverMultistepScheduler, {}, False, ALL, options=(*FINAL, *LOWER[1:])
    ),
    "dpmpp_2m_sde": Scheduler(
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
        False,
        ALL,
        options=FINAL,
    ),
    "deis": Scheduler(diffusers.DEISMultistepScheduler, {}, False, ALL, options=LOWER),
    "unipc": Scheduler(diffusers.UniPCMultistepScheduler, {}, False, ALL, options=FINAL),
    "lcm": Scheduler(diffusers.LCMScheduler),
    "tcd": Scheduler(diffusers.TCDScheduler),
}
OPTION_NAMES = {
    "final_sigma": "final_sigmas_type",
    "set_alpha_to_one": "set_alpha_to_one",
    "lower_order_final": "lower_order_final",
}


def run_diffusers(case, drawn, landing):
    scheduler = make_scheduler(case)
    distilled = {"strength": case.strength} if case.sampler.name in ("lcm", "tcd") else {}
    scheduler.set_timesteps(case.num_steps, **distilled)
    timesteps = scheduler.timesteps[1 - len(drawn) :]
    to_network_space = SCHEDULERS[case.sampler.name].sigma_space
    options = {"eta": case.sampler.options["eta"]} if case.sampler.name in ("ddim", "tcd") else {}
    if case.sampler.name == "lms":
        options = {"order": case.sampler.options["order"]}
    x = torch.tensor(drawn[-1])[None, None] * scheduler.init_noise_sigma
    if case.strength < 1.0:
        x = _noisy_image(scheduler, torch.tensor(drawn[-1])[None, None], timesteps)
    states = []
    for row, timestep in enumerate(timesteps):
        seen = scheduler.scale_model_input(x, timestep)
        output = torch.tensor(network(seen.numpy(), float(timestep)))
        with _next_noise(scheduler, drawn[row]):
            x = scheduler.step(output, timestep, x, **options).prev_sample
        scale = landing[row][0] if to_network_space else 1.0
        states.append(scale * x.numpy()[0, 0])
    return states


def _noisy_image(scheduler, unit_noise, timesteps):
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))
    return scheduler.add_noise(torch.tensor(IMAGE)[None, None], unit_noise, timesteps[:1])


def make_scheduler(case):
    record = SCHEDULERS[case.sampler.name]
    config = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": {"v": "v_prediction"}.get(case.prediction, case.prediction),
        "timestep_spacing": case.timesteps,
        "steps_offset": 1,
        **record.config,
    }
    if case.sampler.name in ("ddim", "pndm"):
        config["set_alpha_to_one"] = False
    if case.sampler.name in ("deis", "unipc"):
        config["solver_order"] = case.sampler.options["order"]
    if case.zero_terminal_snr:
        config["rescale_betas_zero_snr"] = True
    config |= {OPTION_NAMES[name]: value for name, value in case.options}
    if case.sigmas is not None:
        config[f"use_{case.sigmas}_sigmas"] = True
    return record.type(**config)


def _next_noise(scheduler, values):
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if not hasattr(module, "randn_tensor"):
        return contextlib.nullcontext()
    drawn = torch.tensor(values)[None, None]
    return mock.patch.object(module, "randn_tensor", lambda *args, **kwargs: drawn)
