"""The language of samplers: linear combinations of named registers, one row a network call."""

from __future__ import annotations

from typing import NamedTuple

from kdiffusion.sampling.levels import Level


class Combination(dict):
    """A linear combination of values, `{name: coefficient}`, with `+`, `-`, `*` and `/`.

    Names are registers (`"x"` and the memories of a sampler), `"denoised"` (the network's estimate
    of the latents), `"network"` (its raw output) and `"noise"` (fresh unit noise).

    Example:

    >>> 0.5 * X + 0.25 * (X - DENOISED)
    {'x': 0.75, 'denoised': -0.25}
    """

    def __add__(self, other):
        return Combination(
            {name: self.get(name, 0.0) + other.get(name, 0.0) for name in {**self, **other}}
        )

    def __sub__(self, other):
        return self + -1.0 * other

    def __rmul__(self, factor):
        return Combination({name: factor * coefficient for name, coefficient in self.items()})

    def __truediv__(self, divisor):
        return Combination({name: coefficient / divisor for name, coefficient in self.items()})


def register(name: str) -> Combination:
    """Return the combination that is the value of one name."""
    return Combination({name: 1.0})


X, DENOISED, NETWORK, NOISE = map(register, ("x", "denoised", "network", "noise"))


class Row(NamedTuple):
    """One network call, and the registers after it.

    Args:
        level: `Level` of `x` at the call.
        step: int, the sampler step that the row belongs to; a step may take two rows.
        next: dictionary from register to `Combination`: all registers after the row, computed at
            once from those before it. A register that is not named keeps its value.
    """

    level: Level
    step: int
    next: dict[str, Combination]
