"""Samplers that remember earlier network calls; one call a step, two in the first step of pndm.

`at` is the level of a row, `to` the level that it lands on and `past` the levels of the remembered
calls, the latest first. Formulas are written as in `one_step`; `h = log(sigma / sigma')` is the
length of a step, and an index counts calls back: `D_1` is the denoised latents of the call before.
The first steps have lower order, because they remember fewer calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from kdiffusion.sampling.levels import Level, Levels
from kdiffusion.sampling.one_step import approach, move, predicted_noise
from kdiffusion.sampling.rows import (
    DENOISED,
    NETWORK,
    NOISE,
    Combination,
    Row,
    X,
    register,
)

# Adams-Bashforth weights of values at equal distances, the latest first.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def dpmpp_2m(levels: Levels) -> list[Row]:
    """Step by DPM-Solver++ (2M), midpoint form (Lu et al. 2022b, algorithm 2).

    Accurate in few steps, best with Karras sigmas; 15 to 25 steps.

    `y' = (sigma' / sigma) y + (1 - sigma' / sigma) (D + (D - D_1) / (2 r))` with `r = h_1 / h`.
    Order 2, one call, no noise.
    """
    return dpmpp_2m_sde(levels, eta=0.0)


def dpmpp_2m_sde(levels: Levels, eta: float) -> list[Row]:
    """Step by stochastic DPM-Solver++ (2M), midpoint form (Lu et al. 2022b; k-diffusion).

    DPM++ 2M with fresh noise; 20 to 30 steps.

    With `q = exp(-(1 + eta) h)`: `y' = q y + (1 - q) (D + (D - D_1) / (2 r)) +
    sigma' sqrt(1 - exp(-2 eta h)) n`. Order 2, one call, noise in each step but the last.
    """
    (earlier,), rows = _memories("denoised", 1), []
    for step, at, to, past in _walk(levels):
        x, shrink = _exponential_step(at, to, eta)
        if _order(levels, step, at, to, past, 2) == 2:
            slope = _log_ratio(at, to) / _log_ratio(past[0], at) * (DENOISED - earlier)
            x += to.a * (1.0 - shrink) / 2 * slope
        rows.append(_remember(at, step, x, [earlier], DENOISED))
    return rows


def dpmpp_3m_sde(levels: Levels, eta: float) -> list[Row]:
    """Step by stochastic DPM-Solver++ (3M) (k-diffusion).

    DPM++ 2M SDE of a higher order; 30 steps and more.

    With `q = exp(-(1 + eta) h)`, `phi_2 = 1 - (1 - q) / ((1 + eta) h)` and
    `phi_3 = phi_2 / ((1 + eta) h) - 1 / 2`: `y' = q y + (1 - q) D + phi_2 v - phi_3 w +
    sigma' sqrt(1 - exp(-2 eta h)) n`, where `v` is the slope at `D`, in steps of `h`, of a
    quadratic through `D`, `D_1` and `D_2`, and `w` half its second derivative. Order 3, one call,
    noise in each step but the last. It ignores `lower_order_final`, as k-diffusion does.
    """
    (d1, d2), rows = _memories("denoised", 2), []
    for step, at, to, past in _walk(levels):
        x, shrink = _exponential_step(at, to, eta)
        order = 1 if to.sigma in (0.0, at.sigma) else min(3, len(past) + 1)
        if order > 1:
            length = (1.0 + eta) * _log_ratio(at, to)
            phi_2 = (shrink - 1.0) / length + 1.0
            r0 = _log_ratio(past[0], at) / _log_ratio(at, to)
            slope = (DENOISED - d1) / r0
            x += to.a * phi_2 * slope
        if order > 2:
            r1 = _log_ratio(past[1], past[0]) / _log_ratio(at, to)
            bend = (slope - (d1 - d2) / r1) / (r0 + r1)
            x += to.a * (phi_2 * r0 - (phi_2 / length - 0.5)) * bend
        rows.append(_remember(at, step, x, [d1, d2], DENOISED))
    return rows


def lms(levels: Levels, order: int) -> list[Row]:
    """Step by linear multistep: Adams-Bashforth with the true distances in sigma (k-diffusion).

    Euler with a memory of earlier calls; 30 to 50 steps.

    `y' = y + sum of w_j e_j`, where `w_j` integrates the Lagrange polynomial of `e_j` in sigma over
    the step. Orders 1 to 4, one call, no noise.
    """

    def weights(at: Level, to: Level, past: Sequence[Level]) -> Sequence[float]:
        step = to.sigma - at.sigma
        nodes = [(level.sigma - at.sigma) / step for level in past]
        return step * _weights(nodes, [1 / (k + 2) for k in range(len(nodes))])

    def order_of(step: int, at: Level, to: Level, past: Sequence[Level]) -> int:
        return 1 if to.sigma == at.sigma else order

    return _adams(levels, order_of, weights)


def deis(levels: Levels, order: int) -> list[Row]:
    """Step by DEIS in its log(rho) form (Zhang & Chen 2023).

    Accurate in few steps; 15 to 25 steps.

    `y' = y + sum of w_j e_j` as in `lms`, with Lagrange polynomials in log(sigma). Orders 1 to 3,
    one call, no noise.
    """

    def weights(at: Level, to: Level, past: Sequence[Level]) -> Sequence[float]:
        # Integrals of log(sigma / at.sigma)**k over sigma, for k = 1 and 2.
        log = -_log_ratio(at, to)
        moments = [
            to.sigma * (log - 1.0) + at.sigma,
            to.sigma * (log**2 - 2.0 * log + 2.0) - 2.0 * at.sigma,
        ]
        nodes = [_log_ratio(level, at) for level in past]
        return _weights(nodes, moments[: len(nodes)])

    def order_of(step: int, at: Level, to: Level, past: Sequence[Level]) -> int:
        return _order(levels, step, at, to, past, order)

    return _adams(levels, order_of, weights)


def ipndm(levels: Levels, order: int) -> list[Row]:
    """Step by improved PNDM (Zhang & Chen 2023): Adams-Bashforth as if sigmas were even.

    LMS with constant weights; 20 to 30 steps.

    `y' = y + (sigma' - sigma) (55 e - 59 e_1 + 37 e_2 - 9 e_3) / 24`. Orders 1 to 4, one call, no
    noise.
    """

    def weights(at: Level, to: Level, past: Sequence[Level]) -> Sequence[float]:
        constants = ADAMS_BASHFORTH[len(past) + 1][1:]
        return [(to.sigma - at.sigma) * constant for constant in constants]

    def order_of(step: int, at: Level, to: Level, past: Sequence[Level]) -> int:
        return 1 if to.sigma == 0.0 else order

    return _adams(levels, order_of, weights, from_pure_noise=True)


def pndm(levels: Levels) -> list[Row]:
    """Step by PNDM with linear multistep alone, "PLMS" (Liu et al. 2022, eq. 9; CompVis).

    The default of Stable Diffusion 1; 50 steps.

    A DDIM step along the output `(55 f - 59 f_1 + 37 f_2 - 9 f_3) / 24` of the network. Order 4,
    one call, no noise. The second row repeats the first step with the mean of the outputs at its
    two ends.
    """
    memories = _memories("network", 3)
    points, base = levels.points, register("base")
    first = _transfer(levels, X, points[0], points[1], NETWORK)
    rows = [Row(points[0], 0, {"x": first, "base": X, "network_1": NETWORK})]
    if len(points) > 2:
        mean = 0.5 * (NETWORK + memories[0])
        again = _transfer(levels, base, points[0], points[1], mean)
        rows.append(Row(points[1], 0, {"x": again}))
    for step, (at, to) in enumerate(pairwise(points[1:]), start=1):
        weights = ADAMS_BASHFORTH[min(4, step + 1)]
        output = _sum(w * value for w, value in zip(weights, [NETWORK, *memories]))
        x = _transfer(levels, X, at, to, output)
        rows.append(_remember(at, step, x, memories, NETWORK))
    return rows


def unipc(levels: Levels, order: int) -> list[Row]:
    """Step by UniPC with B2(h), predicting the latents (Zhao et al. 2023).

    Predicts and corrects without a further call; 10 to 20 steps.

    `y' = (sigma' / sigma) y + (1 - sigma' / sigma) (D + sum of w_k (D_k - D) / r_k)`, where `r_k`
    is the place of call k in steps of `h`; the step is then corrected with the network's call at
    its end. Orders 1 to 3, one call, no noise.

    The correction of a step needs the network's call at its end, so it is made in the next row,
    before that row's own prediction; the uncorrected `x` is only the input of the network.
    """
    memories, last = _memories("denoised", order), register("last")
    rows: list[Row] = []
    before, previous, previous_order = None, [], 0
    for step, at, to, past in _walk(levels):
        current = X
        if before is not None:
            known = _ratios(before, at, previous[: previous_order - 1])
            values = [*zip(known, memories[1:]), (1.0, DENOISED)]
            current = _multistep_move(last, before, at, memories[0], values)
        end = len(levels.points) - 1 - step if levels.spacing.lower_order_final else order
        previous_order = _order(levels, step, at, to, past, min(order, end))
        values = list(zip(_ratios(at, to, past[: previous_order - 1]), memories))
        x = _multistep_move(current, at, to, DENOISED, values)
        row = _remember(at, step, x, memories, DENOISED)
        rows.append(row._replace(next={**row.next, "last": current}))
        before, previous = at, past
    return rows


def _walk(levels, from_pure_noise=False):
    """Yield (step, at, to, past); a call at pure noise is remembered if `from_pure_noise`."""
    past: list[Level] = []
    for step, (at, to) in enumerate(pairwise(levels.points)):
        yield step, at, to, past
        if at.a or from_pure_noise:
            past = [at, *past]


def _order(levels, step, at, to, past, order):
    """Return the order that a solver in log(sigma) takes in a step."""
    if to.sigma in (0.0, at.sigma):
        return 1
    if levels.spacing.lower_order_final and levels.num_steps < 15:
        # Few long steps end stably only in low order (Lu et al. 2022b).
        order = min(order, len(levels.points) - 1 - step)
    return min(order, len(past) + 1)


def _log_ratio(at, to):
    """Return the length of a step in log(sigma), which is half of that in log(SNR)."""
    return math.log(at.sigma / to.sigma)


def _memories(name, count):
    return [register(f"{name}_{i + 1}") for i in range(count)]


def _remember(at, step, x, memories, newest):
    """Return the row that moves each memory one place back and puts the newest in front."""
    names = [name for memory in memories for name in memory]
    return Row(at, step, {"x": x, **dict(zip(names, [newest, *memories]))})


def _sum(terms):
    return sum(terms, start=Combination())


def _exponential_step(at, to, eta):
    """Return the first-order step of stochastic DPM-Solver++, and its coefficient of `x / a`."""
    ratio = to.s * at.a / (at.s * to.a)
    kept = ratio**eta
    shrink = ratio * kept
    x = (to.s / at.s) * kept * X + to.a * (1.0 - shrink) * DENOISED
    return x + to.s * math.sqrt(1.0 - kept**2) * NOISE, shrink


def _adams(
    levels: Levels,
    order_of: Callable[[int, Level, Level, Sequence[Level]], int],
    weights: Callable[[Level, Level, Sequence[Level]], Sequence[float]],
    from_pure_noise: bool = False,
) -> list[Row]:
    """Step along the predicted noise, extrapolated through those of up to three earlier calls.

    `weights` returns the weights of the remembered noises. All weights add up to the step in sigma,
    so the newest noise has the rest.
    """
    memories, rows = _memories("noise", 3), []
    for step, at, to, past in _walk(levels, from_pure_noise):
        newest, used = predicted_noise(at), past[: order_of(step, at, to, past) - 1]
        x = move(X, at, to)
        if used:
            terms = (w * (e - newest) for w, e in zip(weights(at, to, used), memories))
            x += to.a * _sum(terms)
        rows.append(_remember(at, step, x, memories, newest))
    return rows


def _weights(nodes, moments):
    """Return the weights w with sum(w * nodes**k) = moments[k - 1], for k = 1, 2, ..."""
    powers = np.array([[node**k for node in nodes] for k in range(1, len(nodes) + 1)])
    return np.linalg.solve(powers, moments)


def _transfer(levels, y, at, to, output):
    skip, out = levels.schedule.denoised_coefficients(at.a, at.s)
    return move(y, at, to, skip * y + out * output)


def _ratios(at, to, past):
    return [-_log_ratio(level, at) / _log_ratio(at, to) for level in past]


def _multistep_move(y, at, to, denoised, others):
    """Move `y` along a polynomial through `denoised` and the (place, value) pairs of `others`.

    Zhao et al. 2023 with B(h) = exp(h) - 1; places count from `at` in steps of log(sigma).
    """
    x = move(y, at, to, denoised)
    weights = _unipc_weights(at, to, [place for place, _ in others])
    for weight, (place, value) in zip(weights, others):
        x += approach(at, to) * weight / place * (value - denoised)
    return x


def _unipc_weights(at, to, places):
    if len(places) < 2:
        # The limit of a small step, which the paper takes for every step, is always finite.
        return [0.5] * len(places)
    step = -_log_ratio(at, to)
    moments, moment, factorial = [], math.expm1(step) / step - 1.0, 1
    for k in range(1, len(places) + 1):
        moments.append(moment * factorial / math.expm1(step))
        factorial *= k + 1
        moment = moment / step - 1.0 / factorial
    return np.linalg.solve(np.vander(places, increasing=True).T, moments)
