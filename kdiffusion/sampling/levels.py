"""The levels that a run visits: which timesteps and sigmas, for each family of samplers."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kdiffusion.sampling.schedule import Schedule, level_of_sigma

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
SIGMA_SPACINGS = ("karras",)


@dataclass(frozen=True)
class Spacing:
    """How the levels of a run are spread over the schedule.

    Args:
        timesteps: `"leading"`, `"trailing"` or `"linspace"` (Lin et al. 2023, table 2).
        sigmas: None, or `"karras"` (Karras et al. 2022, eq. 5), which spreads the sigmas between
            the ends that the timesteps give.
        steps_offset: int, added to leading timesteps.
        set_alpha_to_one: bool, whether ddim ends on the latents themselves; False ends it on the
            level of timestep 0, as Stable Diffusion's configuration says.

    Raises:
        ValueError: for an unknown name.

    Example:

    >>> Spacing.parse("trailing+karras").sigmas
    'karras'
    """

    timesteps: str = "leading"
    sigmas: str | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    def __post_init__(self):
        if self.timesteps not in TIMESTEP_SPACINGS or self.sigmas not in (None, *SIGMA_SPACINGS):
            _unknown_spacing(f"timesteps={self.timesteps!r}, sigmas={self.sigmas!r}")

    @classmethod
    def parse(cls, text: "str | Spacing | None", base: "Spacing | None" = None) -> "Spacing":
        """Returns the spacing that a text names.

        Args:
            text: a timestep spacing ("trailing"), a sigma spacing ("karras"), a pair
                ("leading+karras"), a Spacing (returned as it is), or None for `base`.
            base: Spacing that the text changes, by default `Spacing()`. A timestep spacing alone
                asks for no sigma spacing; a sigma spacing alone keeps the timesteps of `base`.

        Raises:
            ValueError: for an unknown name, or two of one kind.
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


class Level(NamedTuple):
    """A noise level: at it the network is told `timestep` and sees `x = a * z + s * noise`."""

    timestep: float
    a: float
    s: float

    @property
    def sigma(self) -> float:
        """Noise relative to unit signal, infinite for pure noise."""
        return self.s / self.a if self.a else math.inf


class Levels(NamedTuple):
    """The levels of one run and what they were made from.

    Args:
        points: tuple of Level, one for each step and last the one where the run ends.
        num_steps: int, steps of the whole run, before `strength` left any out.
        schedule: Schedule.
        spacing: Spacing.
        start_scale: float, `x = start_scale * noise` where a run starts from noise alone.
    """

    points: tuple[Level, ...]
    num_steps: int
    schedule: Schedule
    spacing: Spacing
    start_scale: float


def make_levels(schedule: Schedule, num_steps: int, spacing: Spacing, family: str) -> Levels:
    """Returns the levels that a family of samplers visits in `num_steps` steps.

    The families differ in where their reference implementations put the same steps.

    Args:
        schedule: Schedule of the network.
        num_steps: int, 1 to `schedule.num_timesteps`.
        spacing: Spacing.
        family: name in `FAMILIES`.

    Raises:
        ValueError: if the schedule has no such number of distinct levels, or the family has no
            such spacing.
    """
    if not 1 <= num_steps <= schedule.num_timesteps:
        raise ValueError(
            f"`num_steps` must be 1 to {schedule.num_timesteps}, the timesteps of the schedule. "
            f"Received: num_steps={num_steps}. Usual values are 20 to 50."
        )
    points = FAMILIES[family](schedule, num_steps, spacing)
    sigmas = [level.sigma for level in points[:num_steps]]
    inside = points[0].timestep <= schedule.num_timesteps - 1
    if not inside or any(after >= before for before, after in pairwise(sigmas)):
        raise ValueError(
            f"The spacing has no {num_steps} distinct levels within the schedule's timesteps "
            f"0 to {schedule.num_timesteps - 1}. Received: num_steps={num_steps}, {spacing}. "
            "Use fewer steps or spacing='trailing'."
        )
    scaled = family == "euler" and spacing.timesteps != "leading"
    return Levels(tuple(points), num_steps, schedule, spacing, points[0].s if scaled else 1.0)


def _ddim_levels(schedule, num_steps, spacing):
    if spacing.sigmas is not None:
        raise ValueError(
            "This sampler walks over whole timesteps and takes no sigma spacing. Received: "
            f"sigmas={spacing.sigmas!r}. Use a timestep spacing, one of "
            f"{list(TIMESTEP_SPACINGS)}, or the same step under the name 'euler'."
        )
    timesteps = np.round(_timesteps(schedule, num_steps, spacing))
    end = Level(0.0, 1.0, 0.0) if spacing.set_alpha_to_one else Level(0.0, *schedule.level(0))
    return [*_levels_at(schedule, timesteps), end]


def _euler_levels(schedule, num_steps, spacing):
    points = _levels_at(schedule, _timesteps(schedule, num_steps, spacing))
    if spacing.sigmas is not None:
        points = _levels_between(schedule, num_steps, spacing, points[-1].sigma, points[0].sigma)
    return [*points, Level(0.0, 1.0, 0.0)]


def _dpmpp_levels(schedule, num_steps, spacing):
    if spacing.sigmas is not None:
        ends = schedule.sigmas[0], schedule.sigmas[-1]
        points = _levels_between(schedule, num_steps, spacing, *ends)
        points = [level._replace(timestep=float(np.round(level.timestep))) for level in points]
    elif spacing.timesteps == "trailing":
        points = _levels_at(schedule, np.round(_timesteps(schedule, num_steps, spacing)))
    else:
        timesteps = np.round(_timesteps(schedule, num_steps + 1, spacing))[:-1]
        points = _levels_at(schedule, timesteps)
    return [*points, Level(0.0, 1.0, 0.0)]


FAMILIES = {"ddim": _ddim_levels, "euler": _euler_levels, "dpmpp": _dpmpp_levels}


def _timesteps(schedule, count, spacing):
    """Returns `count` decreasing timesteps (Lin et al. 2023, table 2)."""
    total = schedule.num_timesteps
    if spacing.timesteps == "leading":
        return np.arange(count)[::-1] * float(total // count) + spacing.steps_offset
    if spacing.timesteps == "linspace":
        return np.linspace(0, total - 1, count)[::-1]
    # arange, not total - i * total / count: they round differently at ties, and the reference
    # implementations use arange; it may give one point too many.
    return np.round(np.arange(total, 0, -total / count))[:count] - 1.0


def _levels_at(schedule, timesteps):
    last = schedule.num_timesteps - 1
    return [Level(float(t), *schedule.level(min(t, last))) for t in timesteps]


def _levels_between(schedule, num_steps, spacing, sigma_min, sigma_max):
    sigmas = _karras(sigma_min, sigma_max, np.linspace(0.0, 1.0, num_steps))
    return [Level(schedule.timestep(sigma), *level_of_sigma(sigma)) for sigma in sigmas]


def _karras(sigma_min, sigma_max, ramp):
    """Karras et al. 2022, eq. 5, with rho = 7."""
    low, high = sigma_min ** (1 / 7), sigma_max ** (1 / 7)
    return (high + ramp * (low - high)) ** 7


def _unknown_spacing(received):
    raise ValueError(
        f"Unknown spacing. Received: {received}. Use one of {list(TIMESTEP_SPACINGS)}, one of "
        f"{list(SIGMA_SPACINGS)}, or a pair such as 'leading+karras'."
    )
