"""The recipe of `shapes` learns: in minutes from nothing to pictures, five times better than luck.

    python tests/acceptance/shapes_micro.py [--out FOLDER]

Two colours, two shapes, one background. Luck is what somebody reaches who draws perfectly, but
scenes of other prompts.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from kdiffusion import StableDiffusion
from kdiffusion.shapes.data import evaluation_scenes
from kdiffusion.shapes.evaluation import judge_all
from kdiffusion.shapes.recipe import MICRO
from kdiffusion.shapes.report import generate
from kdiffusion.shapes.scenes import render
from kdiffusion.shapes.stages import run

TIMES = 5
PROMPTS = 64
SHIFTS = 16


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the run, to look at afterwards")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        start = time.monotonic(), time.process_time()
        run(MICRO, folder)
        clock, processor = time.monotonic() - start[0], time.process_time() - start[1]
        print(f"trained in {clock:.0f} s of the clock, {processor:.0f} s of processors")
        scenes = evaluation_scenes("seen", PROMPTS, words=MICRO.words)
        pictures = generate(
            StableDiffusion.from_preset(folder / "model"), [s.caption for s in scenes]
        )
    found = judge_all(pictures, scenes)
    luck = chance(scenes)
    print("right:", found)
    print(f"all right: {found['all']:.1%}, luck {luck:.1%}, bar {TIMES * luck:.1%}")
    sys.exit(found["all"] < TIMES * luck)


def chance(scenes):
    """The share of true pictures that are all right for the prompt some places further."""
    pictures = render(scenes, MICRO.image_size)
    shifted = (scenes[shift:] + scenes[:shift] for shift in range(1, SHIFTS + 1))
    return float(np.mean([judge_all(pictures, others)["all"] for others in shifted]))


if __name__ == "__main__":
    main()
