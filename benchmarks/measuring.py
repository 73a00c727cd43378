"""Measures, in seconds or bytes, and their rounds.

Each peer runs in a process of its own, and they take turns: A B C A B C. A ratio is kdiffusion's
value divided by the peer's of the same round, so anything that slows the machine for a while slows
both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers import PEERS
from benchmarks.process import Failed, Process, Stopped

# Methods of a `Peer`, run again and again in one process.
WARM = {
    "network": "network call, b1",
    "guided": "guided step",
    "decode": "decode",
    "picture": "whole picture",
    "attention": "self-attentions as in SDXL",
}
# Each is measured in a fresh process, which generates one image.
FRESH = {
    "load": "checkpoint load",
    "cold": "cold start to first picture",
    "memory": "peak memory",
}
MEASURES = {**WARM, "compile": "first picture beyond a later one", **FRESH}


class Result(NamedTuple):
    """The result of one measure of one peer.

    Args:
        measure: str, a key of `MEASURES`.
        dtype: str.
        side: int, height and width of the image in pixels.
        peer: str, a key of `PEERS`.
        values: seconds, or bytes of the measure `memory`, one for each round; empty if it failed.
        ratios: values of the first peer divided by these, round by round.
        reason: str, the reason if there are no values, or empty.
        stopped: bool, whether it was stopped at the limit: it takes longer than its values, and its
            ratios are lower.
    """

    measure: str
    dtype: str
    side: int
    peer: str
    values: Sequence[float] = ()
    ratios: Sequence[float] = ()
    reason: str = ""
    stopped: bool = False

    @property
    def value(self) -> float:
        """Return the median of the values."""
        return statistics.median(self.values)

    @property
    def ratio(self) -> float:
        """Return the median of the ratios, NaN if there are none."""
        return statistics.median(self.ratios) if self.ratios else float("nan")


class Plan(NamedTuple):
    """The measures to be taken, and of which peers.

    Args:
        folder: folder that holds `checkpoint` and the files of peers.
        peers: names of `PEERS`; the others are compared with the first.
        measures: names of `MEASURES`.
        sides: sizes of images, in pixels.
        pairs: int, number of rounds.
        fresh_pairs: int, number of rounds of fresh processes.
        num_steps: int, guided steps of an image.
        together: int, number of peers that run at the same time.
        floor: bool, whether to add the least possible time.
        limit: seconds after which runs of all but the first peer are stopped, or `None`.
    """

    folder: Path
    peers: Sequence[str]
    measures: Sequence[str]
    sides: Sequence[int]
    pairs: int
    fresh_pairs: int
    num_steps: int
    together: int
    floor: bool
    limit: float | None = None

    def start(self, peer: str, dtype: str, **variables: str) -> Process:
        limit = None if peer == self.peers[0] else self.limit
        return Process(peer, self.folder, dtype, variables, limit)

    def arguments(self, measure: str, side: int) -> list[int]:
        return [side, self.num_steps] if measure == "picture" else [side]


def measure(plan: Plan, dtype: str) -> Iterator[Result]:
    """Yield all results of a dtype as they come; a floor follows the first peer's result."""
    floors = _floors(plan, dtype) if plan.floor else {}
    for result in _measure_peers(plan, dtype):
        yield result
        seconds = floors.get((result.measure, result.side))
        if result.peer == plan.peers[0] and result.values and seconds:
            ratios = [value / seconds for value in result.values]
            yield result._replace(peer="floor", values=[seconds], ratios=ratios)


def _floors(plan, dtype):
    """Return the floors by measure and side; none without PyTorch and diffusers."""
    wanted = [(name, side) for name in WARM if name in plan.measures for side in plan.sides]
    command = [sys.executable, "-m", "benchmarks.floor", plan.folder / "checkpoint", dtype]
    command += [str(plan.num_steps), *(f"{name}:{side}" for name, side in wanted)]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        print("The floor is not printed: it could not be computed.", file=sys.stderr)
        return {}
    return dict(zip(wanted, json.loads(done.stdout.splitlines()[-1])))


