"""Samplers of second order with two network calls, hence two rows, a step.

`at` is the level of a step's first row and `to` the level that the step lands on; `base` is what
the second row starts from. Formulas are written as in `one_step`; the second call of a step is at
`y_m` and `sigma_m`, and gives `D_m` and `e_m`. A step that starts at pure noise or lands on the
latents themselves has order 1 and one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from kdiffusion.sampling.levels import Level, Levels, level_at_sigma
from kdiffusion.sampling.one_step import ancestral, fall, move, predicted_noise
from kdiffusion.sampling.rows import DENOISED, NOISE, Combination, Row, X, register

BASE = register("base")
Halves = tuple[tuple[Level, dict[str, Combination]], tuple[Level, dict[str, Combination]]]


def heun(levels: Levels) -> list[Row]:
    """Step by Heun's method along the probability flow (Karras et al. 2022, algorithm 1).

    Euler made accurate by a second call; 10 to 25 steps.

    `y_m = y + (sigma' - sigma) e`, then `y' = y + (sigma' - sigma) (e + e_m) / 2` with the second
    call at the next level. Order 2, two calls, no noise.
    """

    def halves(at: Level, to: Level) -> Halves:
        half = to.a * (to.sigma - at.sigma) / 2
        base = (to.a / at.a) * X + half * predicted_noise(at)
        return (
            (at, {"x": move(X, at, to), "base": base}),
            (to, {"x": BASE + half * predicted_noise(to)}),
        )

    return _rows(levels, halves)


def dpm2(levels: Levels) -> list[Row]:
    """Step by the midpoint method in log(sigma) (k-diffusion, after DPM-Solver-2, Lu et al. 2022a).

    Midpoint steps; 10 to 25 steps.

    `sigma_m = sqrt(sigma sigma')`, `y_m = y + (sigma_m - sigma) e`, then
    `y' = y + (sigma' - sigma) e_m`. Order 2, two calls, no noise.
    """
    return dpm2_a(levels, eta=0.0)


def dpm2_a(levels: Levels, eta: float) -> list[Row]:
    """Step as `dpm2` to below the next level, then add noise (k-diffusion).

    DPM2 with fresh noise.

    `sigma_m = sqrt(sigma down)`, `y' = y + (down - sigma) e_m + up n`. Order 2, two calls, noise.
    """

    def halves(at: Level, to: Level) -> Halves:
        up, down = ancestral(at.sigma, to.sigma, eta)
        middle = level_at_sigma(levels.schedule, math.sqrt(at.sigma * down))
        slope = to.a * (down - at.sigma) * predicted_noise(middle)
        return (
            (at, {"x": move(X, at, middle), "base": X}),
            (middle, {"x": (to.a / at.a) * BASE + slope + to.a * up * NOISE}),
        )

    return _rows(levels, halves, eta)


def dpmpp_2s_a(levels: Levels, eta: float) -> list[Row]:
    """Step by DPM-Solver++ (2S) to below the next level, then add noise (k-diffusion).

    DPM2 a made stable for high guidance scales.

    `sigma_m = sqrt(sigma down)`, `y_m = D + sigma_m e`, then
    `y' = (down / sigma) y + (1 - down / sigma) D_m + up n` (Lu et al. 2022b, algorithm 1). Order 2,
    two calls, noise.
    """

    def halves(at: Level, to: Level) -> Halves:
        _, down = ancestral(at.sigma, to.sigma, eta)
        middle = level_at_sigma(levels.schedule, math.sqrt(at.sigma * down))
        return (
            (at, {"x": move(X, at, middle), "base": X}),
            (middle, {"x": fall(BASE, at, to, eta)}),
        )

    return _rows(levels, halves, eta)


def dpmpp_sde(levels: Levels, eta: float) -> list[Row]:
    """Step by stochastic DPM-Solver++ with the middle at 1/2 (k-diffusion).

    Fresh noise at both calls, much detail; 10 to 20 steps.

    `sigma_m = sqrt(sigma sigma')`, `y_m = D + down_m e + up_m n_m`, then
    `y' = (down / sigma) y + (1 - down / sigma) D_m + up n`. Order 2, two calls, noise in both.

    The two noises are increments of one Brownian path (in sigma) over two intervals that overlap.
    Their correlation is written into the coefficients, so that both rows draw independent noise.
    """

    def halves(at: Level, to: Level) -> Halves:
        middle = level_at_sigma(levels.schedule, math.sqrt(at.sigma * to.sigma))
        up, down = ancestral(at.sigma, to.sigma, eta)
        shared = (at.sigma - middle.sigma) / (at.sigma - to.sigma)
        base = (to.a * down / at.s) * X + to.a * up * math.sqrt(shared) * NOISE
        fresh = to.a * up * math.sqrt(1.0 - shared) * NOISE
        return (
            (at, {"x": fall(X, at, middle, eta), "base": base}),
            (middle, {"x": BASE + to.a * (1.0 - down / at.sigma) * DENOISED + fresh}),
        )

    return _rows(levels, halves, eta)


def _rows(levels, halves: Callable[[Level, Level], Halves], eta=0.0):
    rows = []
    for step, (at, to) in enumerate(pairwise(levels.points)):
        # Pure noise has no slope in sigma. In log(sigma) there is no middle between a level and the
        # latents themselves, or between a level and itself.
        if at.a == 0.0 or to.sigma in (0.0, at.sigma):
            rows.append(Row(at, step, {"x": fall(X, at, to, eta)}))
        else:
            rows += [Row(level, step, registers) for level, registers in halves(at, to)]
    return rows
