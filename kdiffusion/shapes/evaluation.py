"""Measure how well a model renders prompts, as numbers and as a table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdiffusion.shapes.data import SPLITS, evaluation_scenes
from kdiffusion.shapes.detector import ATTRIBUTES, accuracy, judge
from kdiffusion.shapes.grammar import held_out
from kdiffusion.shapes.scenes import RandomChoices, Scene, place, render, training_scene

Generate = Callable[[list[str]], np.ndarray]

ONE, TWO = "one thing", "two things"
FRESH_STREAM = 8


def evaluate(
    generate: Generate, count: int = 512, training_seed: int = 0, trained: int = 4096
) -> dict[str, Any]:
    """Generate images of prompts and judge them.

    Args:
        generate: function from a list of prompts to `(n, size, size, 3)` uint8 images, sRGB.
        count: int, prompts held out of training: half by their pairs, half by their templates.
            Half as many again are like those of training.
        training_seed: int, seed of the `SceneData` that the model was trained with.
        trained: int, how many of its scenes to search for the nearest.

    Returns:
        Dictionary of numbers that JSON can hold:
        - `rows`: for each kind of prompts their number `n`, and the share of right answers for each
          of `detector.ATTRIBUTES`;
        - `shuffled`: the same with each image judged by another prompt of its kind, the chance
          level;
        - `binding`: see `evaluate_binding`;
        - `nearest`: see `nearest_training`.

    Raises:
        ValueError: If `count` is too small for every kind of prompts.
    """
    if count < 8:
        raise ValueError(f"`count` must be 8 or more. Received: {count}")
    scenes: dict[str, list[Scene]] = {}
    for split in SPLITS:
        for scene in evaluation_scenes(split, count // 2):
            number = ONE if len(scene.description.things) == 1 else TWO
            scenes.setdefault(f"{split}, {number}", []).append(scene)
    images = {name: _generated(generate, kind) for name, kind in scenes.items()}
    for number in (ONE, TWO):
        kinds = [f"{split}, {number}" for split in SPLITS[1:]]
        name = f"all held out, {number}"
        scenes[name] = [scene for kind in kinds for scene in scenes[kind]]
        images[name] = np.concatenate([images[kind] for kind in kinds])
    return {
        "rows": {
            name: {"n": len(kind)} | judge_all(images[name], kind) for name, kind in scenes.items()
        },
        "shuffled": {
            name: {"n": len(kind)} | judge_all(images[name], kind[1:] + kind[:1])
            for name, kind in scenes.items()
        },
        "binding": evaluate_binding(generate, count // 8),
        "nearest": nearest_training(
            np.concatenate([images[f"seen, {number}"] for number in (ONE, TWO)]),
            scenes[f"seen, {ONE}"] + scenes[f"seen, {TWO}"],
            training_seed,
            trained,
        ),
    }


def judge_all(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Compute the share of right answers for each attribute, each image judged by its scene."""
    return accuracy([judge(image, scene.description) for image, scene in zip(images, scenes)])


def evaluate_binding(generate: Generate, count: int) -> dict[str, float]:
    """Measure if each of two things has its own colour, by prompts with swapped colours.

    Args:
        generate: see `evaluate`.
        count: int, how many prompts.

    Returns:
        Dictionary of `n`; `both`, share of prompts whose image and that of the prompt with swapped
        colours are all right; `crossed`, share of images that are all right for the other prompt.
    """
    firsts = [scene for scene in evaluation_scenes("seen", 8 * count) if _can_swap(scene)][:count]
    seconds = [dataclasses.replace(one, description=one.description.swapped()) for one in firsts]
    images = _generated(generate, firsts + seconds)
    own, other = (
        np.array([judge(*pair)["all"] for pair in zip(images, descriptions)])
        for descriptions in (
            [scene.description for scene in firsts + seconds],
            [scene.description for scene in seconds + firsts],
        )
    )
    both = own[: len(firsts)] & own[len(firsts) :]
    return {
        "n": len(firsts),
        "both": float(both.mean()),
        "crossed": float(other.mean()),
    }


