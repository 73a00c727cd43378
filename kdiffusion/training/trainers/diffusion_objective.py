"""The objective of a diffusion model: the noisy input, the target, and the weight of a timestep."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiffusion.sampling.schedule import Schedule
from kdiffusion.training import random

WEIGHTINGS = ("uniform", "min_snr", "debiased")


@dataclass(frozen=True)
class Objective:
    """The objective of a diffusion model, beside the schedule with its kind of prediction.

    Args:
        weighting: the weights of noise levels. `"uniform"` is the plain mean squared error (Ho et
            al. 2020, eq. 14); `"min_snr"` that of Hang et al. 2023; `"debiased"` that of Yu et
            al. 2023.
        min_snr_gamma: float, the signal-to-noise ratio above which `"min_snr"` counts less.
        offset_noise: float, deviation of a noise that is the same all over a channel; 0.05 to 0.1
            lets a model learn very dark and very bright images (Guttenberg 2023).
        input_perturbation: float, share of further noise in the input and not in the target (Ning
            et al. 2023); 0.1 in the paper.
        stratified: bool, whether the timesteps of a batch are spread evenly, which lowers the
            variance of the gradients and costs nothing; `False` makes each independent.
        caption_dropout: float in [0, 1], share of samples that lose their caption and class, as
            classifier-free guidance needs; 0.1 is usual.

    Raises:
        ValueError: If a value is out of range.
    """

    weighting: str = "uniform"
    min_snr_gamma: float = 5.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    stratified: bool = True
    caption_dropout: float = 0.0

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"Unknown `weighting`. Received: {self.weighting!r}. Use one of {list(WEIGHTINGS)}."
            )
        if not self.min_snr_gamma > 0:
            raise ValueError(
                "`min_snr_gamma` must be positive. "
                f"Received: min_snr_gamma={self.min_snr_gamma!r}. Use 5."
            )
        for name in ("offset_noise", "input_perturbation"):
            value = getattr(self, name)
            if not 0.0 <= value < np.inf:
                raise ValueError(
                    f"`{name}` must be 0 (off) or positive. Received: {name}={value!r}"
                )
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(
                "`caption_dropout` must be a share from 0 to 1. "
                f"Received: caption_dropout={self.caption_dropout!r}"
            )


class LossCoefficients(NamedTuple):
    """The coefficients of the loss at noise levels: float arrays of one shape.

    Args:
        a: scale of the latents in the noisy latents.
        s: scale of the noise in them.
        weight: of the squared error of the prediction in the loss.
        to_denoised: the factor from the squared error of the prediction to that of the denoised
            latents.
        to_epsilon: the factor from the squared error of the prediction to that of the noise.
    """

    a: Any
    s: Any
    weight: Any
    to_denoised: Any
    to_epsilon: Any


def loss_coefficients(schedule: Schedule, objective: Objective) -> LossCoefficients:
    """Compute the coefficients of all timesteps.

    Args:
        schedule: `Schedule`.
        objective: `Objective`.

    Returns:
        `LossCoefficients` of (num_timesteps,) float64 arrays.

    Raises:
        ValueError: If noise is to be predicted from pure noise.
    """
    alphas_cumprod = schedule.alphas_cumprod
    check_schedule(schedule)
    _warn_of_untrained(schedule, objective)
    a, s = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    to_denoised = np.array([schedule.denoised_coefficients(*pair)[1] ** 2 for pair in zip(a, s)])
    to_epsilon = {"epsilon": np.ones_like(a), "v": alphas_cumprod, "sample": snr}
    return LossCoefficients(
        a,
        s,
        loss_weight(snr, schedule.prediction, objective),
        to_denoised,
        to_epsilon[schedule.prediction],
    )


def timesteps(key: Any, step: Any, index: Any, num_timesteps: int, stratified: bool) -> Any:
    """Draw a timestep for each sample.

    Args:
        key, step, index: see `random.uniform`.
        num_timesteps: int, of the schedule.
        stratified: see `Objective`.

    Returns:
        (batch,) int32, from 0 to `num_timesteps` - 1.
    """
    if stratified:
        share = random.stratified(key, step, index, random.TIMESTEP)
    else:
        share = random.uniform(key, step, index, (), random.TIMESTEP)
    return ops.cast(ops.floor(share * num_timesteps), "int32")


def loss_weight(snr: np.ndarray, prediction: str, objective: Objective) -> np.ndarray:
    """Compute the weight of a noise level in the loss.

    Args:
        snr: float64 array, signal-to-noise ratios, a² / s².
        prediction: `"epsilon"`, `"v"` or `"sample"`.
        objective: `Objective`.

    Returns:
        An array of the same shape. Min-SNR follows Hang et al. 2023, section 3.4; for v, Salimans
        & Ho 2022 relate its error to that of the sample. Debiased follows Yu et al. 2023, eq. 11,
        with the bound and the form for v of its public implementations; for the sample the same
        relation of errors holds.
    """
    if objective.weighting == "min_snr":
        clipped = np.minimum(snr, objective.min_snr_gamma)
        if prediction == "epsilon":
            # This is clipped / snr, and its limit where the ratio is 0.
            return objective.min_snr_gamma / np.maximum(snr, objective.min_snr_gamma)
        return clipped if prediction == "sample" else clipped / (snr + 1.0)
    if objective.weighting == "debiased":
        if prediction == "v":
            return 1.0 / (snr + 1.0)
        root = np.sqrt(np.minimum(snr, 1000.0))
        return root if prediction == "sample" else 1.0 / root
    return np.ones_like(snr)


def noisy(latents: Any, noise: Any, a: Any, s: Any) -> Any:
    """Add noise to latents: x = a * z + s * noise (Ho et al. 2020, eq. 4).

    Args:
        latents: tensor (batch, height, width, channels).
        noise: unit normal, like `latents`.
        a, s: level of each sample, (batch, 1, 1, 1).
    """
    return a * latents + s * noise


def target(prediction: str, latents: Any, noise: Any, a: Any, s: Any) -> Any:
    """Return the network's target.

    Args:
        prediction: `"epsilon"`, `"v"` (Salimans & Ho 2022, appendix D) or `"sample"`.
        latents, noise, a, s: see `noisy`.

    Returns:
        Tensor like `latents`.
    """
    if prediction == "v":
        return a * noise - s * latents
    return noise if prediction == "epsilon" else latents


def squared_error(prediction: Any, target: Any) -> Any:
    """Compute the mean squared error of each sample, in float32.

    Args:
        prediction: tensor (batch, height, width, channels) of any float dtype.
        target: tensor of the same shape.

    Returns:
        (batch,) float32.
    """
    difference = ops.cast(prediction, "float32") - ops.cast(target, "float32")
    return ops.mean(ops.square(difference), axis=(1, 2, 3))


def check_schedule(schedule: Schedule) -> None:
    """Refuse to predict noise from pure noise.

    Args:
        schedule: `Schedule`.

    Raises:
        ValueError: If the schedule ends in pure noise, and noise is what the network predicts.
    """
    if schedule.prediction == "epsilon" and _ends_in_noise(schedule):
        raise ValueError(
            "A network that predicts noise learns nothing of the image where the input is noise "
            "alone. Received: prediction='epsilon' with zero terminal signal-to-noise ratio. Use "
            "prediction='v' or 'sample', or rescale_zero_terminal_snr=False."
        )


def _warn_of_untrained(schedule, objective):
    """Warn of a weighting that leaves out the timestep where sampling starts."""
    if not _ends_in_noise(schedule):
        return
    if loss_weight(np.zeros(1), schedule.prediction, objective)[0] == 0.0:
        warnings.warn(
            f"weighting={objective.weighting!r} gives pure noise, where a schedule with zero "
            "terminal signal-to-noise ratio starts to sample, the weight 0: it is never trained. "
            "Use weighting='uniform'.",
            stacklevel=4,
        )


def _ends_in_noise(schedule):
    return not schedule.alphas_cumprod[-1] > 0.0
