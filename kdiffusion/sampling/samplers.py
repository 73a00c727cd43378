"""The samplers by name, and the table that one of them makes of a schedule and its steps."""

import operator
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

from kdiffusion.sampling.levels import Spacing, make_levels
from kdiffusion.sampling.multistep import dpmpp_2m
from kdiffusion.sampling.one_step import ddim, euler
from kdiffusion.sampling.rows import Row
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.table import Rows, Table, pack, tabulate

__all__ = ["SAMPLERS", "Rows", "Sampler", "Table", "default_spacing", "make_table", "pack"]


class SamplerRecord(NamedTuple):
    """What a sampler is: its function from levels to rows, its levels, and its options.

    Args:
        rows: function of the Levels and the options below, returns the Rows.
        family: name in `levels.FAMILIES`.
        eta: float, the default of the option; None if the sampler has no such option.
        orders: the orders to choose from, the default first; empty if there is no choice.
    """

    rows: Callable[..., list[Row]]
    family: str
    eta: float | None = None
    orders: tuple[int, ...] = ()


SAMPLERS = {
    "ddim": SamplerRecord(ddim, "ddim", eta=0.0),
    "euler": SamplerRecord(euler, "euler"),
    "dpmpp_2m": SamplerRecord(dpmpp_2m, "dpmpp"),
}


@dataclass(frozen=True)
class Sampler:
    """A sampler and its options.

    Args:
        name: name in `SAMPLERS`.
        eta: float >= 0, fresh noise of each step: 0 deterministic, 1 ancestral. None is the
            sampler's own default.
        order: int, order of the method. None is the sampler's own default.

    Raises:
        ValueError: for an unknown name, or an option that the sampler has not.

    Example:

    >>> Sampler("ddim", eta=0.5).name
    'ddim'
    """

    name: str
    eta: float | None = None
    order: int | None = None

    def __post_init__(self):
        if self.name == "dpm_adaptive":
            raise ValueError(
                "Received: sampler='dpm_adaptive', which is out of reach: it chooses its steps "
                "while it runs, from the pictures themselves, so there is no table of them "
                f"beforehand. Use one of {sorted(SAMPLERS)}."
            )
        if self.name not in SAMPLERS:
            raise ValueError(
                f"Unknown sampler. Received: {self.name!r}. Use one of {sorted(SAMPLERS)}."
            )
        record = SAMPLERS[self.name]
        if self.eta is not None and (record.eta is None or not self.eta >= 0.0):
            with_eta = sorted(name for name in SAMPLERS if SAMPLERS[name].eta is not None)
            raise ValueError(
                f"`eta` must be a number >= 0, for one of the samplers {with_eta}. Received: "
                f"eta={self.eta!r} for {self.name!r}. Leave `eta` out for the default."
            )
        if self.order is not None and self.order not in record.orders:
            raise ValueError(
                f"The orders of {self.name!r} are {list(record.orders)}. Received: "
                f"order={self.order!r}. Leave `order` out for the default."
            )

    @property
    def options(self) -> dict:
        """The keyword arguments of the sampler's function."""
        record, options = SAMPLERS[self.name], {}
        if record.eta is not None:
            options["eta"] = record.eta if self.eta is None else self.eta
        if record.orders:
            options["order"] = self.order or record.orders[0]
        return options


def default_spacing(sampler: "str | Sampler", base: Spacing) -> Spacing:
    """Returns `base` without the sigma spacing, if the sampler walks over whole timesteps.

    For a sampler that was chosen against a checkpoint whose own configuration says "karras".
    """
    family = SAMPLERS[_as_sampler(sampler).name].family
    return replace(base, sigmas=None) if family == "ddim" else base


def make_table(
    sampler: "str | Sampler",
    schedule: Schedule,
    num_steps: int,
    spacing: Spacing,
    strength: float = 1.0,
) -> Table:
    """Returns the table of a run, one row a network call.

    Args:
        sampler: Sampler, or the name of one.
        schedule: Schedule of the network.
        num_steps: int, 1 to `schedule.num_timesteps`.
        spacing: Spacing.
        strength: float in (0, 1], the share of the steps that is run, counted from the end
            (image_to_image). The table is made of the later levels alone, so that a sampler with
            a memory warms up at the first of them.

    Raises:
        ValueError: for an unknown sampler, or numbers out of range.

    Example:

    >>> make_table("euler", Schedule(), 20, Spacing()).timesteps[:2]
    array([951., 901.])
    """
    chosen = _as_sampler(sampler)
    record = SAMPLERS[chosen.name]
    levels = make_levels(schedule, _as_int(num_steps), spacing, record.family)
    skipped = levels.num_steps - _steps_to_run(levels.num_steps, strength)
    levels = levels._replace(points=levels.points[skipped:])
    return tabulate(record.rows(levels, **chosen.options), levels)


def _as_sampler(sampler):
    return sampler if isinstance(sampler, Sampler) else Sampler(sampler)


def _as_int(num_steps):
    try:
        return operator.index(num_steps)
    except TypeError:
        raise ValueError(
            f"`num_steps` must be a whole number. Received: num_steps={num_steps!r}. Use an int."
        ) from None


def _steps_to_run(num_steps, strength):
    if not 0.0 < strength <= 1.0:
        raise ValueError(
            f"`strength` must be in (0, 1], the share of the steps that is run. Received: "
            f"strength={strength!r}. Use 0.8 to change much, 0.3 to change little."
        )
    steps = int(num_steps * strength)
    if steps == 0:
        raise ValueError(
            f"At least one step must be left to run. Received: strength={strength!r} of "
            f"num_steps={num_steps!r}. Use strength >= {1 / num_steps:.3g} or more steps."
        )
    return steps
