"""Write results as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks.measuring import MEASURES, Result


def markdown(results: Sequence[Result]) -> str:
    """Make one table for each dtype: a row for each measure and size, a column for each peer.

    A cell is the median, with the median of the ratios in brackets: below 1 the first peer is
    better. The reasons for empty cells follow the tables. A peer that was stopped takes longer than
    is shown, and its ratio is lower.
    """
    parts = []
    for dtype in _distinct(result.dtype for result in results):
        rows = [result for result in results if result.dtype == dtype]
        peers = _distinct(row.peer for row in rows)
        lines = [f"### {dtype}", "", _line(["measure", "size", "rounds", *peers])]
        lines.append(_line(["---"] * (3 + len(peers))))
        for measure, side in _distinct((row.measure, row.side) for row in rows):
            cells = {r.peer: r for r in rows if (r.measure, r.side) == (measure, side)}
            rounds = max(len(row.values) for row in cells.values())
            texts = [_cell(cells[p], p == peers[0]) if p in cells else "" for p in peers]
            lines.append(_line([MEASURES[measure], str(side), str(rounds), *texts]))
        parts.append("\n".join(lines))
    failed = [result for result in results if result.reason]
    reasons = _distinct(f"- {r.peer}, {MEASURES[r.measure]}, {r.dtype}: {r.reason}" for r in failed)
    if reasons:
        parts.append("Not measured:\n\n" + "\n".join(reasons))
    return "\n\n".join(parts)


def to_json(results: Sequence[Result], about: dict) -> str:
    """Return all values of all rounds, with the description of the machine, as JSON."""
    rows = [
        (
            {**result._asdict(), "value": result.value, "ratio": result.ratio}
            if result.values
            else result._asdict()
        )
        for result in results
    ]
    return json.dumps({"about": about, "results": rows}, indent=1)


def _cell(result, is_first):
    if result.reason:
        return "–"
    if result.measure == "memory":
        text = f"{result.value / 1e9:.2f} GB"
    elif result.value < 0.1:
        text = f"{1e3 * result.value:.2f} ms"
    else:
        text = f"{result.value:.2f} s"
    if is_first:
        return text
    more, less = ("> ", "< ") if result.stopped else ("", "")
    return f"{more}{text} ({less}{result.ratio:.2f})"


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _distinct(values):
    return list(dict.fromkeys(values))
