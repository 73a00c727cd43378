"""From the wheel alone, without a network: one command draws the right picture, small and soon.

    python tests/acceptance/shapes_wheel.py [--preset FOLDER]

The network is cut off by a namespace of its own (`unshare`). Seconds are those of the clock, on a
machine that does nothing else, and count the start of the process.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from fresh import environment, shell
from installation import build_wheel
from PIL import Image

from kdiffusion.shapes.detector import judge
from kdiffusion.shapes.grammar import parse

PROMPT = "a red circle on a blue background"
SECONDS, MEGABYTES = 15.0, 1500

MEASURED = """
import resource, subprocess, sys, time
start = time.monotonic()
code = subprocess.run(sys.argv[1:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
print(f"\\n{time.monotonic() - start:.2f} {peak:.0f}")
sys.exit(code)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", type=Path, help="folder of the model, in place of the default")
    preset = parser.parse_args().preset
    chosen = f"--preset {preset.resolve()}" if preset else ""
    with environment() as (folder, variables):
        wheels = folder.with_name("wheels")
        build_wheel(folder.with_name("sources"), wheels, variables)
        shell(f"pip install --quiet {wheels}/kdiffusion-*.whl", folder, variables)
        (wheel,) = wheels.glob("*.whl")
        print(f"wheel of {wheel.stat().st_size / 1e6:.1f} MB")
        shutil.rmtree(folder.with_name("sources"))
        folder.with_name("measured.py").write_text(MEASURED)
        drawing = f'kdiffusion generate "{PROMPT}" {chosen} --output picture.png'
        offline = f"unshare --net --map-root-user python ../measured.py {drawing}"
        said, _ = shell(offline, folder, variables)
        verdict = judge(np.asarray(Image.open(folder / "picture.png")), parse(PROMPT))
    seconds, megabytes = map(float, said.splitlines()[-1].split())
    print(f"{seconds:.1f} s, bar {SECONDS:.0f}; {megabytes:.0f} MB, bar {MEGABYTES}; {verdict}")
    failed = [not verdict["all"], seconds > SECONDS, megabytes > MEGABYTES]
    print(f"{failed.count(False)} passed, {failed.count(True)} failed")
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
