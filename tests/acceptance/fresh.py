"""Fresh virtual environments in empty folders, for the acceptance of installations."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PICTURE = """
import sys
from PIL import Image
from kdiffusion.pipelines.metadata import read_parameters
with Image.open(sys.argv[1]) as image:
    shape = image.size
    darkest, brightest = image.convert("L").getextrema()
assert shape == (64, 64), f"picture of {shape}"
assert brightest - darkest > 20, f"a flat picture, {darkest} to {brightest}"
parameters = read_parameters(sys.argv[1])
assert parameters.model == "shapes", parameters
print(f"picture {shape[0]}x{shape[1]}, brightness {darkest} to {brightest}, {parameters}")
"""


@contextlib.contextmanager
def empty_folder():
    """Yield an empty folder and the variables of a shell that knows no checkout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "empty")
        folder.mkdir()
        private = {"PYTHONPATH", "PYTHONHOME", "KERAS_BACKEND"}
        yield folder, {key: value for key, value in os.environ.items() if key not in private}


@contextlib.contextmanager
def environment():
    """Yield an empty folder and the variables of a shell whose virtual environment is fresh.

    Nothing of the caller's own environment leaks in: no PYTHONPATH, no active environment.
    """
    with empty_folder() as (folder, variables):
        home = folder.with_name("environment")
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        path = f"{home / 'bin'}{os.pathsep}{variables['PATH']}"
        yield folder, variables | {"VIRTUAL_ENV": str(home), "PATH": path}


def shell(command, folder, variables):
    """Run a command line, show what it says, return its output and its seconds."""
    print(f"$ {command}", flush=True)
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.monotonic() - start
    print("\n".join(done.stdout.splitlines()[-15:]))
    print(f"[{seconds:.1f} s, exit code {done.returncode}]", flush=True)
    if done.returncode:
        sys.exit(f"FAILED: {command}")
    return done.stdout, seconds


def readme_command(name):
    """The command that stands in the README below the marker of this name."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.search(rf"^<!-- {name} -->\n```sh\n(.*?)\n```$", text, re.MULTILINE)[1]


def check_picture(folder, variables):
    """The one PNG file of the folder is a picture of the default model and says so itself."""
    (picture,) = folder.glob("*.png")
    command = ["python", "-c", PICTURE, picture]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    print(done.stdout or done.stderr)
    if done.returncode:
        sys.exit(f"FAILED: {picture.name} is not the picture of the default model")
