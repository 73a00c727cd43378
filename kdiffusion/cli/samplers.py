"""`kdiffusion samplers`: the samplers by name, as a table, as JSON, or as a plot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdiffusion.cli import files
from kdiffusion.cli.options import DEBUG, FORCE, SPACING, count

_NOTES = """
noise: whether fresh noise is drawn with this eta; calls: of the network in a step
spacings: leading, trailing and linspace of timesteps; karras, exponential and beta of sigmas
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's description and options."""
    parser.description = "List the samplers, or plot their levels and coefficients."
    parser.set_defaults(run=run, usage_error=parser.error)
    parser.add_argument(
        "--sampler", nargs="+", metavar="NAME", help="only these (default: all of them)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs, not for people")
    form.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="plot them; needs kdiffusion[plot]"
    )
    parser.add_argument("--steps", type=count, metavar="N", help="of the plot (default: 20)")
    parser.add_argument("--spacing", **SPACING | {"help": "of the plot (default: leading)"})
    parser.add_argument("--force", **FORCE)
    parser.add_argument("--debug", **DEBUG)


def run(arguments: argparse.Namespace) -> None:
    """Print the table, or write the plot and print its name."""
    from kdiffusion.sampling.samplers import SAMPLERS, Sampler

    for name in ("steps", "spacing"):
        if getattr(arguments, name) is not None and not arguments.plot:
            arguments.usage_error(f"--{name} is for a plot: add --plot FILE.png")
    names = [Sampler(name).name for name in arguments.sampler or SAMPLERS]
    if arguments.plot:
        _plot(arguments, names)
        return
    records = [_record(name) for name in names]
    if arguments.json:
        print(json.dumps(records, indent=2))
    else:
        sys.stdout.writelines(f"{line}\n" for line in [*_table(records), *_uses(records)])
        print(_NOTES, end="")


def _plot(arguments, names):
    from kdiffusion.sampling.plots import plot_samplers
    from kdiffusion.sampling.spacing import Spacing

    files.check_suffix("--plot", arguments.plot)
    files.check_writable([arguments.plot], arguments.force)
    plot_samplers(arguments.plot, names, arguments.steps or 20, Spacing.parse(arguments.spacing))
    print(arguments.plot)


def _record(name: str) -> dict[str, Any]:
    """Return what a sampler is, from its record and from the tables that it makes."""
    import numpy as np

    from kdiffusion.sampling.levels import FAMILIES
    from kdiffusion.sampling.samplers import SAMPLERS, make_table
    from kdiffusion.sampling.schedule import Schedule
    from kdiffusion.sampling.spacing import SIGMA_SPACINGS, TIMESTEP_SPACINGS, Spacing

    record = SAMPLERS[name]
    tables = [make_table(name, Schedule(), 10, Spacing(kind)) for kind in TIMESTEP_SPACINGS]
    first, *others = (table.timesteps for table in tables)
    spaced = not all(np.array_equal(first, other) for other in others)
    return {
        "name": name,
        "label": record.label,
        "description": record.description,
        "orders": list(range(1, record.max_order + 1)),
        "order": record.order,
        "eta": record.eta,
        "network_calls": int(np.median(np.bincount(tables[0].steps))),
        "fresh_noise": bool(tables[0].draws_noise.any()),
        "timestep_spacings": list(TIMESTEP_SPACINGS) if spaced else [],
        "sigma_spacings": list(SIGMA_SPACINGS) if FAMILIES[record.family].sigma_spacings else [],
    }


def _table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the options of samplers, in columns."""
    rows = [("name", "label", "orders", "eta", "calls", "noise", "spacings")]
    rows += [_row(record) for record in records]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()


def _uses(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield an empty line, then what each sampler is good for."""
    width = max(len(record["name"]) for record in records)
    yield ""
    for record in records:
        yield f"{record['name']:{width}}  {record['description']}"


def _row(record):
    orders = "-"
    if record["orders"]:
        orders = f"{record['orders'][0]} to {record['orders'][-1]}, default {record['order']}"
    spacings = [kind for kind in ("timesteps", "sigmas") if record[f"{kind[:-1]}_spacings"]]
    return (
        record["name"],
        record["label"],
        orders,
        "-" if record["eta"] is None else f"{record['eta']:g}",
        str(record["network_calls"]),
        "yes" if record["fresh_noise"] else "no",
        ", ".join(spacings) or "its own",
    )
