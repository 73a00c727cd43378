"""Compare kdiffusion with other implementations of Stable Diffusion 1.5.

    python -m benchmarks [--peers NAMES] [--measures NAMES] [--dtypes NAMES] [--sizes PIXELS]

Every peer runs in a process of its own with random weights and its default number of threads, and
they take turns. A ratio is kdiffusion's value divided by the peer's of the same round, so below 1
kdiffusion is better. A peer that is missing or fails is listed with the reason. On a GPU, the
column "floor" is the least time that arithmetic and memory need.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import machine, table
from benchmarks.measuring import MEASURES, Plan, measure
from benchmarks.peers import BEFORE, PEERS


def main():
    arguments = _parser().parse_args()
    if arguments.before:
        os.environ[BEFORE] = str(arguments.before.absolute())
        arguments.peers = [arguments.peers[0], "before", *arguments.peers[1:]]
    with tempfile.TemporaryDirectory() as temporary:
        plan = Plan(
            arguments.folder or Path(temporary),
            arguments.peers,
            arguments.measures,
            arguments.sizes,
            arguments.pairs,
            arguments.fresh_pairs,
            arguments.steps,
            arguments.together,
            arguments.floor,
            arguments.limit,
        )
        if not (plan.folder / "checkpoint").exists():
            command = [sys.executable, "-m", "benchmarks.checkpoint"]
            subprocess.run([*command, plan.folder / "checkpoint", arguments.model], check=True)
        about = machine.describe()
        results = []
        for dtype in arguments.dtypes:
            for result in measure(plan, dtype):
                results.append(result)
                _log(result)
                if arguments.json:
                    arguments.json.write_text(table.to_json(results, about), "utf-8")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(f"\n{table.markdown(results)}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    accelerated = machine.accelerator() is not None
    add = parser.add_argument
    peers = [name for name in PEERS if name != "before"]
    if not accelerated:
        peers.remove("diffusers-compiled")
    add("--peers", nargs="+", choices=peers, default=peers, help="the first against the others")
    add("--before", type=Path, help="another checkout of kdiffusion, measured beside this one")
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    add("--dtypes", nargs="+", default=["bfloat16"] if accelerated else ["float32", "bfloat16"])
    add("--sizes", nargs="+", type=int, default=[256, 512], help="pixels along a side")
    add("--pairs", type=int, default=7, help="rounds of measures in running processes")
    add("--fresh-pairs", type=int, default=3, help="rounds of measures in fresh processes")
    add("--steps", type=int, default=5, help="guided steps of an image")
    add("--together", type=int, default=3, help="peers in memory at the same time")
    add("--floor", action=argparse.BooleanOptionalAction, default=accelerated)
    add("--limit", type=float, help="a peer is stopped after a run of so many seconds")
    add("--model", choices=("full-size", "tiny"), default="full-size")
    add("--folder", type=Path, help="where to keep the checkpoint and the peers' files, 20 GB")
    add("--json", type=Path, help="file for all values")
    return parser


def _log(result):
    text = result.reason or f"{result.value:.4g}, ratio {result.ratio:.3f}"
    if result.stopped:
        text = f"stopped: more than {result.value:.4g}, ratio less than {result.ratio:.3f}"
    name = " ".join((result.measure, result.dtype, str(result.side), result.peer))
    print(f"{name}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
