"""The grammar of captions such as "a small red circle at the left on a blue background".

A `Description` holds the meaning of a caption and nothing else, so an image can be judged by its
prompt alone. `write` and `parse` are each other's inverses, for every template and wording.
"""

import functools
import hashlib
import re
from dataclasses import dataclass

from kdiffusion.text.tokenizer import SimpleTokenizer

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
SIZES = ("small", "large")

# Each position is a cell, (column, row) from the top left; its wordings follow.
POSITIONS = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "centre": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
NUM_WORDINGS = 3
_PLACES = {
    "top": ("at the top", "near the top", "at the top"),
    "bottom": ("at the bottom", "near the bottom", "at the bottom"),
    "left": ("at the left", "on the left", "on the left side"),
    "right": ("at the right", "on the right", "on the right side"),
    "centre": ("in the centre", "in the middle", "in the center"),
} | {
    corner: (f"at the {corner}", f"in the {corner} corner", f"in the {corner}")
    for corner in ("top left", "top right", "bottom left", "bottom right")
}
# These are directions from the second thing to the first: (right, down).
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_RELATION_WORDINGS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "above"),
    "below": ("below", "below", "below"),
}

# A caption that names no background leaves a bracket out. {things} are the things and their
# position, {ground} is "a blue background", {background} is "blue".
TEMPLATES = (
    "{things}[ on {ground}]",
    "{things}[ against {ground}]",
    "{things}[ in front of {ground}]",
    "[on {ground}, ]{things}",
    "{ground} with {things}",
    "a picture of {things}[ on {ground}]",
    "a drawing of {things}[ on {ground}]",
    "an image of {things}[ on {ground}]",
    "draw {things}[ on {ground}]",
    "there is {things}[ on {ground}]",
    "{things}, and the background is {background}",
    "the background is {background}, with {things}",
    "[against {ground}, ]there is {things}",
    "a picture of {ground} with {things}",
    "a drawing of {things}[ in front of {ground}]",
)
# The rest, a fifth, is held out of training. All of their words occur in the first ones.
NUM_TRAINED_TEMPLATES = 12

# In training each shape lacks one colour and one position; two colours have all shapes.
HELD_OUT_COLOURS = {
    ("purple", "triangle"),
    ("yellow", "ring"),
    ("orange", "diamond"),
    ("green", "cross"),
    ("white", "square"),
    ("black", "circle"),
}
HELD_OUT_POSITIONS = {
    ("circle", "bottom right"),
    ("square", "top left"),
    ("triangle", "right"),
    ("diamond", "bottom left"),
    ("ring", "top"),
    ("cross", "left"),
}
HELD_OUT_PAIRS = 26  # of 256 pairs of things, chosen by the first byte of their hash


@dataclass(frozen=True)
class Thing:
    """One thing as a caption names it.

    Args:
        colour: one of `COLOURS`.
        shape: one of `SHAPES`.
        size: one of `SIZES`; `None` if the caption has none.
    """

    colour: str
    shape: str
    size: str | None = None

    def __post_init__(self):
        _check("colour", self.colour, COLOURS)
        _check("shape", self.shape, SHAPES)
        _check("size", self.size, (None, *SIZES))

    def __str__(self):
        return with_article(" ".join(filter(None, (self.size, self.colour, self.shape))))


@dataclass(frozen=True)
class Description:
    """The meaning of a caption.

    Args:
        things: one `Thing`, or two of which neither has a size.
        background: one of `COLOURS`; `None` if the caption has none.
        position: one of `POSITIONS`, of a single thing; `None` if the caption has none.
        relation: one of `RELATIONS`, of the first of two things, seen from the second.

    Raises:
        ValueError: If a word is unknown, a thing has the colour of the background, two things are
            alike, or position, relation and size do not fit the number of things.

    Example:

    >>> write(Description((Thing("orange", "ring", "small"),), "black", position="left"))
    'a small orange ring at the left on a black background'
    """

    things: tuple[Thing, ...]
    background: str | None = None
    position: str | None = None
    relation: str | None = None

    def __post_init__(self):
        _check("background", self.background, (None, *COLOURS))
        if any(thing.colour == self.background for thing in self.things):
            raise ValueError(
                f"A {self.background} thing cannot be seen on a {self.background} background. "
                "Give one of them another colour."
            )
        if len(self.things) == 1:
            _check("position", self.position, (None, *POSITIONS))
            _check("relation", self.relation, (None,))
        elif len(self.things) == 2:
            _check("position", self.position, (None,))
            _check("relation", self.relation, tuple(RELATIONS))
            for thing in self.things:
                _check("size", thing.size, (None,))
            if self.things[0] == self.things[1]:
                raise ValueError(f"Two things must differ. Received: {self.things[0]} twice")
        else:
            raise ValueError(f"`things` must be one or two. Received: {len(self.things)}")

    def swapped(self) -> "Description":
        """Return the same two things with each other's colours."""
        first, second = self.things
        things = Thing(second.colour, first.shape), Thing(first.colour, second.shape)
        return Description(things, self.background, relation=self.relation)


