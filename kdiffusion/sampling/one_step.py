"""Samplers without memory: each step needs only where `x` is now.

`at` is the level of a row and `to` the level that it lands on.
"""

import math
from itertools import pairwise

from kdiffusion.sampling.levels import Level, Levels
from kdiffusion.sampling.rows import DENOISED, NOISE, Combination, Row, X


def move(y: Combination, at: Level, to: Level) -> Combination:
    """Moves `y` to the next level, exactly if the denoised latents stay what they are.

    The same step is DDIM (Song et al. 2021, eq. 12, eta = 0), Euler's method in sigma (Karras et
    al. 2022, algorithm 1) and DPM-Solver++ of order 1 (Lu et al. 2022b, eq. 8).
    """
    return (to.s / at.s) * y + (to.a - to.s * at.a / at.s) * DENOISED


def ancestral(sigma: float, sigma_to: float, eta: float) -> tuple[float, float]:
    """Returns the sigma of the fresh noise of a step and the sigma to fall to before it is added.

    DDIM's eq. 16 (Song et al. 2021) written in sigma.
    """
    up = min(sigma_to, eta * sigma_to * math.sqrt(1.0 - (sigma_to / sigma) ** 2))
    # (1 - eta)(1 + eta) + ... is 1 - (up / sigma_to)**2 without its cancellation at eta = 1.
    rest = (1.0 - eta) * (1.0 + eta) + (eta * sigma_to / sigma) ** 2
    return up, sigma_to * math.sqrt(max(0.0, rest))


def fall(y: Combination, at: Level, to: Level, eta: float) -> Combination:
    """Moves `y` below the next level and adds fresh noise up to it; `move` if eta is 0."""
    up, down = ancestral(at.sigma, to.sigma, eta)
    return (to.a * down / at.s) * y + to.a * (1.0 - down / at.sigma) * DENOISED + to.a * up * NOISE


def ddim(levels: Levels, eta: float) -> list[Row]:
    """DDIM (Song et al. 2021, eq. 12): eta 0 is deterministic, 1 is DDPM."""
    return [
        Row(at, step, {"x": fall(X, at, to, eta)})
        for step, (at, to) in enumerate(pairwise(levels.points))
    ]


def euler(levels: Levels) -> list[Row]:
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 1 without churn)."""
    return ddim(levels, eta=0.0)
