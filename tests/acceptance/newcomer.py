"""A newcomer: both commands of the README work as written, in a fresh environment.

    python tests/acceptance/newcomer.py

An empty folder gets a fresh clone of what is committed, with a fresh virtual environment beside it;
then the README's first command must give a picture and its second one green tests.
"""

import re
import subprocess
import sys

from fresh import ROOT, check_picture, environment, readme_command, shell


def main():
    with environment() as (folder, variables):
        clone = folder / "kdiffusion"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        _, first = shell(readme_command("first command"), clone, variables)
        check_picture(clone, variables)
        tests, second = shell(readme_command("test command"), clone, variables)
        summary = re.search(r"(\d+) passed.*", tests)
        if not summary or int(summary[1]) < 100:
            sys.exit(f"FAILED: expected at least 100 tests, pytest says {summary and summary[0]!r}")
        print(f"install and picture {first:.0f} s, install and tests {second:.0f} s: {summary[0]}")
        print("2 passed, 0 failed")


if __name__ == "__main__":
    main()
