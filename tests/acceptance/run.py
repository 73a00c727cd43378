"""Run the acceptance commands and count.

    python tests/acceptance/run.py [--short] [--jobs N]

`--short` runs those that take minutes, not hours, with the arguments of their short form.
`--jobs` runs several at a time, each with its output in one piece when it ends.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Command(NamedTuple):
    """A script, the Keras backends it is run on, and its short form's arguments if it has one."""

    script: str
    backends: tuple[str, ...] = ("tensorflow",)
    short: tuple[str, ...] | None = ()


BOTH = ("tensorflow", "jax")

COMMANDS = (
    Command("exactness.py", short=("--components",)),
    Command("image_tasks.py", short=None),
    Command("building.py", BOTH),
    Command("programs.py"),
    Command("dtypes.py", BOTH),
    Command("seeds.py", BOTH),
    Command("inputs.py"),
    Command("sampler_parity.py"),
    Command("resume.py", short=("--steps", "4", "--requests", "5")),
    Command("corpus.py"),
    Command("fuzz.py", short=("--count", "5000")),
    Command("compvis.py", short=("--tiny",)),
    Command("scenes_detector.py"),
    Command("shapes_micro.py"),
    Command("shapes_quality.py", short=None),
    Command("shapes_diffusers.py", BOTH),
    Command("shapes_wheel.py", short=None),
    Command("hub.py"),
    Command("loading.py", BOTH, short=None),
    Command("training_resume.py", BOTH, short=None),
    Command("training_accumulation.py", BOTH),
    Command("training_faults.py", BOTH, short=None),
    Command("training_losses.py", BOTH, short=None),
    Command("training_checkpointing.py", BOTH, short=None),
    Command("training_overfit.py", short=None),
    Command("training_speed.py", short=None),
    Command("installation.py"),
    Command("newcomer.py", short=None),
    Command("cold_start.py", BOTH, short=None),
    Command("speed.py", short=None),
)


def main():
    parser = argparse.ArgumentParser(description="Run the acceptance commands.")
    parser.add_argument("--short", action="store_true", help="only those that take minutes")
    parser.add_argument("--jobs", type=int, default=1, help="commands that run at a time")
    arguments = parser.parse_args()
    short = arguments.short
    runs = [
        (command.script, backend, command.short if short else ())
        for command in COMMANDS
        for backend in command.backends
        if not short or command.short is not None
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = pool.map(lambda run: passes(*run, together=arguments.jobs > 1), runs)
        failed = [run for run, passed in zip(runs, outcomes) if not passed]
    for script, backend, _ in failed:
        print(f"FAILED {script} on {backend}")
    print(f"{len(runs) - len(failed)} passed, {len(failed)} failed")
    sys.exit(bool(failed))


def passes(script, backend, arguments, together):
    name = " ".join((script, *arguments, "on", backend))
    if not together:
        print(f"== {name}", flush=True)
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env=os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": path},
        stdout=subprocess.PIPE if together else None,
        stderr=subprocess.STDOUT if together else None,
    )
    if together:
        print(f"== {name}\n{done.stdout.decode(errors='replace')}", end="")
    seconds = time.monotonic() - start
    print(f"== {name}: exit code {done.returncode}, {seconds:.0f} s\n", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    main()
