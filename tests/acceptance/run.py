"""Run the acceptance commands and count.

    python tests/acceptance/run.py [--short] [--changed [BASE]] [--list] [--jobs N]

`--short` runs those that take minutes, not hours, with the arguments of their short form.
`--changed` runs those that a change touches: a file that differs from the commit BASE (by default
the last but one) is among what the command imports, itself or through others, or runs.
`--list` names them, with `--changed` beside the files that touch them, and runs nothing.
`--jobs` runs several at a time, each with its output in one piece when it ends.

CI runs `--short` at each commit. What it leaves out, whole commands and the long forms of others,
has to pass before a change that touches it is merged: `--changed main`, on a machine that does
nothing else. Before a release all of them have to.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from import_graph import ROOT, ImportGraph

HERE = Path(__file__).resolve().parent
GRAPH = ImportGraph()


class Command(NamedTuple):
    """A script and how it is run.

    Args:
        script: name of a file beside this one.
        backends: Keras backends to run it on, one after the other.
        short: arguments of its short form; `None` if it has none.
        runs: files and folders that it runs and does not import, as patterns from the root.
    """

    script: str
    backends: tuple[str, ...] = ("tensorflow",)
    short: tuple[str, ...] | None = ()
    runs: tuple[str, ...] = ()


BOTH = ("tensorflow", "jax")
WHEEL = ("kdiffusion/cli/*.py", "pyproject.toml", "setup.cfg")

COMMANDS = (
    Command("structure.py", runs=("kdiffusion/**/*.py", "weights_conversion/**/*.py", "setup.cfg")),
    Command("exactness.py", short=None, runs=("tests/acceptance/exactness_reference.py",)),
    Command("exactness_golden.py"),
    Command("image_tasks.py", short=None),
    Command("moves.py", short=None, runs=("kdiffusion/**/*.py", "weights_conversion/**/*.py")),
    Command("building.py"),
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
    Command("shapes_diffusers.py"),
    Command("shapes_wheel.py", short=None, runs=WHEEL),
    Command("hub.py"),
    Command("loading.py", BOTH, short=None),
    Command("training_command.py", runs=("kdiffusion/__main__.py",)),
    Command("training_resume.py", BOTH, short=None),
    Command("training_accumulation.py", BOTH),
    Command("training_faults.py", BOTH, short=None),
    Command("training_losses.py", BOTH, short=None, runs=("tests/parity/test_training_*.py",)),
    Command("training_checkpointing.py", BOTH, short=None),
    Command("training_overfit.py", short=None),
    Command("training_speed.py", short=None),
    Command("installation.py", short=("--here",), runs=WHEEL),
    Command("newcomer.py", short=None, runs=(*WHEEL, "README.md", "tests/**/test_*.py")),
    Command("cold_start.py", BOTH, short=None),
    Command("speed.py", short=None, runs=("benchmarks/*.py",)),
)


def main():
    parser = argparse.ArgumentParser(description="Run the acceptance commands.")
    parser.add_argument("--short", action="store_true", help="only those that take minutes")
    parser.add_argument(
        "--changed", nargs="?", const="HEAD^", metavar="BASE", help="since a commit"
    )
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="commands that run at a time")
    arguments = parser.parse_args()
    short = arguments.short
    commands = [command for command in COMMANDS if not short or command.short is not None]
    if arguments.changed:
        changed = changed_files(arguments.changed)
        commands = [command for command in commands if touched(command, changed)]
    elif arguments.list:
        print(*(command.script for command in commands), sep="\n")
    if arguments.list:
        return
    runs = [
        (command.script, backend, command.short if short else ())
        for command in commands
        for backend in command.backends
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = pool.map(lambda run: passes(*run, together=arguments.jobs > 1), runs)
        failed = [run for run, passed in zip(runs, outcomes) if not passed]
    for script, backend, _ in failed:
        print(f"FAILED {script} on {backend}")
    print(f"{len(runs) - len(failed)} passed, {len(failed)} failed")
    sys.exit(bool(failed))


def changed_files(base):
    """Return the files that differ from a commit, new ones too, as paths from the root."""
    asked = (("diff", "--name-only", base), ("ls-files", "--others", "--exclude-standard"))
    outputs = [
        subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True).stdout
        for words in asked
    ]
    return {Path(os.fsdecode(name)) for output in outputs for name in output.splitlines()}


def touched(command, changed):
    """Return the changed files that a command imports or runs, and print them."""
    files = {(HERE / command.script).relative_to(ROOT)}
    files |= {path.relative_to(ROOT) for name in command.runs for path in ROOT.glob(name)}
    files = files.union(*map(GRAPH.reachable, files))
    found = sorted(path for path in changed if path in files or package_of_data(path) in files)
    if found:
        print(f"{command.script}: {', '.join(map(str, found))}", flush=True)
    return found


def package_of_data(path):
    """Return the `__init__.py` of the package that a file of data lies in, `None` for a module."""
    files = (folder / "__init__.py" for folder in path.parents if path.suffix != ".py")
    return next((file for file in files if (ROOT / file).is_file()), None)


def passes(script, backend, arguments, together):
    """Run a script and return whether it ends well; print its output and its seconds."""
    name = " ".join((script, *arguments, "on", backend))
    if not together:
        print(f"== {name}", flush=True)
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
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
