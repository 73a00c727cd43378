"""A detector of the things in an image of a scene, without a network, and a judge of its prompt.

The background is the colour of the border. Pixels of other colours form connected components. The
colour of a component is that of its core. Its shape is the one whose template covers the same
pixels, placed by the component's area and centroid.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdiffusion.shapes.grammar import POSITIONS, RELATIONS, SHAPES, Description
from kdiffusion.shapes.scenes import PALETTE, SIZE, coverage

ATTRIBUTES = ("background", "count", "colour", "shape", "size", "position", "relation", "all")

# Units of sRGB. No two colours of the palette are nearer than twice CONTRAST.
CONTRAST, MAX_COLOUR_DISTANCE = 43.0, 60.0
MIN_AREA = 20 / SIZE**2  # share of the frame; a ninth of that of the smallest thing
MIN_MATCH = 0.8  # intersection over union with the template; a blur of one pixel leaves 0.9
BORDER = 2  # pixels
THIRDS = 0.4, 0.6  # between a side and the centre
SMALL, LARGE = 10.75 / SIZE, 15.25 / SIZE  # radii in the gaps between the three of RADII
MAX_CANDIDATES = 4


@dataclass(frozen=True)
class Sighting:
    """One thing as an image shows it.

    Args:
        colour: one of the palette; `None` if none is near.
        shape: one of the shapes; `None` if none fits.
        x, y, radius: its centre and radius, as shares of the side of the frame.
        match: float, intersection over union with the shape that fits best.
    """

    colour: str | None
    shape: str | None
    x: float
    y: float
    radius: float
    match: float

    @property
    def size(self) -> str | None:
        """The size: `"small"`, `"large"`, or `None` for between."""
        return "small" if self.radius < SMALL else "large" if self.radius > LARGE else None

    @property
    def cell(self) -> tuple[int, int]:
        """The cell of the position, (column, row) from the top left."""
        column, row = (int(np.searchsorted(THIRDS, share)) for share in (self.x, self.y))
        return column, row


@dataclass(frozen=True)
class Detection:
    """The content of an image: the colour of its background, `None` if none is near, and things."""

    background: str | None
    things: tuple[Sighting, ...]


def detect(image: np.ndarray) -> Detection:
    """Measure the content of an image.

    Args:
        image: `(size, size, 3)` uint8, sRGB.

    Returns:
        A `Detection`, the largest thing first.

    Raises:
        ValueError: If the image has another shape or dtype.
    """
    square = image.ndim == 3 and image.shape == (len(image), len(image), 3)
    if not square or image.dtype != np.uint8:
        raise ValueError(
            "`image` must be a square of uint8 with three channels. "
            f"Received: shape {image.shape}, {image.dtype}"
        )
    pixels = image.astype(np.float32)
    edge = np.ones(pixels.shape[:2], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(pixels[edge], axis=0)
    labels = components(np.square(pixels - ground).sum(-1) > CONTRAST**2)
    names, areas = np.unique(labels[labels >= 0], return_counts=True)
    large = [(-area, name) for name, area in zip(names, areas) if area >= MIN_AREA * labels.size]
    things = tuple(_sighting(pixels, ground, labels == name) for _, name in sorted(large))
    return Detection(nearest_colour(ground), things)


def judge(image: np.ndarray, description: Description) -> dict[str, bool]:
    """Compare an image with a description.

    Args:
        image: `(size, size, 3)` uint8, sRGB.
        description: a `Description`; `grammar.parse` makes it from a prompt.

    Returns:
        Dictionary with those of `ATTRIBUTES` that the description has; of two things both must be
        right. `"all"` tells if all others are.
    """
    seen, said = detect(image), description.things
    found = _assign(seen.things, description)
    missing = any(thing is None for thing in found)
    verdict = {"count": len(seen.things) == len(said)}
    if description.background is not None:
        verdict["background"] = seen.background == description.background
    for name in ("colour", "shape", "size"):
        if getattr(said[0], name) is not None:
            verdict[name] = all(
                one is not None and getattr(one, name) == getattr(thing, name)
                for one, thing in zip(found, said)
            )
    if description.position is not None:
        verdict["position"] = not missing and found[0].cell == POSITIONS[description.position]
    if description.relation is not None:
        verdict["relation"] = not missing and related(found[0], found[1], description.relation)
    verdict["all"] = all(verdict.values())
    return verdict


def accuracy(verdicts: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Compute the share of right answers for each attribute, among images whose prompt has it."""
    answers = {name: [one[name] for one in verdicts if name in one] for name in ATTRIBUTES}
    return {name: float(np.mean(some)) for name, some in answers.items() if some}


