"""Scenes to train with, and scenes to evaluate with, most of them held out of training."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from kdiffusion.shapes import grammar as grammar
from kdiffusion.shapes.grammar import Description
from kdiffusion.shapes.scenes import (
    EVALUATION_STREAM,
    SIZE,
    RandomChoices,
    Scene,
    Words,
    describe,
    place,
    render,
    training_scene,
)
from kdiffusion.text.learning import learn_tokenizer
from kdiffusion.text.tokenizer import SimpleTokenizer

MAX_LENGTH = 24  # start, at most 19 words and commas, end
VOCABULARY_SIZE = 512
LEARNT_CAPTIONS = 1024

SPLITS = ("seen", "held-out pairs", "held-out templates")
CONTRAST_STREAM = EVALUATION_STREAM + len(SPLITS)  # each split has one of its own

OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class SceneData:
    """Endless batches of scenes, none of which comes twice.

    Args:
        seed: int, 0 to 2**64 - 1.
        image_size: int, side of the images in pixels.
        words: `Words` that the scenes are made of.
        tokenizer: `SimpleTokenizer` for the captions; `None` for that of `scene_tokenizer`.
        contrasts: bool, whether every other scene is a `contrast` of the one before it, from which
            CLIP learns most.

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
        contrasts: bool = False,
    ):
        self.seed = seed
        self.image_size = image_size
        self.words = words
        self.tokenizer = tokenizer or scene_tokenizer()
        self.contrasts = contrasts

    def scenes(self, step: int, size: int) -> list[Scene]:
        """Return the scenes of a batch, `step * size` to `(step + 1) * size - 1`."""
        return [self._scene(index) for index in range(step * size, (step + 1) * size)]

    def _scene(self, index):
        if self.contrasts and index % 2:
            random = RandomChoices(self.seed, index, CONTRAST_STREAM)
            return contrast(training_scene(self.seed, index - 1, self.words), random, self.words)
        return training_scene(self.seed, index, self.words)

    def batch(self, step: int, size: int) -> dict[str, np.ndarray]:
        """Return the batch of a step; a pure function of its arguments.

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


def contrast(scene: Scene, random: RandomChoices, words: Words = Words()) -> Scene:
    """Make a scene whose caption differs from another's by a single word or the order of two.

    The word is the position if the caption has one; else the relation, the size or the shape, or
    the colours of two things are swapped. Without such negatives contrastive training learns the
    words of a caption, not its meaning (Yuksekgonul et al. 2023, arXiv:2210.01936, section 4).

    Args:
        scene: a `Scene` of training.
        random: `RandomChoices`.
        words: the words to use.

    Returns:
        A `Scene` that training may see; with the same words if no other can be made.
    """
    changed = _changed(scene.description, words)
    legal = [[other for other in some if not grammar.held_out(other)] for some in changed]
    legal = [some for some in legal if some] or [[scene.description]]
    description = random.choice(random.choice(legal))
    placements = place(description, random)
    return dataclasses.replace(scene, description=description, placements=placements)


def _changed(description, words):
    """List descriptions that differ by a word or the order of two, for each kind of change."""
    things = description.things

    def changed(**fields):
        return dataclasses.replace(description, **fields)

    if len(things) == 2:
        swapped = description.swapped()
        return [
            [changed(relation=OPPOSITES[description.relation])],
            [swapped] if swapped != description else [],
        ]
    if description.position is not None:  # it is the hardest to learn, and few captions have it
        others = [other for other in grammar.POSITIONS if other != description.position]
        return [[changed(position=other) for other in others]]
    (thing,) = things

    def changed_thing(field, values):
        values = [value for value in values if value != getattr(thing, field)]
        return [changed(things=(dataclasses.replace(thing, **{field: v}),)) for v in values]

    kinds = [changed_thing("shape", words.shapes)]
    if thing.size is not None:
        kinds.append(changed_thing("size", grammar.SIZES))
    return kinds


@functools.cache
def scene_tokenizer() -> SimpleTokenizer:
    """Make the tokenizer of captions, to which each of their words is one token."""
    captions = (training_scene(0, index).caption for index in range(LEARNT_CAPTIONS))
    return learn_tokenizer(captions, VOCABULARY_SIZE, MAX_LENGTH)


def evaluation_scenes(
    split: str, count: int = 512, seed: int = 0, words: Words = Words()
) -> list[Scene]:
    """Make scenes whose captions are prompts to evaluate with.

    No two have the same description, and all captions name the background.

    Args:
        split: `"seen"`, scenes as in training; `"held-out pairs"`, things, positions and pairs of
            things that no training image shows (see `grammar.held_out`); or `"held-out
            templates"`, captions of a form that training does not have.
        count: int, how many.
        seed: int; each seed has other scenes.
        words: the words to use. If they have pairs, every other scene has two things.

    Returns:
        List of `Scene`.

    Raises:
        ValueError: If the split is unknown, or the words make fewer descriptions than `count`.
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
        random = RandomChoices(seed, attempt, EVALUATION_STREAM + SPLITS.index(split))
        pairs = float(len(found) % 2 and words.pairs > 0)
        some = Words(words.colours, words.shapes, words.backgrounds, pairs)
        background, description = describe(random, some, held_out=held_out)
        template, wording = random.choice(templates), random.below(grammar.NUM_WORDINGS)
        scene = Scene(description, background, place(description, random), template, wording)
        found.setdefault(description, scene)
        if len(found) == count:
            return list(found.values())
    raise ValueError(
        f"`words` must make {count} different descriptions, but make fewer. Use more words or a "
        f"smaller `count`. Received: {words}"
    )