def _measure_peers(plan, dtype):
    first, *others = plan.peers
    size = max(plan.together - 1, 1)
    groups = [others[i : i + size] for i in range(0, len(others), size)] or [[]]
    if set(plan.measures) & {*WARM, "compile"}:
        for number, group in enumerate(groups):
            results = _measure_warm(plan, dtype, [first, *group])
            # The first peer is in every group, but one row of it is enough.
            yield from (r for r in results if number == 0 or r.peer != first)
    if set(plan.measures) & set(FRESH):
        for side in plan.sides:
            yield from _measure_fresh(plan, dtype, side)


def _measure_warm(plan, dtype, peers):
    wanted = {"picture" if name == "compile" else name for name in plan.measures}
    processes = [plan.start(peer, dtype) for peer in peers]
    try:
        for name in (name for name in WARM if name in wanted):
            for side in plan.sides:
                first, rounds = Rounds(peers), Rounds(peers)
                request = (name, plan.arguments(name, side))
                for process in processes:
                    first.turn(process.peer, lambda: process.first_run(*request))
                rounds.reasons.update(first.reasons)
                for peer, seconds in first.stopped.items():
                    if PEERS[peer].is_eager:
                        rounds.stopped[peer] = seconds
                    else:
                        rounds.reasons[peer] = f"compiled and ran for more than {seconds:g} s"
                for _ in range(plan.pairs):
                    for process in processes:
                        rounds.turn(process.peer, lambda: process.ask("run"))
                if name in plan.measures:
                    yield from rounds.results(name, dtype, side)
                if name == "picture" and "compile" in plan.measures:
                    yield from _beyond(first, rounds).results("compile", dtype, side)
    finally:
        for process in processes:
            process.close()


def _beyond(first: Rounds, later: Rounds) -> Rounds:
    """Return by how much the first call took longer than the median of the later ones."""
    rounds = Rounds(first.values)
    rounds.reasons.update(later.reasons)
    rounds.reasons.update({peer: "it was stopped" for peer in later.stopped})
    for peer, values in later.values.items():
        if peer not in rounds.reasons:
            rounds.values[peer] = [first.values[peer][0] - statistics.median(values)]
    return rounds


def _measure_fresh(plan, dtype, side):
    rounds = Rounds(plan.peers)
    with tempfile.TemporaryDirectory() as cache:
        # The first round fills the compile caches and does not count.
        for number in range(plan.fresh_pairs + 1):
            for peer in plan.peers:
                rounds.turn(peer, lambda: _fresh_picture(plan, dtype, side, peer, cache))
    for name in FRESH:
        if name in plan.measures:
            single = Rounds(plan.peers)
            single.reasons, single.stopped = rounds.reasons, rounds.stopped
            single.values = {p: [v[name] for v in vs[1:]] for p, vs in rounds.values.items()}
            yield from single.results(name, dtype, side)


def _fresh_picture(plan, dtype, side, peer, cache):
    start = time.perf_counter()
    process = plan.start(peer, dtype, KDIFFUSION_COMPILE_CACHE=cache)

    def taken():
        return {"load": load, "cold": time.perf_counter() - start, "memory": process.memory()}

    try:
        load = process.ask("load")
        process.first_run("picture", plan.arguments("picture", side))
        return taken()
    except Stopped:
        raise Stopped(taken()) from None
    finally:
        process.close()


class Rounds:
    """Values of peers, round by round.

    A peer that fails is left out, with its reason. A peer that is stopped is not run again: its
    value at that moment is its value of all rounds.

    Args:
        peers: names of the peers.
    """

    def __init__(self, peers: Iterable[str]):
        self.values: dict[str, list[Any]] = {peer: [] for peer in peers}
        self.reasons: dict[str, str] = {}
        self.stopped: dict[str, Any] = {}

    def turn(self, peer: str, function: Callable[[], Any]) -> None:
        if peer in self.reasons:
            return
        try:
            value = self.stopped[peer] if peer in self.stopped else function()
        except Stopped as stop:
            value = self.stopped[peer] = stop.value
        except Failed as reason:
            self.reasons[peer] = str(reason)
            return
        self.values[peer].append(value)

    def results(self, measure, dtype, side):
        reference = next(iter(self.values.values()))
        for peer, values in self.values.items():
            if peer in self.reasons:
                yield Result(measure, dtype, side, peer, reason=self.reasons[peer])
            else:
                ratios = [mine / theirs for mine, theirs in zip(reference, values)]
                stopped = peer in self.stopped
                yield Result(measure, dtype, side, peer, values, ratios, stopped=stopped)
