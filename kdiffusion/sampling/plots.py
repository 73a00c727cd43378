"""Plots of samplers: their levels, and the coefficients of their tables, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdiffusion.sampling.samplers import SAMPLERS, default_spacing, make_table
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.sampling.table import NUM_REGISTERS, SOURCES, Table

# The columns of `Table.next`.
_SOURCES = ("x", *(f"memory {i}" for i in range(1, NUM_REGISTERS)), *SOURCES)

_MAX_COLUMNS = 4
_DOTS_PER_INCH = 100
# Inches of the margins, of a panel, and of the boxes in it (left, bottom, width, height).
_LEFT, _TOP, _BOTTOM, _LEAST_WIDTH = 0.95, 0.85, 1.1, 6.6
_PANEL = (2.55, 2.1)
_LEVELS_BOX = (0.0, 1.19, 2.3, 0.55)
_TABLE_BOX = (0.0, 0.1, 2.3, 1.04)

_INK, _PALE, _UNUSED = "#26323d", "#76838f", "#f1f2f4"
_COLOURS = "PuOr_r"
_SIGMAS = (0.02, 30.0)  # the axis shows sigmas between these
_LARGEST = 1.5  # larger coefficients have the colour of this one


class _Panel(NamedTuple):
    """The data of one sampler's panel.

    Args:
        name: the sampler.
        table: its `Table`.
        edges: (n + 1,) float, the place in steps where each network call begins, and the end.
    """

    name: str
    table: Table
    edges: np.ndarray


def plot_samplers(
    path: str | os.PathLike,
    samplers: Sequence[str] | None = None,
    num_steps: int = 20,
    spacing: Spacing = Spacing(),
) -> None:
    """Plot the levels and the coefficients of samplers, one panel each, on the usual schedule.

    The upper half of a panel shows sigma at each network call. The lower half has a column for each
    call: the coefficients that make the next x. A second call within a step takes the second half
    of the step.

    Args:
        path: path of the file; its suffix is the format, such as `".png"` or `".svg"`.
        samplers: names in `SAMPLERS`, or `None` for all.
        num_steps: int, steps of each.
        spacing: `Spacing`; its sigma spacing is left out where a sampler takes none.

    Raises:
        ValueError: If matplotlib is missing, a name is unknown or a number out of range.

    Example:

    ```python
    plot_samplers("samplers.png", ["euler", "heun", "dpmpp_2m"], num_steps=12)
    ```
    """
    names = list(dict.fromkeys(samplers or SAMPLERS))
    panels = [_panel(name, num_steps, spacing) for name in names]
    sources = np.flatnonzero(np.any([_uses(panel.table) for panel in panels], axis=0))
    figure_class = _figure_class()

    columns = min(len(panels), _MAX_COLUMNS)
    rows = -(-len(panels) // columns)
    width = max(_LEFT + columns * _PANEL[0], _LEAST_WIDTH)
    size = width, _TOP + rows * _PANEL[1] + _BOTTOM
    figure = figure_class(figsize=size, facecolor="white")
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        corner = _LEFT + column * _PANEL[0], _BOTTOM + (rows - 1 - row) * _PANEL[1]
        levels, table = (
            figure.add_axes(_in_shares(size, *corner, *box)) for box in (_LEVELS_BOX, _TABLE_BOX)
        )
        _plot_levels(levels, panel, labelled=column == 0)
        mesh = _plot_table(table, panel, sources, labelled=column == 0)
        if index + columns >= len(panels):
            table.set_xlabel("step", color=_PALE, fontsize=8, labelpad=1)
        else:
            table.tick_params(labelbottom=False)
    _describe(figure, size, mesh, f"{num_steps} steps, {_words(spacing)}")
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _panel(name, num_steps, spacing):
    schedule = Schedule()
    table = make_table(name, schedule, num_steps, default_spacing(name, spacing))
    calls = np.bincount(table.steps)
    within = np.concatenate([np.arange(count) / count for count in calls])
    return _Panel(name, table, np.append(table.steps + within, len(calls)))


def _uses(table):
    return np.any(table.next[:, 0] != 0.0, axis=0)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "Plots need matplotlib, which is not installed. Install it with "
            '`pip install "kdiffusion[plot]"`.'
        ) from None
    return Figure


def _in_shares(size, left, bottom, *box):
    """Return a box, given in inches from the corner of its panel, in shares of the figure."""
    width, height = size
    return (left + box[0]) / width, (bottom + box[1]) / height, box[2] / width, box[3] / height


def _words(spacing):
    sigmas = f", {spacing.sigmas} sigmas where the sampler takes them" if spacing.sigmas else ""
    return f"{spacing.timesteps} timesteps{sigmas}"


def _plot_levels(axes, panel, labelled):
    """Plot sigma at each call, and a line as a guide to the eye."""
    middles = (panel.edges[1:] + panel.edges[:-1]) / 2
    # Pure noise has no finite sigma; it stands at the top.
    sigmas = np.clip(panel.table.s / np.maximum(panel.table.a, 1e-9), *_SIGMAS)
    axes.plot(middles, sigmas, color=_INK, linewidth=0.8, alpha=0.5)
    axes.scatter(middles, sigmas, s=7, color=_INK, linewidth=0, zorder=3)
    axes.set(yscale="log", ylim=_SIGMAS, xlim=(0, panel.edges[-1]), yticks=[0.1, 1, 10])
    axes.set_yticks([], minor=True)
    axes.set_yticklabels(["0.1", "1", "10"] if labelled else [])
    axes.grid(axis="y", color=_UNUSED, linewidth=0.8)
    axes.tick_params(labelbottom=False, bottom=False)
    _tidy(axes)
    axes.set_title(panel.name, loc="left", color=_INK, fontsize=10, fontweight="bold", pad=5)
    label = SAMPLERS[panel.name].label
    axes.set_title(label, loc="right", color=_PALE, fontsize=8, pad=5)
    if labelled:
        axes.set_ylabel("sigma", color=_PALE, fontsize=8)


def _plot_table(axes, panel, sources, labelled):
    """Plot the coefficients of the next x, a column for each call."""
    coefficients = panel.table.next[:, 0, sources].T
    mesh = axes.pcolormesh(
        panel.edges,
        np.arange(len(sources) + 1),
        np.ma.masked_equal(coefficients, 0.0),
        cmap=_COLOURS,
        norm=_norm(),
        edgecolors="white",
        linewidth=0.3,
    )
    axes.set_facecolor(_UNUSED)
    axes.hlines(np.arange(1, len(sources)), 0, panel.edges[-1], color="white", linewidth=1.2)
    axes.invert_yaxis()
    names = [_SOURCES[source] for source in sources] if labelled else []
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    _tidy(axes)
    return mesh


def _norm():
    """Return the scale of colours: square roots, so that small coefficients are seen too."""
    from matplotlib.colors import FuncNorm

    def root(x):
        return np.sign(x) * np.sqrt(np.abs(x))

    def square(x):
        return np.sign(x) * np.square(x)

    return FuncNorm((root, square), vmin=-_LARGEST, vmax=_LARGEST)


def _tidy(axes):
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=_PALE, pad=3)


def _describe(figure, size, mesh, run):
    """Write the title, and how to read the plot."""

    def write(height, text, **style):
        figure.text(_LEFT / size[0], height / size[1], text, **{"color": _PALE, **style})

    write(size[1] - 0.32, "A sampler is a table", color=_INK, fontsize=13, fontweight="bold")
    write(size[1] - 0.53, f"{run}. Dots: sigma at each network call.", fontsize=8.5)
    write(size[1] - 0.69, "Cells: how much of what goes into the next x.", fontsize=8.5)
    bar = figure.colorbar(
        mesh,
        cax=figure.add_axes(_in_shares(size, _LEFT, 0.35, 0.0, 0.0, _TABLE_BOX[2], 0.11)),
        orientation="horizontal",
        extend="both",
        ticks=[-1, -0.1, 0, 0.1, 1],
        format="{x:g}",
    )
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    _tidy(bar.ax)
    write(0.52, "coefficient (grey: none)", fontsize=8)