def _generated(generate, scenes):
    images = generate([scene.caption for scene in scenes])
    if len(images) != len(scenes):
        raise ValueError(
            "`generate` must return one image for each prompt. "
            f"Received: {len(images)} for {len(scenes)} prompts"
        )
    return images


def _can_swap(scene):
    """Tell if swapped colours make another scene, one that training may see."""
    things = scene.description.things
    colours, shapes = {thing.colour for thing in things}, {thing.shape for thing in things}
    if len(colours) < 2 or len(shapes) < 2:
        return False
    return not held_out(scene.description.swapped())


def nearest_training(
    images: np.ndarray, scenes: Sequence[Scene], training_seed: int = 0, trained: int = 4096
) -> dict[str, float]:
    """Measure the distance of images to the nearest of the first training images.

    A model that remembers its training generates images nearer to it than new scenes are.

    Args:
        images: `(n, size, size, 3)` uint8.
        scenes: their scenes; rendered with things at new positions, they are the comparison.
        training_seed: int, seed of the training scenes.
        trained: int, how many of them to search.

    Returns:
        Dictionary of `n`, the number of training images, and medians of the root mean square
        distance in levels of 255, between means of 4 x 4 pixels: `pictures`, and `new_scenes`.
    """
    new = [
        dataclasses.replace(
            scene, placements=place(scene.description, RandomChoices(0, n, FRESH_STREAM))
        )
        for n, scene in enumerate(scenes)
    ]
    size = images.shape[1]
    shown = _shrunk(np.concatenate([images, render(new, size)]))
    nearest = np.full(len(shown), np.inf)
    for start in range(0, trained, 256):
        indices = range(start, min(start + 256, trained))
        some = _shrunk(render([training_scene(training_seed, n) for n in indices], size))
        squares = np.square(some).sum(-1) - 2.0 * shown @ some.T
        nearest = np.minimum(nearest, squares.min(axis=1))
    squares = np.maximum(nearest + np.square(shown).sum(-1), 0.0)
    distances = np.sqrt(squares / shown.shape[1])
    return {
        "n": trained,
        "pictures": float(np.median(distances[: len(new)])),
        "new_scenes": float(np.median(distances[len(new) :])),
    }


def _shrunk(images):
    """Compute the means of 4 x 4 pixels, a row for each image."""
    cells = images.shape[1] // 4
    pixels = images[:, : 4 * cells, : 4 * cells].astype(np.float32)
    return pixels.reshape(-1, cells, 4, cells, 4, 3).mean(axis=(2, 4)).reshape(len(images), -1)


def markdown(numbers: dict[str, Any]) -> str:
    """Return the numbers of `evaluate` as a Markdown table of percentages of right answers."""
    lines = [
        f"| prompts | n | {' | '.join(ATTRIBUTES)} | another prompt |",
        f"|---|{'---:|' * (len(ATTRIBUTES) + 2)}",
    ]
    for name, row in numbers["rows"].items():
        shares = [f"{100 * row[one]:.1f}" if one in row else "–" for one in ATTRIBUTES]
        luck = f"{100 * numbers['shuffled'][name]['all']:.1f}"
        lines.append(f"| {name} | {row['n']} | {' | '.join(shares)} | {luck} |")
    binding, nearest = numbers["binding"], numbers["nearest"]
    lines += [
        "",
        f"Swapped colours: of {binding['n']} prompts of two things, {binding['both']:.1%} are "
        f"right with their colours and with them swapped; {binding['crossed']:.1%} of the images "
        "show the other prompt.",
        "",
        f"Nearest of {nearest['n']} training images: {nearest['pictures']:.1f} levels of 255 "
        f"away, new scenes {nearest['new_scenes']:.1f} (medians of root mean squares).",
    ]
    return "\n".join(lines)
