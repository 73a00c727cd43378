"""The wheel, installed alone in an empty folder: quick help without frameworks, and a picture.

    python tests/acceptance/installation.py [--here]

`--here` takes what is installed in the environment that runs this, in place of a fresh one.
"""

import argparse
import re
import shutil
import sys

from fresh import ROOT, check_picture, empty_folder, environment, shell

HELP_SECONDS = 0.5
HEAVY = {"keras", "tensorflow", "jax", "torch"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="install nothing")
    here = parser.parse_args().here
    with empty_folder() if here else environment() as (folder, variables):
        if not here:
            wheels = folder.with_name("wheels")
            build_wheel(folder.with_name("sources"), wheels, variables)
            shell(f"pip install --quiet {wheels}/kdiffusion-*.whl", folder, variables)
        seconds = min(shell("kdiffusion --help", folder, variables)[1] for _ in range(5))
        traced = 'python -X importtime "$(command -v kdiffusion)" --help'
        trace, _ = shell(traced, folder, variables)
        imported = set(re.findall(r"^import time:.*\| +(\w+)", trace, re.MULTILINE))
        _, drawing = shell('kdiffusion generate "a red circle"', folder, variables)
        check_picture(folder, variables)
    print(f"help {seconds:.2f} s (limit {HELP_SECONDS}), {len(imported)} packages imported")
    print(f"first picture {drawing:.1f} s")
    if seconds > HELP_SECONDS:
        sys.exit("FAILED: kdiffusion --help is slow")
    if "kdiffusion" not in imported or imported & HEAVY:
        sys.exit(f"FAILED: kdiffusion --help imports {sorted(imported & HEAVY)}")
    print("3 passed, 0 failed")


def build_wheel(sources, wheels, variables):
    """Build from a copy: setuptools leaves its workings beside the sources and packs them again."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, sources, ignore=ignored)
    shell(f"pip wheel --quiet --no-deps --wheel-dir {wheels} .", sources, variables)


if __name__ == "__main__":
    main()
