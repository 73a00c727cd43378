"""The levels that a run visits: timesteps and sigmas, for each family of samplers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kdiffusion.sampling.schedule import LARGEST_SIGMA, Schedule, level_of_sigma
from kdiffusion.sampling.spacing import (
    TIMESTEP_SPACINGS,
    Spacing,
    spread_sigmas,
    spread_timesteps,
)

# Latent consistency models are distilled from a solver of this many steps, and sampled on some of
# them (Luo et al. 2023; the published weights' `original_inference_steps`).
DISTILLED_STEPS = 50


class Level(NamedTuple):
    """A noise level: the network gets `timestep` and `x = a * z + s * noise`.

    Args:
        timestep: float, which need not be whole.
        a: float, scale of the latents in `x`.
        s: float, scale of the noise in `x`.
    """

    timestep: float
    a: float
    s: float

    @property
    def sigma(self) -> float:
        """Return the noise relative to unit signal, infinite for pure noise."""
        return self.s / self.a if self.a else math.inf


class Levels(NamedTuple):
    """The levels of one run and what they were made from.

    Args:
        points: tuple of `Level`, one for each step and a last one where the run ends.
        num_steps: int, steps of the whole run, before `strength` left any out.
        schedule: `Schedule`.
        spacing: `Spacing`.
        start_scale: float, `x = start_scale * noise` where a run starts from noise alone.
    """

    points: tuple[Level, ...]
    num_steps: int
    schedule: Schedule
    spacing: Spacing
    start_scale: float


class LevelFamily(NamedTuple):
    """Samplers whose reference implementations put the levels of a run at the same places.

    Args:
        points: function `(schedule, num_steps, spacing, strength)` that returns the `Level` of
            each step that is run.
        end: function `(schedule, spacing)` that returns the `Level` where the run ends.
        sigma_spacings: bool, whether the samplers take a sigma spacing.
        scaled_start: bool, whether a start from noise alone is scaled to the noise of the first
            level, with trailing and linspace timesteps.
    """

    points: Callable[[Schedule, int, Spacing, float], Sequence[Level]]
    end: Callable[[Schedule, Spacing], Level]
    sigma_spacings: bool = True
    scaled_start: bool = False


def make_levels(
    schedule: Schedule, num_steps: int, spacing: Spacing, family: str, strength: float = 1.0
) -> Levels:
    """Return the levels that a family of samplers visits in `num_steps` steps.

    Args:
        schedule: `Schedule` of the network.
        num_steps: int, 1 to `schedule.num_timesteps`.
        spacing: `Spacing`.
        family: name in `FAMILIES`.
        strength: float in (0, 1], the share of the noise range that is run, counted from its end.

    Returns:
        `Levels`.

    Raises:
        ValueError: If the schedule has fewer distinct levels, the family does not take the
            spacing, or no step is left to run.
    """
    record = FAMILIES[family]
    if not 1 <= num_steps <= schedule.num_timesteps:
        raise ValueError(
            f"`num_steps` must be 1 to {schedule.num_timesteps}, the timesteps of the schedule. "
            f"Received: num_steps={num_steps}. Usual values are 20 to 50."
        )
    if not 0.0 < strength <= 1.0:
        raise ValueError(
            "`strength` must be in (0, 1], the share of the noise range that is run. Received: "
            f"strength={strength!r}. Use 0.8 to change much, 0.3 to change little."
        )
    if spacing.sigmas is not None and not record.sigma_spacings:
        raise ValueError(
            "This sampler walks over whole timesteps and takes no sigma spacing. Received: "
            f"sigmas={spacing.sigmas!r}. Use a timestep spacing, one of "
            f"{list(TIMESTEP_SPACINGS)}, or another sampler; 'euler' takes the steps of 'ddim'."
        )
    points = record.points(schedule, num_steps, spacing, strength)
    return Levels(
        points=(*points, record.end(schedule, spacing)),
        num_steps=num_steps,
        schedule=schedule,
        spacing=spacing,
        start_scale=(
            points[0].s if record.scaled_start and spacing.timesteps != "leading" else 1.0
        ),
    )


def level_at_sigma(schedule: Schedule, sigma: float) -> Level:
    """Return the level of a sigma, at a timestep that need not be whole."""
    return Level(schedule.timestep(sigma), *level_of_sigma(sigma))


def level_at_timestep(schedule: Schedule, timestep: float) -> Level:
    """Return the level of a timestep, which need not be whole."""
    return Level(float(timestep), *schedule.level(timestep))


def _whole_points(schedule, num_steps, spacing, strength):
    timesteps = np.round(spread_timesteps(spacing, schedule.num_timesteps, num_steps))
    return _later(_points_at(schedule, timesteps, spacing), strength)


def _fractional_points(schedule, num_steps, spacing, strength):
    timesteps = spread_timesteps(spacing, schedule.num_timesteps, num_steps)
    points = _points_at(schedule, timesteps, spacing)
    if spacing.sigmas is not None:
        points = _points_between(schedule, num_steps, spacing, points[0], points[-1])
    return _later(points, strength)


def _dpm2_points(schedule, num_steps, spacing, strength):
    points = _fractional_points(schedule, num_steps, spacing, strength)
    return _rounded(points, np.round) if spacing.sigmas == "karras" else points


def _inner_points(schedule, num_steps, spacing, strength):
    if spacing.sigmas is not None:
        ends = (level_at_timestep(schedule, t) for t in (schedule.num_timesteps - 1, 0))
        points = _points_between(schedule, num_steps, spacing, *ends)
        points = _rounded(points, np.round if spacing.sigmas == "karras" else np.floor)
    elif spacing.timesteps == "trailing":
        return _whole_points(schedule, num_steps, spacing, strength)
    else:
        timesteps = spread_timesteps(spacing, schedule.num_timesteps, num_steps + 1)
        points = _points_at(schedule, np.round(timesteps[:-1]), spacing)
    return _later(points, strength)


def _distilled_points(schedule, num_steps, spacing, strength):
    kept = int(DISTILLED_STEPS * strength)
    if num_steps > kept:
        raise ValueError(
            f"A distilled model runs at most {DISTILLED_STEPS} * strength steps. Received: "
            f"num_steps={num_steps}, strength={strength!r}. Use num_steps <= {kept} (4 is usual)."
        )
    taught = np.arange(kept, 0, -1) * (schedule.num_timesteps // DISTILLED_STEPS) - 1
    chosen = np.floor(np.linspace(0, kept, num_steps, endpoint=False)).astype(int)
    return [level_at_timestep(schedule, t) for t in taught[chosen]]


def _end_at_latents(schedule, spacing):
    return Level(0.0, 1.0, 0.0)


def _end_at_timestep_0(schedule, spacing):
    return level_at_timestep(schedule, 0)


def _end_of_alphas(schedule, spacing):
    at_latents = spacing.set_alpha_to_one
    return (_end_at_latents if at_latents else _end_at_timestep_0)(schedule, spacing)


def _end_of_sigmas(schedule, spacing):
    at_latents = spacing.final_sigma == "zero"
    return (_end_at_latents if at_latents else _end_at_timestep_0)(schedule, spacing)


FAMILIES = {
    "ddim": LevelFamily(_whole_points, _end_of_alphas, sigma_spacings=False),
    "ddpm": LevelFamily(_whole_points, _end_at_latents, sigma_spacings=False),
    "euler": LevelFamily(_fractional_points, _end_of_sigmas, scaled_start=True),
    "dpm2": LevelFamily(_dpm2_points, _end_of_sigmas, scaled_start=True),
    "dpmpp": LevelFamily(_inner_points, _end_of_sigmas),
    "deis": LevelFamily(_inner_points, _end_at_timestep_0),
    "lcm": LevelFamily(_distilled_points, _end_at_latents, sigma_spacings=False),
    "tcd": LevelFamily(_distilled_points, _end_at_timestep_0, sigma_spacings=False),
}


def _points_at(schedule, timesteps, spacing):
    inside = timesteps[0] <= schedule.num_timesteps - 1
    if not inside or any(after >= before for before, after in pairwise(timesteps)):
        raise ValueError(
            f"The spacing has no {len(timesteps)} distinct timesteps in the schedule's 0 to "
            f"{schedule.num_timesteps - 1}. Received: {spacing}. Use fewer steps or "
            "spacing='trailing'."
        )
    return [level_at_timestep(schedule, timestep) for timestep in timesteps]


def _points_between(schedule, num_steps, spacing, first, last):
    # Pure noise has no finite sigma to spread from; the reference implementations take this one.
    sigmas = spread_sigmas(spacing, min(first.sigma, LARGEST_SIGMA), last.sigma, num_steps)
    # The ends stay the given levels, which are exact; pure noise has no finite sigma.
    return [first, *(level_at_sigma(schedule, s) for s in sigmas[1:-1]), last][:num_steps]


def _rounded(points, rounding):
    return [level._replace(timestep=float(rounding(level.timestep))) for level in points]


def _later(points, strength):
    """Return the last share of the levels of a run, rounded down as in diffusers."""
    steps = int(len(points) * strength)
    if steps == 0:
        raise ValueError(
            f"At least one step must be left to run. Received: strength={strength!r} of "
            f"num_steps={len(points)}. Use strength >= {1 / len(points):.3g} or more steps."
        )
    return points[len(points) - steps :]
