"""The noising process that a network was trained on, as plain float64 numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v", "sample")

# It stands for the infinite sigma of pure noise where sigmas are spread or interpolated. The
# reference implementations do the same, with alphas_cumprod = 2**-24.
LARGEST_SIGMA = math.sqrt(2.0**24 - 1.0)


@dataclass(frozen=True)
class Schedule:
    """The training map between timesteps and noise levels.

    At timestep `t` the noisy latents are `x = a * z + s * noise`, with
    `a = sqrt(alphas_cumprod[t])` and `s = sqrt(1 - alphas_cumprod[t])` (Ho et al. 2020, eq. 4);
    `sigma = s / a`.

    Args:
        num_timesteps: int, timesteps of training.
        beta_start: float, first beta of the linear schedules.
        beta_end: float, last beta of the linear schedules.
        beta_schedule: `"scaled_linear"` (linear in sqrt(beta), Stable Diffusion), `"linear"`
            (Ho et al. 2020) or `"squaredcos_cap_v2"` (Nichol & Dhariwal 2021, eq. 17).
        prediction: what the network returns, `"epsilon"` (the noise), `"v"` (`a * noise - s * z`,
            Salimans & Ho 2022) or `"sample"` (the latents).
        rescale_zero_terminal_snr: bool, whether the last timestep is shifted to pure noise
            (Lin et al. 2023, algorithm 1).
        trained_betas: sequence of `num_timesteps` floats in place of `beta_schedule`, or None.

    Raises:
        ValueError: If a name is unknown, or betas do not fit `num_timesteps`.

    Example:

    >>> round(Schedule().sigma(999), 4)
    14.6146
    """

    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction: str = "epsilon"
    rescale_zero_terminal_snr: bool = False
    trained_betas: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(self.trained_betas))
            if len(self.trained_betas) != self.num_timesteps:
                raise ValueError(
                    f"`trained_betas` must hold one beta for each of the {self.num_timesteps} "
                    f"timesteps. Received: {len(self.trained_betas)} betas. Set `num_timesteps`."
                )
        _check_known("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _check_known("prediction", self.prediction, PREDICTIONS)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Return the cumulative product of `1 - beta`, `(num_timesteps,)` float64, read-only."""
        alphas_cumprod = np.cumprod(1.0 - _betas(self))
        if self.rescale_zero_terminal_snr:
            a = np.sqrt(alphas_cumprod)
            alphas_cumprod = np.square((a - a[-1]) * (a[0] / (a[0] - a[-1])))
        alphas_cumprod.setflags(write=False)
        return alphas_cumprod

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Return `sigma` of every timestep, increasing, `(num_timesteps,)` float64, read-only.

        The last one is infinite where the terminal signal-to-noise ratio is zero.
        """
        with np.errstate(divide="ignore"):
            sigmas = np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)
        sigmas.setflags(write=False)
        return sigmas

    def sigma(self, timestep: float) -> float:
        """Return sigma at a timestep in `[0, num_timesteps - 1]`, linear between whole ones."""
        below = int(timestep)
        if below == timestep:
            return float(self.sigmas[below])
        share = timestep - below
        above = min(float(self.sigmas[below + 1]), LARGEST_SIGMA)
        return float(self.sigmas[below] * (1.0 - share) + above * share)

    def timestep(self, sigma: float) -> float:
        """Return the timestep of a sigma, linear in `log(sigma)`, clipped to the trained range."""
        if sigma <= self.sigmas[0]:
            return 0.0
        logs = np.log(np.minimum(self.sigmas, LARGEST_SIGMA))
        return float(np.interp(math.log(sigma), logs, np.arange(self.num_timesteps)))

    def level(self, timestep: float) -> tuple[float, float]:
        """Return `(a, s)` of a timestep: `x = a * z + s * noise`."""
        if int(timestep) == timestep:
            alpha_cumprod = float(self.alphas_cumprod[int(timestep)])
            return math.sqrt(alpha_cumprod), math.sqrt(1.0 - alpha_cumprod)
        return level_of_sigma(self.sigma(timestep))

    def denoised_coefficients(self, a: float, s: float) -> tuple[float, float]:
        """Return `(skip, out)`: the denoised latents are `skip * x + out * network(x)`.

        Args:
            a: float, scale of the latents in `x`.
            s: float, scale of the noise in `x`.

        Raises:
            ValueError: If `a` is 0 and the network predicts noise: pure noise holds no latents.
        """
        if self.prediction == "v":
            return a, -s
        if self.prediction == "sample":
            return 0.0, 1.0
        if a == 0.0:
            raise ValueError(
                "The first step is at zero signal-to-noise ratio, where a network that predicts "
                "noise tells nothing of the picture. Received: prediction='epsilon'. Use "
                "prediction='v', or rescale_zero_terminal_snr=False, or spacing='leading'."
            )
        return 1.0 / a, -s / a


def level_of_sigma(sigma: float) -> tuple[float, float]:
    """Return `(a, s)` with `a**2 + s**2 = 1` and `s / a = sigma`; sigma may be infinite."""
    a = 1.0 / math.hypot(1.0, sigma)
    return a, a * sigma if a else 1.0


def _betas(schedule):
    count, start, end = schedule.num_timesteps, schedule.beta_start, schedule.beta_end
    if schedule.trained_betas is not None:
        return np.asarray(schedule.trained_betas, dtype=np.float64)
    if schedule.beta_schedule == "linear":
        return np.linspace(start, end, count)
    if schedule.beta_schedule == "scaled_linear":
        return np.square(np.linspace(math.sqrt(start), math.sqrt(end), count))
    share = np.arange(count + 1) / count
    alphas_cumprod = np.square(np.cos((share + 0.008) / 1.008 * (math.pi / 2)))
    return np.minimum(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


def _check_known(argument, value, known):
    if value not in known:
        raise ValueError(f"Unknown `{argument}`. Received: {value!r}. Use one of {list(known)}.")
