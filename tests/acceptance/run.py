"""Run the acceptance commands, one after the other, and count.

    python tests/acceptance/run.py [--short]

`--short` runs those that take minutes, not hours, with the arguments of their short form.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

# script: arguments of its short form, None if it has none
COMMANDS = {
    "installation.py": (),
    "newcomer.py": None,
}


def main():
    parser = argparse.ArgumentParser(description="Run the acceptance commands.")
    parser.add_argument("--short", action="store_true", help="only those that take minutes")
    short = parser.parse_args().short
    chosen = {
        script: (arguments if short else ())
        for script, arguments in COMMANDS.items()
        if arguments is not None or not short
    }
    failed = [script for script, arguments in chosen.items() if not passes(script, arguments)]
    for script in failed:
        print(f"FAILED {script}")
    print(f"{len(chosen) - len(failed)} passed, {len(failed)} failed")
    sys.exit(bool(failed))


def passes(script, arguments):
    print(f"== {script}", *arguments, flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, Path(__file__).with_name(script), *arguments]).returncode
    print(f"== {script}: exit code {code}, {time.monotonic() - start:.0f} s\n", flush=True)
    return code == 0


if __name__ == "__main__":
    main()
