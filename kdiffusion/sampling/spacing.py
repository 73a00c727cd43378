"""The spacing of a run: how its levels are spread over timesteps and between two sigmas."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
SIGMA_SPACINGS = ("karras", "exponential", "beta")
FINAL_SIGMAS = ("zero", "sigma_min")


@dataclass(frozen=True)
class Spacing:
    """The spacing of the levels of a run over the schedule, and where they end.

    Args:
        timesteps: `"leading"`, `"trailing"` or `"linspace"` (Lin et al. 2023, table 2).
        sigmas: None, or `"karras"` (Karras et al. 2022, eq. 5), `"exponential"` (even in
            log(sigma)) or `"beta"` (Lee et al. 2024), which spread the sigmas between the ends
            that the timesteps give.
        steps_offset: int, added to leading timesteps.
        set_alpha_to_one: bool, whether ddim and pndm end on the latents themselves. If false, they
            end on the level of timestep 0, as Stable Diffusion's configuration says.
        final_sigma: where the samplers that follow sigmas end: `"zero"`, on the latents
            themselves, or `"sigma_min"`, on the level of timestep 0.
        lower_order_final: bool, whether solvers in log(sigma) end short runs with steps of lower
            order.

    Raises:
        ValueError: If a name is unknown.

    Example:

    >>> Spacing.parse("trailing+karras").sigmas
    'karras'
    """

    timesteps: str = "leading"
    sigmas: str | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    final_sigma: str = "zero"
    lower_order_final: bool = True

    def __post_init__(self):
        if self.timesteps not in TIMESTEP_SPACINGS or self.sigmas not in (None, *SIGMA_SPACINGS):
            _unknown_spacing(f"timesteps={self.timesteps!r}, sigmas={self.sigmas!r}")
        if self.final_sigma not in FINAL_SIGMAS:
            raise ValueError(
                f"Unknown `final_sigma`. Received: {self.final_sigma!r}. Use one of "
                f"{list(FINAL_SIGMAS)}."
            )

    @classmethod
    def parse(cls, text: str | Spacing | None, base: Spacing | None = None) -> Spacing:
        """Return the spacing that a text names.

        Args:
            text: a timestep spacing ("trailing"), a sigma spacing ("karras"), a pair
                ("leading+karras"), a `Spacing` (returned as it is), or `None` for `base`.
            base: `Spacing` that the text changes, by default `Spacing()`. A timestep spacing alone
                removes the sigma spacing; a sigma spacing alone keeps the timesteps of `base`.

        Returns:
            `Spacing`.

        Raises:
            ValueError: If a name is unknown, or two are of one kind.
        """
        base = base or cls()
        if text is None:
            return base
        if isinstance(text, Spacing):
            return text
        names = str(text).split("+")
        timesteps = [name for name in names if name in TIMESTEP_SPACINGS]
        sigmas = [name for name in names if name in SIGMA_SPACINGS]
        if len(timesteps) > 1 or len(sigmas) > 1 or len(timesteps + sigmas) != len(names):
            _unknown_spacing(repr(text))
        return replace(
            base,
            timesteps=timesteps[0] if timesteps else base.timesteps,
            sigmas=sigmas[0] if sigmas else None,
        )


def spread_timesteps(spacing: Spacing, num_timesteps: int, count: int) -> np.ndarray:
    """Return `count` decreasing timesteps, not all whole (Lin et al. 2023, table 2)."""
    if spacing.timesteps == "leading":
        return np.arange(count)[::-1] * float(num_timesteps // count) + spacing.steps_offset
    if spacing.timesteps == "linspace":
        return np.linspace(0, num_timesteps - 1, count)[::-1]
    # arange and total - i * total / count round differently at ties. The reference implementations
    # use arange, which may give one point too many.
    return np.round(np.arange(num_timesteps, 0, -num_timesteps / count))[:count] - 1.0


def spread_sigmas(spacing: Spacing, sigma_max: float, sigma_min: float, count: int) -> np.ndarray:
    """Return `count` decreasing sigmas from `sigma_max` to `sigma_min`."""
    ramp = np.linspace(0.0, 1.0, count)
    if spacing.sigmas == "karras":
        # Karras et al. 2022, eq. 5, with rho = 7.
        high, low = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
        return (high + ramp * (low - high)) ** 7
    if spacing.sigmas == "exponential":
        return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))
    return sigma_min + _beta_quantiles(1.0 - ramp) * (sigma_max - sigma_min)


# Both parameters of the beta distribution (Lee et al. 2024).
_BETA = 0.6


def _beta_quantiles(shares):
    """Invert the distribution function of Beta(0.6, 0.6), by bisection of its lower half."""
    lower = np.minimum(shares, 1.0 - shares)
    low, high = np.zeros_like(lower), np.full_like(lower, 0.5)
    for _ in range(64):
        middle = (low + high) / 2
        below = _beta_distribution(middle) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    quantiles = np.where(lower == 0.0, 0.0, high)
    return np.where(shares < 0.5, quantiles, 1.0 - quantiles)


def _beta_distribution(x):
    """Sum the series of the regularized incomplete beta function (DLMF 8.17.8), for x <= 1/2."""
    term = x**_BETA * (1.0 - x) ** _BETA * math.gamma(2 * _BETA) / (_BETA * math.gamma(_BETA) ** 2)
    total = term
    for n in range(64):
        term = term * x * (2 * _BETA + n) / (_BETA + 1 + n)
        total = total + term
    return total


def _unknown_spacing(received):
    raise ValueError(
        f"Unknown spacing. Received: {received}. Use one of {list(TIMESTEP_SPACINGS)}, one of "
        f"{list(SIGMA_SPACINGS)}, or a pair such as 'leading+karras'."
    )
