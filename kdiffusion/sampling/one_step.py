"""Samplers without memory: each step makes one network call and depends on the current x alone.

`at` is the level of a row and `to` the level that it lands on. Docstrings give the classical form
of a step, in which signals have unit scale: `y = x / a`, `D` is the denoised latents,
`e = (y - D) / sigma` the predicted noise, `n` fresh unit noise, and a prime marks the level that
the step lands on. The code steps `x` itself, so it also holds at pure noise, where `a` is 0.
"""

from __future__ import annotations

import math
from itertools import pairwise

from kdiffusion.sampling.levels import Level, Levels, level_at_timestep
from kdiffusion.sampling.rows import DENOISED, NOISE, Combination, Row, X


def move(y: Combination, at: Level, to: Level, denoised: Combination = DENOISED) -> Combination:
    """Move `y` to the next level, exactly if the denoised latents do not change meanwhile.

    `y' = D + sigma' e`, which is `y + (sigma' - sigma) e`. The same step is DDIM (Song et al.
    2021a, eq. 12, eta = 0), Euler's method in sigma (Karras et al. 2022, algorithm 1, line 5) and
    DPM-Solver++ of order 1 (Lu et al. 2022b).
    """
    return (to.s / at.s) * y + approach(at, to) * denoised


def approach(at: Level, to: Level) -> float:
    """Return the coefficient of the denoised latents in `move`."""
    return to.a - to.s * at.a / at.s


def predicted_noise(at: Level) -> Combination:
    """Return the noise that is in `x` if the denoised latents are right."""
    return (X - at.a * DENOISED) / at.s


def ancestral(sigma: float, sigma_to: float, eta: float) -> tuple[float, float]:
    """Return `(up, down)`: a step falls to sigma `down` and then adds fresh noise of sigma `up`.

    `up = eta sigma' sqrt(1 - (sigma' / sigma)**2)` and `down**2 + up**2 = sigma'**2`: DDIM's
    eq. 16 (Song et al. 2021a), written in sigma.
    """
    up = eta * sigma_to * math.sqrt(1.0 - (sigma_to / sigma) ** 2)
    # sqrt(sigma_to**2 - up**2) without its cancellation at eta = 1.
    down = sigma_to * math.sqrt((1.0 - eta) * (1.0 + eta) + (eta * sigma_to / sigma) ** 2)
    return up, down


def fall(y: Combination, at: Level, to: Level, eta: float) -> Combination:
    """Move `y` below the next level and add fresh noise up to it; like `move` if eta is 0.

    `y' = D + down e + up n`.
    """
    up, down = ancestral(at.sigma, to.sigma, eta)
    return (to.a * down / at.s) * y + to.a * (1.0 - down / at.sigma) * DENOISED + to.a * up * NOISE


def ddim(levels: Levels, eta: float) -> list[Row]:
    """Step by DDIM (Song et al. 2021a, eq. 12).

    Deterministic, the usual reference; 20 to 50 steps.

    `y' = D + down e + up n` with `up` and `down` of `ancestral`. Order 1, one call. With eta 0,
    the default, no noise is added; eta 1 is `ddpm`.
    """
    return [
        Row(at, step, {"x": fall(X, at, to, eta)})
        for step, (at, to) in enumerate(pairwise(levels.points))
    ]


def ddpm(levels: Levels) -> list[Row]:
    """Step by DDPM with the smaller fixed variance (Ho et al. 2020, eq. 7).

    Training reversed, step by step; needs hundreds of steps.

    `y' = D + down e + up n` with eta 1. Order 1, one call, noise in each step but the last.
    """
    return ddim(levels, eta=1.0)


def euler(levels: Levels) -> list[Row]:
    """Step by Euler's method along the probability flow.

    Simple and robust, a good first choice; 20 to 30 steps.

    `y' = y + (sigma' - sigma) e`. Order 1, one call, no noise. It equals DDIM on levels that need
    not be whole timesteps (Karras et al. 2022, algorithm 1, lines 4 and 5).
    """
    return ddim(levels, eta=0.0)


def euler_a(levels: Levels, eta: float) -> list[Row]:
    """Step by Euler's method to below the next level, then add noise (k-diffusion).

    Euler with fresh noise; images keep changing with more steps.

    `y' = y + (down - sigma) e + up n`. Order 1, one call, noise in each step but the last. It
    equals DDIM with the same eta, on the levels of `euler`.
    """
    return ddim(levels, eta)


def lcm(levels: Levels) -> list[Row]:
    """Step by multistep consistency sampling (Luo et al. 2023).

    For latent consistency models alone; 2 to 8 steps.

    `y' = (skip x + out D) + sigma' n`: jump to the end and add the noise of the next level. One
    call, noise in each step but the last.
    """
    rows = []
    for step, (at, to) in enumerate(pairwise(levels.points)):
        # The boundary condition of consistency models (Song et al. 2023, appendix C) with
        # sigma_data = 0.5 and the timestep scaled by 10, as the published weights were trained.
        scaled = 10.0 * at.timestep
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        clean = skip * X + out * DENOISED
        rows.append(Row(at, step, {"x": to.a * clean + to.s * NOISE}))
    return rows


def tcd(levels: Levels, eta: float) -> list[Row]:
    """Step by strategic stochastic sampling (Zheng et al. 2024).

    For trajectory consistency models alone; 4 to 20 steps.

    A step goes to `sigma''` of the timestep `floor((1 - eta) t')`, then back up to the next level:
    `y' = D + sigma'' e + sqrt(sigma'**2 - sigma''**2) n`. One call; noise unless eta, the paper's
    gamma, is 0.
    """
    rows = []
    for step, (at, to) in enumerate(pairwise(levels.points)):
        inner = level_at_timestep(levels.schedule, math.floor((1.0 - eta) * to.timestep))
        up = to.s * math.sqrt(1.0 - (inner.sigma / to.sigma) ** 2)
        rows.append(Row(at, step, {"x": (to.a / inner.a) * move(X, at, inner) + up * NOISE}))
    return rows