def with_article(words: str) -> str:
    """Put "a" or "an" before words of this grammar."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def held_out(description: Description) -> bool:
    """Tell if a description is held out of training, to test how a model composes.

    Held out are pairs of colour and shape, pairs of shape and position, and one pair of things in
    ten, in either order, since "A left of B" and "B right of A" are one image.
    """
    things = description.things
    if any((thing.colour, thing.shape) in HELD_OUT_COLOURS for thing in things):
        return True
    if len(things) == 1:
        return (things[0].shape, description.position) in HELD_OUT_POSITIONS
    pair = " and ".join(sorted(map(str, things)))
    return hashlib.sha256(pair.encode()).digest()[0] < HELD_OUT_PAIRS


def fits(template: int, description: Description) -> bool:
    """Tell if a template suits a description; some templates must name the background."""
    if description.background is not None:
        return True
    return re.search(r"{(ground|background)}", _bare(TEMPLATES[template])) is None


def write(description: Description, template: int = 0, wording: int = 0) -> str:
    """Write a caption.

    Args:
        description: a `Description`.
        template: int, index in `TEMPLATES`.
        wording: int, 0 to `NUM_WORDINGS` - 1, of position and relation.

    Returns:
        The caption, lower case, without a full stop.

    Raises:
        ValueError: If the template names the background and the description has none.
    """
    if not fits(template, description):
        raise ValueError(
            f"Template {template}, {TEMPLATES[template]!r}, needs a background. "
            "Received: a description without one. Use template 0."
        )
    form, background = TEMPLATES[template], description.background
    if background is None:
        return _bare(form).format(things=_things(description, wording))
    return re.sub(r"[\[\]]", "", form).format(
        things=_things(description, wording),
        background=background,
        ground=with_article(f"{background} background"),
    )


def parse(caption: str) -> Description:
    """Parse a caption of this grammar.

    Args:
        caption: a text; case, spaces and a full stop at its end do not matter.

    Returns:
        The `Description` that `write` wrote.

    Raises:
        ValueError: If the caption is not of this grammar, or its thing would be invisible.

    Example:

    >>> parse("An orange ring above a white cross, and the background is black.").relation
    'above'
    """
    text = SimpleTokenizer.clean(caption).removesuffix(".")
    one, two = _thing_patterns()
    for pattern in _template_patterns():
        if not (whole := pattern.fullmatch(text)):
            continue
        background = whole["background"]
        if found := one.fullmatch(whole["things"]):
            thing = Thing(found["colour"], found["shape"], found["size"])
            return Description((thing,), background, position=_meaning(_PLACES, found["place"]))
        if found := two.fullmatch(whole["things"]):
            things = Thing(found["c1"], found["s1"]), Thing(found["c2"], found["s2"])
            relation = _meaning(_RELATION_WORDINGS, found["relation"])
            return Description(things, background, relation=relation)
    raise ValueError(
        "A caption of a scene must read such as 'a small red circle at the left on a blue "
        "background' or 'a red circle left of a green square on a white background'. "
        f"Received: {caption!r:.200}"
    )


def _things(description, wording):
    first, *others = map(str, description.things)
    if others:
        return f"{first} {_RELATION_WORDINGS[description.relation][wording]} {others[0]}"
    if description.position is None:
        return first
    return f"{first} {_PLACES[description.position][wording]}"


def _bare(form):
    return re.sub(r"\[.*?\]", "", form)


def _meaning(wordings, said):
    return next((name for name, forms in wordings.items() if said in forms), None)


@functools.cache
def _template_patterns():
    colour = f"(?P<background>{'|'.join(COLOURS)})"
    patterns = []
    for form in TEMPLATES:
        pattern = form.replace("[", "(?:").replace("]", ")?").replace("{things}", "(?P<things>.+?)")
        pattern = pattern.replace("{ground}", f"an? {colour} background")
        patterns.append(re.compile(pattern.replace("{background}", colour)))
    return patterns


@functools.cache
def _thing_patterns():
    colours, shapes, sizes = map("|".join, (COLOURS, SHAPES, SIZES))
    places, relations = (
        "|".join(form for forms in wordings.values() for form in forms)
        for wordings in (_PLACES, _RELATION_WORDINGS)
    )
    one = rf"an? (?:(?P<size>{sizes}) )?(?P<colour>{colours}) (?P<shape>{shapes})"
    first, second = (rf"an? (?P<c{n}>{colours}) (?P<s{n}>{shapes})" for n in (1, 2))
    return (
        re.compile(rf"{one}(?: (?P<place>{places}))?"),
        re.compile(rf"{first} (?P<relation>{relations}) {second}"),
    )


def _check(name, word, known):
    if word not in known:
        choice = ", ".join(map(repr, known))
        raise ValueError(f"`{name}` must be one of {choice}. Received: {word!r}")
