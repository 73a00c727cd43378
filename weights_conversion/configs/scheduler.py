"""scheduler_config.json of diffusers, to the fields of a schedule and a sampler and back.

Configs are handed from one scheduler class to the next with all their keys, so a key that only
another class knows is ignored here as there. What the class itself knows has to be something the
samplers here do. `clip_sample` is passed over: diffusers' Stable Diffusion pipelines turn it off,
because latents are not bounded by ±1.

Source: the signatures of diffusers 0.42's schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from weights_conversion.configs.options import (
    Options,
    flag,
    is_neutral,
    natural,
    number,
    one_of,
    unsupported,
)


class _Scheduler(NamedTuple):
    """A scheduler class of diffusers.

    Attributes:
        sampler: its name here; None if algorithm_type and solver_order tell it.
        defaults: the options that are read, with the class's defaults.
        required: what the other options must be to be what the sampler does.
        explicit: options whose default in the class is another one, so that files must say them.
    """

    sampler: str | None
    defaults: Mapping[str, Any]
    required: Mapping[str, Any] = {}
    explicit: Mapping[str, Any] = {}


_BASE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SPACED = {"timestep_spacing": "linspace"}
_SIGMAS = {
    **_SPACED,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
# Of Stable Diffusion, and the defaults of some classes.
LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = {
    **LATENT_BETAS,
    **_ZERO_SNR,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": True,
}

_UNCLIPPED = {"clip_sample": False}
_THRESHOLDING = {"thresholding": False}
_DISTILLED_REQUIRED = {
    **_THRESHOLDING,
    "original_inference_steps": 50,
    "timestep_scaling": 10,
}
_FLOW = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
_MULTISTEP = {**_THRESHOLDING, **_FLOW, "lower_order_final": True}

_SCHEDULERS = {
    "DDIMScheduler": _Scheduler(
        "ddim", {**_BASE, **_ZERO_SNR, "set_alpha_to_one": True}, _THRESHOLDING, _UNCLIPPED
    ),
    "DDPMScheduler": _Scheduler(
        "ddpm",
        {**_BASE, **_ZERO_SNR},
        {**_THRESHOLDING, "variance_type": "fixed_small"},
        _UNCLIPPED,
    ),
    "PNDMScheduler": _Scheduler(
        "pndm",
        {**_BASE, "set_alpha_to_one": False},
        {"skip_prk_steps": True},
        {"skip_prk_steps": True},
    ),
    "LMSDiscreteScheduler": _Scheduler("lms", {**_BASE, **_SIGMAS}),
    "EulerDiscreteScheduler": _Scheduler(
        "euler",
        {**_BASE, **_SIGMAS, **_ZERO_SNR},
        {
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "sigma_min": None,
            "sigma_max": None,
            "final_sigmas_type": "zero",
        },
    ),
    "EulerAncestralDiscreteScheduler": _Scheduler("euler_a", {**_BASE, **_SPACED, **_ZERO_SNR}),
    "HeunDiscreteScheduler": _Scheduler("heun", {**_BASE, **_SIGMAS, **LATENT_BETAS}),
    "KDPM2DiscreteScheduler": _Scheduler("dpm2", {**_BASE, **_SIGMAS, **LATENT_BETAS}),
    "KDPM2AncestralDiscreteScheduler": _Scheduler("dpm2_a", {**_BASE, **_SIGMAS, **LATENT_BETAS}),
    "DPMSolverMultistepScheduler": _Scheduler(
        None,
        {
            **_BASE,
            **_SIGMAS,
            **_ZERO_SNR,
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
        },
        {
            **_MULTISTEP,
            "solver_type": "midpoint",
            "euler_at_final": False,
            "use_lu_lambdas": False,
            "final_sigmas_type": "zero",
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
        },
    ),
    "DEISMultistepScheduler": _Scheduler(
        "deis",
        {**_BASE, **_SIGMAS},
        {**_MULTISTEP, "algorithm_type": "deis", "solver_type": "logrho", "solver_order": 2},
    ),
    "UniPCMultistepScheduler": _Scheduler(
        "unipc",
        {**_BASE, **_SIGMAS, **_ZERO_SNR},
        {
            **_MULTISTEP,
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "disable_corrector": [],
            "solver_p": None,
            "final_sigmas_type": "zero",
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        },
    ),
    "LCMScheduler": _Scheduler("lcm", {**_BASE, **_DISTILLED}, _DISTILLED_REQUIRED),
    "TCDScheduler": _Scheduler("tcd", {**_BASE, **_DISTILLED}, _DISTILLED_REQUIRED),
    "IPNDMScheduler": _Scheduler("ipndm", _BASE),
    "DPMSolverSDEScheduler": _Scheduler("dpmpp_sde", {**_BASE, **_SIGMAS, **LATENT_BETAS}),
}
_DPM_SOLVERS = {  # (algorithm_type, solver_order)
    ("dpmsolver++", 2): "dpmpp_2m",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
}
# Options of some class that do nothing unless another one, refused above, is set.
_WITHOUT_EFFECT = {
    "clip_sample",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "flow_shift",
    "noise_sampler_seed",
    "sample_max_value",
    "time_shift_type",
}
_KNOWN_KEYS = _WITHOUT_EFFECT.union(
    *(scheduler.defaults.keys() | scheduler.required.keys() for scheduler in _SCHEDULERS.values())
)

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
_BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
_SPACINGS = ("leading", "trailing", "linspace")
_SIGMA_SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}


def scheduler_fields(config: Options) -> dict[str, dict[str, Any]]:
    """Return {"schedule": fields, "sampling": fields} from a scheduler_config.json.

    Raises:
        CheckpointMismatch: another class, or an option that the samplers here do not know.
    """
    scheduler = _SCHEDULERS[one_of({"_class_name": None, **config}, "_class_name", _SCHEDULERS)]
    _check_options(config, scheduler)
    # Samplers that end at z whatever this says hand it on to those that ask.
    options = {"set_alpha_to_one": True, **scheduler.defaults}
    options |= {key: config[key] for key in options.keys() & config.keys()}
    options.setdefault("rescale_betas_zero_snr", False)
    return {
        "schedule": {
            "num_timesteps": natural(options, "num_train_timesteps"),
            "beta_start": number(options, "beta_start", 0, 1),
            "beta_end": number(options, "beta_end", 0, 1),
            "beta_schedule": one_of(options, "beta_schedule", _BETA_SCHEDULES),
            "prediction": _PREDICTIONS[one_of(options, "prediction_type", _PREDICTIONS)],
            "rescale_zero_terminal_snr": flag(options, "rescale_betas_zero_snr"),
            "trained_betas": _betas(options),
        },
        "sampling": {
            "sampler": scheduler.sampler or _dpm_solver(options),
            "timestep_spacing": one_of(options, "timestep_spacing", _SPACINGS),
            "sigma_spacing": _sigma_spacing(options),
            "steps_offset": int(number(options, "steps_offset", 0, 1000)),
            "set_alpha_to_one": flag(options, "set_alpha_to_one"),
        },
    }


def scheduler_config(fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scheduler_config.json of a schedule and a sampler.

    Args:
        fields: {"schedule": fields, "sampling": fields}, as `scheduler_fields` gives them.

    Raises:
        CheckpointMismatch: no scheduler class of diffusers does this.
    """
    schedule, sampling = fields["schedule"], fields["sampling"]
    name, config = _class_of(sampling["sampler"])
    betas = schedule["trained_betas"]
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    options = {
        "num_train_timesteps": schedule["num_timesteps"],
        "beta_start": schedule["beta_start"],
        "beta_end": schedule["beta_end"],
        "beta_schedule": schedule["beta_schedule"],
        "trained_betas": None if betas is None else list(betas),
        "prediction_type": predictions[one_of(schedule, "prediction", predictions)],
        "rescale_betas_zero_snr": schedule["rescale_zero_terminal_snr"],
        "timestep_spacing": sampling["timestep_spacing"],
        "steps_offset": sampling["steps_offset"],
        "set_alpha_to_one": sampling["set_alpha_to_one"],
        **{key: sampling["sigma_spacing"] == word for key, word in _SIGMA_SPACINGS.items()},
    }
    known = _SCHEDULERS[name].defaults
    for key in ("rescale_betas_zero_snr", *_SIGMA_SPACINGS):
        if options[key] and key not in known:
            raise unsupported(key, True, f"false, because diffusers' {name} has no such option")
    return config | {key: value for key, value in options.items() if key in known}


