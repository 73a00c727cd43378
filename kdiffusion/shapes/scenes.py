"""Scenes: images of one or two plain things, rendered from records that have captions.

Scene `i` of a seed is a pure function of the two. Lengths are shares of the side of the square
frame, so a scene can be rendered at any size. Edges are one pixel wide: the share of a pixel that a
shape covers follows from the signed distance to its outline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kdiffusion.shapes import grammar as grammar
from kdiffusion.shapes.grammar import COLOURS, POSITIONS, RELATIONS, SHAPES, Description

# sRGB, at least 86 units apart.
PALETTE = {
    "red": (212, 45, 50),
    "green": (42, 157, 76),
    "blue": (40, 100, 215),
    "yellow": (252, 213, 58),
    "purple": (134, 62, 178),
    "orange": (245, 131, 32),
    "black": (26, 26, 32),
    "white": (248, 248, 244),
}

SIZE = 64
# Lengths are in pixels of a frame of SIZE. There are three sizes with gaps between them; a thing
# without a size has the middle one.
RADII = {"small": (8.5, 9.5), None: (12.0, 14.0), "large": (16.5, 18.0)}
PAIR_RADII = (10.0, 12.0)
EXTENT = 1.15  # half the side of the box that holds any shape of radius 1
MARGIN, GAP = 1.5, 4.0
SIDE = (15.0, 20.0)  # distance of a thing "at the left" to the edge, unless the thing is larger
CENTRE_JITTER, FREE_JITTER, PAIR_JITTER = 2.5, 6.0, 5.0

MAX_ATTEMPTS = 1000
TRAINING_STREAM, EVALUATION_STREAM = 0, 1


@dataclass(frozen=True)
class Placement:
    """The centre of a thing's box and its radius, as shares of the side of the frame."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """An image as a record.

    Args:
        description: the meaning of the caption.
        background: the colour of the background, in the caption or not.
        placements: one `Placement` for each thing.
        template, wording: form of the caption, see `grammar.write`.
    """

    description: Description
    background: str
    placements: tuple[Placement, ...]
    template: int = 0
    wording: int = 0

    @property
    def caption(self) -> str:
        """The caption of the image."""
        return grammar.write(self.description, self.template, self.wording)

    def render(self, size: int = SIZE) -> np.ndarray:
        """Render the scene.

        Args:
            size: int, side of the image in pixels.

        Returns:
            `(size, size, 3)` uint8, sRGB.
        """
        return render([self], size)[0]


@dataclass(frozen=True)
class Words:
    """The words of scenes; fewer of them make an easier data set.

    Args:
        colours, shapes, backgrounds: tuples of words of the grammar.
        pairs: float from 0 to 1, share of the scenes that have two things.
    """

    colours: tuple[str, ...] = COLOURS
    shapes: tuple[str, ...] = SHAPES
    backgrounds: tuple[str, ...] = COLOURS
    pairs: float = 0.5


class RandomChoices:
    """Random choices as a pure function of a key, the same on every version of NumPy.

    Args:
        seed, index: int, 0 to 2**64 - 1, key of a Philox generator (Salmon et al. 2011).
        stream: int, one for each use of a key.

    Raises:
        ValueError: If the seed or the index is out of range.
    """

    def __init__(self, seed: int, index: int, stream: int = TRAINING_STREAM):
        if not (0 <= seed < 2**64 and 0 <= index < 2**64):
            raise ValueError(
                "A seed and the index of a scene must be whole numbers from 0 to 2**64 - 1. "
                f"Received: seed={seed}, index={index}"
            )
        # NumPy promises stability for the words of a bit generator alone (NEP 19).
        key = np.array([seed, index], np.uint64)
        self._words = np.random.Philox(key=key, counter=[0, 0, 0, stream])

    def uniform(self, low: float, high: float) -> float:
        """Draw a float from `low` to `high`."""
        return low + (high - low) * (self._words.random_raw() >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """Draw an int from 0 to `count` - 1."""
        return self._words.random_raw() % count

    def choice(self, options: Sequence):
        """Draw one of the options."""
        return options[self.below(len(options))]


def training_scene(seed: int, index: int, words: Words = Words()) -> Scene:
    """Make scene `index` of a seed, one that training may see.

    Args:
        seed, index: int, 0 or more.
        words: the words to use.

    Raises:
        ValueError: If the words make no scene that training may see.
    """
    random = RandomChoices(seed, index)
    background, description = describe(random, words, hidden_background=0.1)
    # Half of the captions have the plainest form, the one that people write.
    template = random.below(grammar.NUM_TRAINED_TEMPLATES) if random.below(2) else 0
    if not grammar.fits(template, description):
        template = 0
    wording = random.below(grammar.NUM_WORDINGS)
    return Scene(description, background, place(description, random), template, wording)


def describe(
    random: RandomChoices, words: Words, hidden_background: float = 0.0, held_out: bool = False
) -> tuple[str, Description]:
    """Draw a background and a description.

    Args:
        random: `RandomChoices`.
        words: the words to use.
        hidden_background: float, share of descriptions without a background.
        held_out: bool, whether the description must be held out of training or must not.

    Returns:
        The colour of the background, and the description.
    """
    pair = random.uniform(0, 1) < words.pairs
    for _ in range(MAX_ATTEMPTS):
        background = random.choice(words.backgrounds)
        said = None if random.uniform(0, 1) < hidden_background else background
        size = random.choice((None, None, None, *grammar.SIZES)) if not pair else None
        things = tuple(
            grammar.Thing(random.choice(words.colours), random.choice(words.shapes), size)
            for _ in range(1 + pair)
        )
        position = random.choice((None, *POSITIONS)) if not pair and random.below(2) else None
        relation = random.choice(tuple(RELATIONS)) if pair else None
        if any(thing.colour == background for thing in things) or len(set(things)) < len(things):
            continue
        description = Description(things, said, position, relation)
        if grammar.held_out(description) == held_out:
            return background, description
    kind = "held out" if held_out else "for training"
    raise ValueError(
        f"`words` must make scenes {kind}; none came in {MAX_ATTEMPTS} attempts. Use more colours, "
        f"shapes or backgrounds. Received: {words}"
    )


def place(description: Description, random: RandomChoices) -> tuple[Placement, ...]:
    """Draw the positions of the things of a description, within the frame and apart."""
    if len(description.things) == 2:
        return _place_pair(description.relation, random)
    radius = random.uniform(*RADII[description.things[0].size])
    low = max(EXTENT * radius + MARGIN, SIDE[0])

    def coordinate(cell):
        if cell is None:
            return SIZE / 2 + random.uniform(-FREE_JITTER, FREE_JITTER)
        if cell == 1:
            return SIZE / 2 + random.uniform(-CENTRE_JITTER, CENTRE_JITTER)
        distance = random.uniform(low, max(low, SIDE[1]))
        return distance if cell == 0 else SIZE - distance

    position = description.position
    column, row = (None, None) if position is None else POSITIONS[position]
    return (_placement(coordinate(column), coordinate(row), radius),)


def _place_pair(relation, random):
    radii = [random.uniform(*PAIR_RADII) for _ in range(2)]
    halves = [EXTENT * radius for radius in radii]
    right, down = RELATIONS[relation]
    # Along the axis of the relation, the rest of the frame lies before and between the things.
    order = (0, 1) if right + down < 0 else (1, 0)
    room = SIZE - 2 * MARGIN - GAP - 2 * sum(halves)
    before = random.uniform(0, room)
    between = random.uniform(0, room - before)
    along = [0.0, 0.0]
    along[order[0]] = MARGIN + before + halves[order[0]]
    along[order[1]] = along[order[0]] + sum(halves) + GAP + between
    across = [SIZE / 2 + random.uniform(-PAIR_JITTER, PAIR_JITTER) for _ in range(2)]
    centres = zip(along, across) if right else zip(across, along)
    return tuple(_placement(x, y, radius) for (x, y), radius in zip(centres, radii))


def _placement(x, y, radius):
    return Placement(x / SIZE, y / SIZE, radius / SIZE)


def render(scenes: Sequence[Scene], size: int = SIZE) -> np.ndarray:
    """Render scenes.

    Args:
        scenes: `Scene` records.
        size: int, side of the images in pixels.

    Returns:
        `(len(scenes), size, size, 3)` uint8, sRGB.
    """
    grounds = np.array([PALETTE[scene.background] for scene in scenes], np.float32)
    images = np.broadcast_to(grounds[:, None, None], (len(scenes), size, size, 3)).copy()
    for shape in SHAPES:
        found = [
            (n, PALETTE[thing.colour], (spot.x, spot.y, spot.radius))
            for n, scene in enumerate(scenes)
            for thing, spot in zip(scene.description.things, scene.placements)
            if thing.shape == shape
        ]
        # Two things of a scene do not overlap, so the order does not matter. Each is rendered by
        # itself, because an image may hold a shape twice.
        if found:
            numbers, colours, spots = zip(*found)
            shares = coverage(shape, np.array(spots), size)[..., None]
            for n, colour, share in zip(numbers, np.array(colours, np.float32), shares):
                images[n] += share * (colour - images[n])
    return np.rint(images).astype(np.uint8)


def coverage(shape: str, spots: np.ndarray, size: int) -> np.ndarray:
    """Compute the share of each pixel that a shape covers.

    Args:
        shape: one of `SHAPES`.
        spots: `(n, 3)` float, x, y and radius as shares of the frame.
        size: int, side of the frame in pixels.

    Returns:
        `(n, size, size)` float32 from 0 to 1.
    """
    x, y, radius = (column[:, None, None].astype(np.float32) for column in spots.T)
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    right = (centres[None, None, :] - x) / radius
    down = (centres[None, :, None] - y) / radius
    return np.clip(0.5 - DISTANCES[shape](right, down) * (radius * size), 0.0, 1.0)


_ROUNDING = 0.06


def _circle(x, y):
    return np.sqrt(x * x + y * y) - 1.0


def _ring(x, y):
    return np.abs(np.sqrt(x * x + y * y) - 0.81) - 0.25


def _square(x, y):
    return _box(x, y, 0.9, 0.9)


def _diamond(x, y):
    half = EXTENT / np.float32(np.sqrt(2.0))
    return _box((x + y) * np.float32(np.sqrt(0.5)), (x - y) * np.float32(np.sqrt(0.5)), half, half)


def _cross(x, y):
    return np.minimum(_box(x, y, 1.08, 0.37), _box(x, y, 0.37, 1.08))


def _triangle(x, y):
    """Compute the distance to a triangle, apex up, from two segments of its mirrored half."""
    x = np.abs(x)
    half, top, bottom = EXTENT - _ROUNDING, -1.0 + _ROUNDING, 1.0 - _ROUNDING
    length = np.hypot(half, bottom - top)
    beyond = ((bottom - top) * x - half * (y - top)) / length
    # The share runs along the slope, from the apex at 0 to the corner at 1.
    share = np.clip((half * x + (bottom - top) * (y - top)) / length**2, 0.0, 1.0)
    slope = np.square(x - half * share) + np.square(y - top - (bottom - top) * share)
    base = np.square(np.maximum(x - half, 0.0)) + np.square(y - bottom)
    inside = np.maximum(beyond, y - bottom) < 0.0
    distance = np.sqrt(np.minimum(slope, base))
    return np.where(inside, -distance, distance) - _ROUNDING


def _box(x, y, half_width, half_height):
    """Compute the exact distance to a box with rounded corners."""
    x, y = np.abs(x) - (half_width - _ROUNDING), np.abs(y) - (half_height - _ROUNDING)
    outside = np.sqrt(np.square(np.maximum(x, 0.0)) + np.square(np.maximum(y, 0.0)))
    return outside + np.minimum(np.maximum(x, y), 0.0) - _ROUNDING


# Each function is the signed distance to the outline of a shape of radius 1, at (right, down) from
# its centre.
DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "ring": _ring,
    "cross": _cross,
}
