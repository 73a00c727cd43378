"""The detector of scenes is right about rendered scenes, and believes no false description.

    python tests/acceptance/scenes_detector.py [--count SCENES]

Half of the scenes are such as training sees, the rest held out of it. They are judged as they are,
at twice the size, blurred, and with noise as an autoencoder might leave. Then each is judged by
descriptions that are wrong in one word.
"""

import argparse
import dataclasses
import sys
import time

import numpy as np
from PIL import Image, ImageFilter

from kdiffusion.shapes import grammar as grammar
from kdiffusion.shapes.data import SPLITS, SceneData, evaluation_scenes
from kdiffusion.shapes.detector import accuracy, judge
from kdiffusion.shapes.scenes import render, training_scene

BAR, HARD_BAR, FALSE_BAR = 0.995, 0.99, 0.001
SEED = 1_000_000  # no model is trained with it


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2400, help="how many scenes, 2000 or more")
    count = parser.parse_args().count
    if count < 2000:
        parser.error("--count must be 2000 or more")
    scenes = [training_scene(SEED, index) for index in range(count // 2)]
    for split in SPLITS[1:]:
        scenes += evaluation_scenes(split, count // 4)
    failures = [*check_degraded(scenes), *check_false(scenes)]
    print_speed()
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


def check_degraded(scenes):
    pictures = render(scenes)
    kinds = [
        ("as rendered", pictures, BAR),
        ("128 x 128", render(scenes, 128), BAR),
        ("noise of 12 levels", noisy(pictures), HARD_BAR),
        ("blurred by 1 pixel", blurred(pictures, 1.0), HARD_BAR),
        ("blurred by 0.7, noise of 12", noisy(blurred(pictures, 0.7)), HARD_BAR),
    ]
    for name, some, bar in kinds:
        start = time.process_time()
        shares = accuracy(
            [judge(picture, scene.description) for picture, scene in zip(some, scenes)]
        )
        rate = len(scenes) / (time.process_time() - start)
        print(
            f"{name}, {len(scenes)} scenes, {rate:.0f} pictures a CPU second, "
            f"bar {bar:.1%} all right:"
        )
        print("   ", "  ".join(f"{one} {share:.2%}" for one, share in shares.items()))
        if shares["all"] < bar:
            yield f"{name}: {shares['all']:.2%} are all right, the bar is {bar:.1%}"


def check_false(scenes):
    believed = {}
    for picture, scene in zip(render(scenes), scenes):
        for attribute, description in false_descriptions(scene.description):
            believed.setdefault(attribute, []).append(judge(picture, description)[attribute])
    print(f"descriptions with one wrong word, bar {FALSE_BAR:.1%} believed:")
    for attribute, verdicts in believed.items():
        share = float(np.mean(verdicts))
        print(f"    {attribute}: {share:.2%} of {len(verdicts)}")
        if share > FALSE_BAR:
            yield f"{share:.2%} of wrong descriptions are believed about {attribute}"


def false_descriptions(description):
    """One description for each attribute that can be said wrongly, with the attribute."""
    first, *others = description.things
    things = {
        "colour": [dataclasses.replace(first, colour=word) for word in grammar.COLOURS],
        "shape": [dataclasses.replace(first, shape=word) for word in grammar.SHAPES],
    }
    if first.size is not None:
        things["size"] = [dataclasses.replace(first, size=word) for word in grammar.SIZES]
    changes = {name: [{"things": (one, *others)} for one in ones] for name, ones in things.items()}
    for name, words in (
        ("background", grammar.COLOURS),
        ("position", grammar.POSITIONS),
        ("relation", grammar.RELATIONS),
    ):
        if getattr(description, name) is not None:
            changes[name] = [{name: word} for word in words]
    for name, ones in changes.items():
        for change in ones:
            try:
                other = dataclasses.replace(description, **change)
            except ValueError:  # such as a thing of the background's colour
                continue
            if other != description:
                yield name, other
                break


def noisy(pictures):
    noise = np.random.default_rng(0).normal(0.0, 12.0, pictures.shape)
    return np.clip(np.rint(pictures + noise), 0, 255).astype(np.uint8)


def blurred(pictures, radius):
    blur = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(picture).filter(blur)) for picture in pictures])


def print_speed():
    data = SceneData()
    data.batch(0, 64)
    start = time.process_time()
    for step in range(1, 17):
        data.batch(step, 128)
    print(f"batches of 128: {16 * 128 / (time.process_time() - start):.0f} scenes a CPU second")


if __name__ == "__main__":
    main()