def _class_of(sampler: str) -> tuple[str, dict[str, Any]]:
    """Return a sampler's class and the options that make the class this sampler."""
    samplers: dict[str, tuple[str, Mapping[str, Any]]] = {
        row.sampler: (name, row.explicit) for name, row in _SCHEDULERS.items() if row.sampler
    }
    for (algorithm, order), dpm_solver in _DPM_SOLVERS.items():
        solver = {"algorithm_type": algorithm, "solver_order": order}
        samplers[dpm_solver] = ("DPMSolverMultistepScheduler", solver)
    name, options = samplers[one_of({"sampler": sampler}, "sampler", samplers)]
    return name, {"_class_name": name, **options}


def _check_options(config: Options, scheduler: _Scheduler) -> None:
    for key, required in scheduler.required.items():
        value = config.get(key, None if key in scheduler.explicit else required)
        if not is_neutral(value, required):
            raise unsupported(key, value, repr(required))
    for key, value in config.items():
        if key not in _KNOWN_KEYS and not key.startswith("_") and not is_neutral(value, None):
            raise unsupported(key, value, "no such option")


def _dpm_solver(options: Options) -> str:
    solver = (options["algorithm_type"], options["solver_order"])
    for choice, sampler in _DPM_SOLVERS.items():
        if solver == choice:
            return sampler
    known = ", ".join(map(str, _DPM_SOLVERS))
    raise unsupported("(algorithm_type, solver_order)", solver, f"one of {known}")


def _sigma_spacing(options: Options) -> str | None:
    chosen = [key for key in _SIGMA_SPACINGS if options.get(key)]
    if len(chosen) > 1:
        raise unsupported(chosen[1], True, f"false, because {chosen[0]} is true")
    return _SIGMA_SPACINGS[chosen[0]] if chosen else None


def _betas(options: Options) -> tuple[float, ...] | None:
    betas = options["trained_betas"]
    if betas is None:
        return None
    if not isinstance(betas, Sequence) or len(betas) != options["num_train_timesteps"]:
        expected = f"null or a list of {options['num_train_timesteps']}"
        raise unsupported("trained_betas", betas, expected)
    return tuple(number({"trained_betas": beta}, "trained_betas", 0, 1) for beta in betas)
