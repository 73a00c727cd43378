"""Speed and peak memory beside diffusers and KerasCV, as ratios of one run of the benchmark.

    python tests/acceptance/speed.py [--folder FOLDER] [--pairs N] [--limit SECONDS]
        [--only guided|picture|memory]
    python tests/acceptance/speed.py --before CHECKOUT [--folder FOLDER] [--pairs N]

Bars: a guided step of 32x32 latents at most 0.75 of diffusers' time in float32 and 0.95 in
bfloat16; a whole 512x512 picture of 5 guided steps at most 0.8 of diffusers' and 0.6 of KerasCV's;
its peak memory at most diffusers'. Each dtype is compared with itself. Takes three hours of a slow
machine that does nothing else and 16 GB of memory; `--folder` keeps the weights, 9 GB. A peer that
takes longer than `--limit` is stopped, and the ratio to what it had taken by then is what must not
be above the bar: on a processor without bfloat16 arithmetic diffusers needs hours for a picture.

`--before` compares with another checkout of kdiffusion instead: the guided step, the cold start and
the peak memory are within noise of what they were, at most 1.03, 1.1 and 1.03 of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Measure and size in pixels: peer: the highest ratio in float32 and in bfloat16.
BARS = {
    ("guided", 256): {"diffusers": (0.75, 0.95)},
    ("picture", 512): {"diffusers": (0.8, 0.8), "kerascv": (0.6, 0.6)},
    ("memory", 512): {"diffusers": (1.0, 1.0)},
}
BEFORE_BARS = {
    ("guided", 256): {"before": (1.03, 1.03)},
    ("cold", 256): {"before": (1.1, 1.1)},
    ("memory", 256): {"before": (1.03, 1.03)},
}
DTYPES = ("float32", "bfloat16")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps the weights")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--limit", type=float, help="seconds after which a peer is stopped")
    parser.add_argument("--only", choices=sorted({name for name, _ in {**BARS, **BEFORE_BARS}}))
    parser.add_argument("--before", type=Path, help="another checkout of kdiffusion")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        failures = [
            failure
            for (measure, side), peers in (BEFORE_BARS if arguments.before else BARS).items()
            if arguments.only in (None, measure)
            for failure in judge(benchmark(measure, side, peers, folder, arguments), peers)
        ]
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


def benchmark(measure, side, peers, folder, arguments):
    """The rows of one measure, from the benchmark's JSON."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks", "--peers", "kdiffusion"]
        command += ["--before", arguments.before.absolute()] if arguments.before else peers
        command += ["--measures", measure, "--sizes", str(side), "--dtypes", *DTYPES]
        command += ["--pairs", str(arguments.pairs), "--fresh-pairs", str(min(arguments.pairs, 3))]
        command += ["--folder", folder, "--json", file.name]
        if arguments.limit:
            command += ["--limit", str(arguments.limit)]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(Path(file.name).read_text("utf-8"))["results"]


def judge(rows, peers):
    """Print each ratio beside its bar; what is missing or above it is a failure."""
    for row in rows:
        bar = peers.get(row["peer"], (None, None))[DTYPES.index(row["dtype"])]
        name = f"{row['measure']} {row['side']} {row['dtype']} beside {row['peer']}"
        if row["reason"]:
            yield f"{name}: {row['reason']}"
        elif bar is not None:
            less = "less than " if row["stopped"] else ""
            print(f"{name}: {less}{row['ratio']:.3f}, bar {bar}", flush=True)
            if row["ratio"] > bar:
                yield f"{name}: {row['ratio']:.3f} is above {bar}"


if __name__ == "__main__":
    main()
