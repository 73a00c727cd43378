"""Captions of scenes: good English, read back as they were written."""

import itertools

import pytest

from kdiffusion.shapes import grammar as grammar
from kdiffusion.shapes.grammar import Description, Thing, parse, write

ONE = Description((Thing("orange", "ring", "small"),), "blue", position="top left")
TWO = Description((Thing("red", "cross"), Thing("white", "ring")), "orange", relation="left of")


def every_description():
    """Yield descriptions that have each word of each kind at least once."""
    for position in (None, *grammar.POSITIONS):
        for size in (None, *grammar.SIZES):
            for background in (None, "white"):
                yield Description((Thing("orange", "cross", size),), background, position)
    for colour, shape in itertools.product(grammar.COLOURS, grammar.SHAPES):
        yield Description((Thing(colour, shape),))
    for relation in grammar.RELATIONS:
        for background in (None, "green"):
            things = Thing("orange", "ring"), Thing("red", "ring")
            yield Description(things, background, relation=relation)


def test_captions_read_as_people_write_them():
    assert write(ONE) == "a small orange ring at the top left on a blue background"
    assert write(TWO) == "a red cross left of a white ring on an orange background"
    assert write(TWO, 3, 1) == "on an orange background, a red cross to the left of a white ring"
    assert write(ONE, 12, 1) == (
        "against a blue background, there is a small orange ring in the top left corner"
    )
    assert write(Description((Thing("orange", "ring"),))) == "an orange ring"


def test_every_caption_is_read_back():
    count = 0
    for description in every_description():
        for template, wording in itertools.product(
            range(len(grammar.TEMPLATES)), range(grammar.NUM_WORDINGS)
        ):
            if grammar.fits(template, description):
                assert parse(write(description, template, wording)) == description
                count += 1
    assert count > 3000


def test_a_caption_is_read_in_any_case_with_a_full_stop():
    assert parse(" A small  ORANGE ring at the top left on a blue background. ") == ONE


@pytest.mark.parametrize(
    "caption", ["", "a cat", "a red circle on a pink background", "a circle", "red circle on blue"]
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="must read such as"):
        parse(caption)


@pytest.mark.parametrize(
    "caption",
    ["a red ring on a red background", "a red ring above a red ring on a blue background"],
)
def test_what_cannot_be_seen_is_refused(caption):
    with pytest.raises(ValueError, match="cannot be seen|must differ"):
        parse(caption)


def test_descriptions_are_checked():
    red, blue = Thing("red", "ring"), Thing("blue", "ring")
    for things, words in [
        ((), {}),
        ((red, blue, red), {}),
        ((red, blue), {}),
        ((red, blue), {"relation": "left of", "position": "left"}),
        ((Thing("red", "ring", "small"), blue), {"relation": "above"}),
        ((red,), {"relation": "above"}),
        ((red,), {"position": "middle"}),
        ((red,), {"background": "pink"}),
    ]:
        with pytest.raises(ValueError):
            Description(things, **words)
    with pytest.raises(ValueError, match="'pink'"):
        Thing("pink", "ring")


def test_a_template_may_need_a_background():
    with pytest.raises(ValueError, match="needs a background"):
        write(Description((Thing("red", "ring"),)), 4)


def test_a_fifth_of_the_templates_is_held_out_and_has_no_word_of_its_own():
    trained = grammar.TEMPLATES[: grammar.NUM_TRAINED_TEMPLATES]
    rest = grammar.TEMPLATES[grammar.NUM_TRAINED_TEMPLATES :]
    assert len(rest) * 5 == len(grammar.TEMPLATES)
    words = [
        set(" ".join(forms).translate(str.maketrans("[],", "   ")).split())
        for forms in (trained, rest)
    ]
    assert words[1] <= words[0]


def test_what_is_held_out():
    def alone(colour, shape, position=None):
        return grammar.held_out(Description((Thing(colour, shape),), position=position))

    for colour, shape in grammar.HELD_OUT_COLOURS:
        assert alone(colour, shape)
        pair = Thing(colour, shape), Thing("red", "ring")
        assert grammar.held_out(Description(pair, relation="above"))
    for shape, position in grammar.HELD_OUT_POSITIONS:
        assert alone("red", shape, position)
    assert not alone("red", "circle") and not alone("red", "circle", "left")


def test_pairs_are_held_out_in_either_order():
    things = [
        Thing(*words)
        for words in itertools.product(grammar.COLOURS, grammar.SHAPES)
        if words not in grammar.HELD_OUT_COLOURS
    ]
    verdicts = []
    for first, second in itertools.combinations(things, 2):
        one = grammar.held_out(Description((first, second), relation="left of"))
        assert one == grammar.held_out(Description((second, first), relation="above"))
        verdicts.append(one)
    assert 0.08 < sum(verdicts) / len(verdicts) < 0.12


def test_swapped_colours():
    assert write(TWO.swapped()) == "a white cross left of a red ring on an orange background"
