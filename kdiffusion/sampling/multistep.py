"""Samplers that remember earlier network calls, one call a step.

`at` is the level of a row and `to` the level that it lands on.
"""

import math
from itertools import pairwise

from kdiffusion.sampling.levels import Level, Levels
from kdiffusion.sampling.one_step import move
from kdiffusion.sampling.rows import DENOISED, Row, X, register


def log_ratio(at: Level, to: Level) -> float:
    """Returns `log(at.sigma / to.sigma)`, the length of a step in half the log of the SNR."""
    return math.log(at.sigma / to.sigma)


def dpmpp_2m(levels: Levels) -> list[Row]:
    """DPM-Solver++ (2M), midpoint form (Lu et al. 2022b, algorithm 2)."""
    earlier = register("earlier")
    rows, before = [], None
    for step, (at, to) in enumerate(pairwise(levels.points)):
        x = move(X, at, to)
        if before is not None and not _first_order_at_end(levels, step, to):
            ratio = log_ratio(before, at) / log_ratio(at, to)
            x += (to.a - to.s * at.a / at.s) / (2.0 * ratio) * (DENOISED - earlier)
        rows.append(Row(at, step, {"x": x, "earlier": DENOISED}))
        before = at
    return rows


def _first_order_at_end(levels, step, to):
    # Short runs end with a step of first order (Lu et al. 2022b, appendix); landing on the latents
    # themselves has no second order, its log ratio is infinite.
    last = step == len(levels.points) - 2
    return to.s == 0.0 or (last and levels.num_steps < 15)
