"""The samplers by name, and the table that one of them makes of a schedule and its steps."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from kdiffusion.sampling import multistep, one_step, two_calls
from kdiffusion.sampling.levels import FAMILIES, make_levels
from kdiffusion.sampling.rows import Row
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.sampling.table import Table, tabulate


class SamplerRecord(NamedTuple):
    """A sampler: its function from levels to rows, its levels, its names and its options.

    Args:
        rows: function `(levels, **options)` that returns each `Row` of a run.
        family: name in `levels.FAMILIES`.
        label: the sampler's name in the metadata of images, as AUTOMATIC1111 writes it.
        eta: float, the default of the option; `None` if the sampler has no such option.
        order: int, the default of the option; `None` if the sampler has no such option.
        max_order: int, the highest order; the lowest is 1.
    """

    rows: Callable[..., list[Row]]
    family: str
    label: str
    eta: float | None = None
    order: int | None = None
    max_order: int = 0

    @property
    def description(self) -> str:
        """Return what the sampler is good for: the second paragraph of the docstring of `rows`."""
        return " ".join((inspect.getdoc(self.rows) or "\n\n").split("\n\n")[1].split())


# Labels are AUTOMATIC1111's where it has the sampler (modules/sd_samplers_*.py), else the field's.
SAMPLERS = {
    "ddim": SamplerRecord(one_step.ddim, "ddim", "DDIM", eta=0.0),
    "ddpm": SamplerRecord(one_step.ddpm, "ddpm", "DDPM"),
    "pndm": SamplerRecord(multistep.pndm, "ddim", "PLMS"),
    "euler": SamplerRecord(one_step.euler, "euler", "Euler"),
    "euler_a": SamplerRecord(one_step.euler_a, "euler", "Euler a", eta=1.0),
    "heun": SamplerRecord(two_calls.heun, "euler", "Heun"),
    "lms": SamplerRecord(multistep.lms, "euler", "LMS", order=4, max_order=4),
    "ipndm": SamplerRecord(multistep.ipndm, "euler", "iPNDM", order=4, max_order=4),
    "dpm2": SamplerRecord(two_calls.dpm2, "dpm2", "DPM2"),
    "dpm2_a": SamplerRecord(two_calls.dpm2_a, "dpm2", "DPM2 a", eta=1.0),
    "dpmpp_2s_a": SamplerRecord(two_calls.dpmpp_2s_a, "euler", "DPM++ 2S a", eta=1.0),
    "dpmpp_sde": SamplerRecord(two_calls.dpmpp_sde, "euler", "DPM++ SDE", eta=1.0),
    "dpmpp_2m": SamplerRecord(multistep.dpmpp_2m, "dpmpp", "DPM++ 2M"),
    "dpmpp_2m_sde": SamplerRecord(multistep.dpmpp_2m_sde, "dpmpp", "DPM++ 2M SDE", eta=1.0),
    "dpmpp_3m_sde": SamplerRecord(multistep.dpmpp_3m_sde, "dpmpp", "DPM++ 3M SDE", eta=1.0),
    "deis": SamplerRecord(multistep.deis, "deis", "DEIS", order=2, max_order=3),
    "unipc": SamplerRecord(multistep.unipc, "dpmpp", "UniPC", order=2, max_order=3),
    "lcm": SamplerRecord(one_step.lcm, "lcm", "LCM"),
    "tcd": SamplerRecord(one_step.tcd, "tcd", "TCD", eta=0.3),
}


@dataclass(frozen=True)
class Sampler:
    """A sampler and its options.

    Args:
        name: name in `SAMPLERS`.
        eta: float in [0, 1], fresh noise of each step: 0 is deterministic, 1 ancestral. `None` is
            the sampler's own default.
        order: int, order of the method. `None` is the sampler's own default.

    Raises:
        ValueError: If the name is unknown, or the sampler does not have the option.

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
        if self.eta is not None and (record.eta is None or not 0.0 <= self.eta <= 1.0):
            with_eta = sorted(name for name in SAMPLERS if SAMPLERS[name].eta is not None)
            raise ValueError(
                f"`eta` must be a number in [0, 1], for one of the samplers {with_eta}. Received: "
                f"eta={self.eta!r} for {self.name!r}. Leave `eta` out for the default."
            )
        if self.order is not None and self.order not in range(1, record.max_order + 1):
            choice = f"1 to {record.max_order}" if record.max_order else "no choice"
            raise ValueError(
                f"`order` of {self.name!r}: {choice}. Received: order={self.order!r}. Leave "
                "`order` out for the default."
            )

    @property
    def options(self) -> dict[str, float | int]:
        """Return the keyword arguments of the sampler's function."""
        record = SAMPLERS[self.name]
        eta = record.eta if self.eta is None else self.eta
        options = {"eta": eta, "order": self.order or record.order}
        return {name: value for name, value in options.items() if value is not None}


def default_spacing(sampler: str | Sampler, base: Spacing) -> Spacing:
    """Return `base`, without its sigma spacing if the sampler walks over whole timesteps.

    A checkpoint's configuration may say "karras" for its own sampler, and the user choose another.

    Args:
        sampler: `Sampler`, or the name of one.
        base: `Spacing` of the checkpoint.

    Returns:
        `Spacing` that the sampler takes.
    """
    family = FAMILIES[SAMPLERS[_as_sampler(sampler).name].family]
    return base if family.sigma_spacings else replace(base, sigmas=None)


def make_table(
    sampler: str | Sampler,
    schedule: Schedule,
    num_steps: int,
    spacing: Spacing,
    strength: float = 1.0,
) -> Table:
    """Return the table of a run, one row for each network call.

    Args:
        sampler: `Sampler`, or the name of one.
        schedule: `Schedule` of the network.
        num_steps: int, 1 to `schedule.num_timesteps`.
        spacing: `Spacing`.
        strength: float in (0, 1], the share of the noise range that is run, counted from its end
            (image_to_image): the last `floor(num_steps * strength)` steps, or for lcm and tcd
            `num_steps` steps in it. The table is made of the later levels alone, so that a sampler
            with a memory warms up at the first of them.

    Returns:
        `Table`.

    Raises:
        ValueError: If the sampler is unknown, or a number is out of range.

    Example:

    >>> make_table("euler", Schedule(), 20, Spacing()).timesteps[:2]
    array([951., 901.])
    """
    chosen = _as_sampler(sampler)
    record = SAMPLERS[chosen.name]
    levels = make_levels(schedule, _as_int(num_steps), spacing, record.family, strength)
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
