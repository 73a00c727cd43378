"""Samplers without memory: a network call a step, and only where `x` is now matters.

`at` is the level of a row and `to` the level that it lands on.
"""

import math
from itertools import pairwise

from kdiffusion.sampling.levels import Level, Levels, level_at_timestep
from kdiffusion.sampling.rows import DENOISED, NOISE, Combination, Row, X


def move(y: Combination, at: Level, to: Level, denoised: Combination = DENOISED) -> Combination:
    """Moves `y` to the next level, exactly if the denoised latents stay what they are.

    The same step is DDIM (Song et al. 2021a, eq. 12, eta = 0), Euler's method in sigma (Karras et
    al. 2022, algorithm 1, line 5) and DPM-Solver++ of order 1 (Lu et al. 2022b).
    """
    return (to.s / at.s) * y + approach(at, to) * denoised


def approach(at: Level, to: Level) -> float:
    """Returns the coefficient of the denoised latents in `move`."""
    return to.a - to.s * at.a / at.s


def predicted_noise(at: Level) -> Combination:
    """Returns the noise that is in `x` if the denoised latents are right."""
    return (X - at.a * DENOISED) / at.s


def ancestral(sigma: float, sigma_to: float, eta: float) -> tuple[float, float]:
    """Returns the sigma of the fresh noise of a step and the sigma to fall to before it is added.

    DDIM's eq. 16 (Song et al. 2021a) written in sigma.
    """
    up = eta * sigma_to * math.sqrt(1.0 - (sigma_to / sigma) ** 2)
    # sqrt(sigma_to**2 - up**2) without its cancellation at eta = 1.
    down = sigma_to * math.sqrt((1.0 - eta) * (1.0 + eta) + (eta * sigma_to / sigma) ** 2)
    return up, down


def fall(y: Combination, at: Level, to: Level, eta: float) -> Combination:
    """Moves `y` below the next level and adds fresh noise up to it; `move` if eta is 0."""
    up, down = ancestral(at.sigma, to.sigma, eta)
    return (to.a * down / at.s) * y + to.a * (1.0 - down / at.sigma) * DENOISED + to.a * up * NOISE


def ddim(levels: Levels, eta: float) -> list[Row]:
    """DDIM (Song et al. 2021a, eq. 12): eta 0 is deterministic, 1 is DDPM."""
    return [
        Row(at, step, {"x": fall(X, at, to, eta)})
        for step, (at, to) in enumerate(pairwise(levels.points))
    ]


def ddpm(levels: Levels) -> list[Row]:
    """DDPM with the smaller fixed variance (Ho et al. 2020, eq. 7)."""
    return ddim(levels, eta=1.0)


def euler(levels: Levels) -> list[Row]:
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 1, lines 4 and 5)."""
    return ddim(levels, eta=0.0)


def euler_a(levels: Levels, eta: float) -> list[Row]:
    """Ancestral Euler steps (k-diffusion): DDIM's, on the levels of `euler`."""
    return ddim(levels, eta)


def lcm(levels: Levels) -> list[Row]:
    """Multistep sampling of a latent consistency model (Luo et al. 2023)."""
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
    """Strategic stochastic sampling of a trajectory consistency model (Zheng et al. 2024).

    Its gamma is `eta`: how far below the next timestep a step goes before fresh noise lifts it.
    """
    rows = []
    for step, (at, to) in enumerate(pairwise(levels.points)):
        inner = level_at_timestep(levels.schedule, math.floor((1.0 - eta) * to.timestep))
        up = to.s * math.sqrt(1.0 - (inner.sigma / to.sigma) ** 2)
        rows.append(Row(at, step, {"x": (to.a / inner.a) * move(X, at, inner) + up * NOISE}))
    return rows