def related(first: Sighting, second: Sighting, relation: str) -> bool:
    """Tell if two things stand in a relation, the first seen from the second."""
    right, down = RELATIONS[relation]
    x, y = first.x - second.x, first.y - second.y
    return x * right + y * down > abs(x * down) + abs(y * right)


def nearest_colour(colour: np.ndarray) -> str | None:
    """Return the name of the nearest colour of the palette; `None` if it is far."""
    distances = np.linalg.norm(np.array(list(PALETTE.values())) - colour, axis=-1)
    nearest = int(np.argmin(distances))
    return list(PALETTE)[nearest] if distances[nearest] <= MAX_COLOUR_DISTANCE else None


def components(mask: np.ndarray) -> np.ndarray:
    """Number the connected parts of a mask; pixels that share a side are connected.

    Every pixel takes the lowest number of its neighbours, then that of the pixel so numbered, until
    nothing changes. That takes a few rounds, however long the path through a part is.

    Args:
        mask: `(height, width)` bool.

    Returns:
        `(height, width)` int, one number for each part, -1 outside.
    """
    none = mask.size
    labels = np.where(mask, np.arange(none).reshape(mask.shape), none)
    while True:
        padded = np.pad(labels, 1, constant_values=none)
        lowest = np.minimum.reduce(
            [labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        lowest = np.append(np.where(mask, lowest, none).ravel(), none)
        lowest = lowest[lowest][:-1].reshape(mask.shape)
        if np.array_equal(lowest, labels):
            return np.where(mask, labels, -1)
        labels = lowest


def _sighting(pixels, ground, part):
    colour = np.median(pixels[_core(part)], axis=0)
    size = len(pixels)
    # At high contrast a component is wider than its thing; half of the contrast is the outline.
    share = (pixels - ground) @ (colour - ground) / np.square(colour - ground).sum()
    covered = (share >= 0.5) & _grown(_grown(part))
    if not covered.any():
        covered = part
    rows, columns = np.nonzero(covered)
    centroid = (np.array([columns.mean(), rows.mean()]) + 0.5) / size
    best = (-1.0, "", np.zeros(3))
    for shape in SHAPES:
        area, shift = _moments(shape)
        radius = np.sqrt(len(rows) / area) / size
        spot = np.array([centroid[0], centroid[1] - shift * radius, radius])
        template = coverage(shape, spot[None], size)[0] >= 0.5
        match = (template & covered).sum() / (template | covered).sum()
        best = max(best, (match, shape, spot), key=lambda candidate: candidate[0])
    match, shape, spot = best
    x, y, radius = map(float, spot)
    found = shape if match >= MIN_MATCH else None
    return Sighting(nearest_colour(colour), found, x, y, radius, float(match))


def _assign(things, description):
    """Assign a thing of the image to each thing of the description, `None` for none.

    The assignment has the most right colours and shapes, then the right relation.
    """
    said = description.things
    candidates = [*things[:MAX_CANDIDATES], *[None] * len(said)]

    def right(found):
        pairs = [(one, thing) for one, thing in zip(found, said) if one is not None]
        names = sum((one.colour == it.colour) + (one.shape == it.shape) for one, it in pairs)
        placed = len(pairs) == 2 and related(found[0], found[1], description.relation)
        return len(pairs), names, placed

    return max(itertools.permutations(candidates, len(said)), key=right)


def _core(part):
    """Return the pixels of a component away from its edge, or all if it is thin."""
    core = part
    for _ in range(2):
        smaller = ~_grown(~core)
        if smaller.sum() < 0.2 * part.sum():
            break
        core = smaller
    return core


def _grown(mask):
    padded = np.pad(mask, 1)
    beside = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask | beside


@functools.cache
def _moments(shape):
    """Return the area of a shape of radius 1, and how far its centroid is below its centre."""
    radius, size = 0.4, 500
    share = coverage(shape, np.array([[0.5, 0.5, radius]]), size)[0]
    rows = (np.arange(size) + 0.5) / size - 0.5
    area = share.mean() / radius**2
    return float(area), float((share.mean(axis=1) @ rows) / size / (area * radius**2) / radius)
