"""Scenes to train with, and scenes to evaluate with, whose captions training has not seen."""

import functools
from collections.abc import Sequence

import numpy as np

from kdiffusion.tokenizer import SimpleTokenizer
from kdiffusion.training import scenes_grammar as grammar
from kdiffusion.training.byte_pairs import learn_tokenizer
from kdiffusion.training.scenes import (
    EVALUATION_STREAM,
    SIZE,
    Draws,
    Scene,
    Words,
    describe,
    place,
    render,
    training_scene,
)
from kdiffusion.training.scenes_grammar import Description

MAX_LENGTH = 24  # start, at most 17 words and commas, end
VOCABULARY_SIZE = 512
LEARNT_CAPTIONS = 1024

SPLITS = ("seen", "held-out pairs", "held-out templates")


class SceneData:
    """Batches of scenes without an end, none drawn twice.

    Args:
        seed: int, 0 to 2**64 - 1.
        image_size: int, side of the pictures in pixels.
        words: `Words` that the scenes are made of.
        tokenizer: `SimpleTokenizer` for the captions; `None` for that of `scene_tokenizer`.

    Example:

    ```python
    SceneData().batch(step=0, size=8)["images"].shape  # (8, 64, 64, 3)
    ```
    """

    def __init__(
        self,
        seed: int = 0,
        image_size: int = SIZE,
        words: Words = Words(),
        tokenizer: SimpleTokenizer | None = None,
    ):
        self.seed = seed
        self.image_size = image_size
        self.words = words
        self.tokenizer = tokenizer or scene_tokenizer()

    def scenes(self, step: int, size: int) -> list[Scene]:
        """The scenes of a batch, `step * size` to `(step + 1) * size - 1`."""
        places = range(step * size, (step + 1) * size)
        return [training_scene(self.seed, place, self.words) for place in places]

    def batch(self, step: int, size: int) -> dict[str, np.ndarray]:
        """The batch of a step; a pure function of its arguments.

        Args:
            step: int, from 0.
            size: int, samples of a batch.

        Returns:
            Dictionary of `images`, `(size, height, width, 3)` float32 in [-1, 1]; `tokens`,
            `(size, length)` int32; and `index`, `(size,)` int32, 0 to size - 1.
        """
        scenes = self.scenes(step, size)
        return {
            "images": render(scenes, self.image_size) / np.float32(127.5) - np.float32(1.0),
            "tokens": self.tokenizer.rows([scene.caption for scene in scenes]),
            "index": np.arange(size, dtype=np.int32),
        }


class SceneSource(Sequence):
    """The first scenes of training as samples for `Data`, which orders them anew each epoch.

    Args:
        data: `SceneData`.
        count: int, how many scenes.
    """

    def __init__(self, data: SceneData, count: int):
        self.data = data
        self._numbers = range(count)

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, index):
        (scene,) = self.data.scenes(self._numbers[index], 1)
        return {"image": render([scene], self.data.image_size)[0], "caption": scene.caption}


@functools.cache
def scene_tokenizer() -> SimpleTokenizer:
    """The tokenizer of captions of scenes: each of their words is one token."""
    captions = (training_scene(0, index).caption for index in range(LEARNT_CAPTIONS))
    return learn_tokenizer(captions, VOCABULARY_SIZE, MAX_LENGTH)


def evaluation_scenes(
    split: str, count: int = 512, seed: int = 0, words: Words = Words()
) -> list[Scene]:
    """Scenes whose captions are prompts to evaluate with.

    No two have the same description, and all say the background.

    Args:
        split: `"seen"`, what training is made of; `"held-out pairs"`, things, places and pairs of
            things that no training picture shows (see `scenes_grammar.held_out`); or `"held-out
            templates"`, captions in a form that training does not have.
        count: int, how many.
        seed: int; each seed has other scenes.
        words: the words to use. Where they have pairs, every other scene has two things.

    Returns:
        List of `Scene`.

    Raises:
        ValueError: the split is unknown, or the words make fewer descriptions than `count`.
    """
    if split not in SPLITS:
        known = ", ".join(map(repr, SPLITS))
        raise ValueError(f"`split` must be one of {known}. Received: {split!r}")
    if split == "held-out templates":
        templates = range(grammar.NUM_TRAINED_TEMPLATES, len(grammar.TEMPLATES))
    else:
        templates = range(grammar.NUM_TRAINED_TEMPLATES)
    held_out = split == "held-out pairs"
    found: dict[Description, Scene] = {}
    for attempt in range(20 * count):
        draws = Draws(seed, attempt, EVALUATION_STREAM + SPLITS.index(split))
        pairs = float(len(found) % 2 and words.pairs > 0)
        some = Words(words.colours, words.shapes, words.backgrounds, pairs)
        background, description = describe(draws, some, held_out=held_out)
        template, wording = draws.choice(templates), draws.below(grammar.NUM_WORDINGS)
        scene = Scene(description, background, place(description, draws), template, wording)
        found.setdefault(description, scene)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"These words make no {count} descriptions that differ. Received: {words}")
