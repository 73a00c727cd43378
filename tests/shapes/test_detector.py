"""The detector: right about what scenes show, and about what is wrong with a picture."""

import dataclasses

import numpy as np
import pytest

from kdiffusion.shapes import detector
from kdiffusion.shapes.detector import (
    accuracy,
    components,
    detect,
    judge,
    nearest_colour,
)
from kdiffusion.shapes.grammar import POSITIONS, SHAPES, Description, Thing, parse
from kdiffusion.shapes.scenes import PALETTE, Placement, Scene, training_scene


def rendered(caption, *spots):
    """Render a caption, with its things at (x, y, radius) in pixels of 64."""
    description = parse(caption)
    placements = tuple(Placement(*(length / 64 for length in spot)) for spot in spots)
    return Scene(description, description.background, placements).render()


PAIR = rendered("a red ring left of a blue cross on a white background", (16, 30, 11), (46, 34, 11))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_is_measured(shape):
    picture = rendered(f"a green {shape} on a yellow background", (20.3, 41.6, 12.4))
    seen = detect(picture)
    (thing,) = seen.things
    assert (seen.background, thing.colour, thing.shape) == ("yellow", "green", shape)
    assert (thing.size, thing.cell) == (None, (0, 2))
    assert [64 * thing.x, 64 * thing.y] == pytest.approx([20.3, 41.6], abs=0.3)
    assert 64 * thing.radius == pytest.approx(12.4, abs=0.3)
    assert thing.match > 0.9


def test_two_things_are_judged():
    verdict = judge(PAIR, parse("a red ring left of a blue cross on a white background"))
    assert verdict == dict.fromkeys(
        ("count", "background", "colour", "shape", "relation", "all"), True
    )


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("a red ring left of a blue cross on a black background", {"background"}),
        ("a red ring left of a blue square on a white background", {"shape"}),
        ("a red ring left of a green cross on a white background", {"colour"}),
        ("a red ring right of a blue cross on a white background", {"relation"}),
        ("a red ring above a blue cross on a white background", {"relation"}),
        ("a blue ring left of a red cross on a white background", {"colour"}),
        ("a red ring on a white background", {"count"}),
        ("a red ring at the left on a white background", {"count"}),
        ("a large red ring at the right on a white background", {"count", "size", "position"}),
    ],
)
def test_what_is_wrong_is_named(prompt, wrong):
    verdict = judge(PAIR, parse(prompt))
    assert {name for name, right in verdict.items() if not right} == wrong | {"all"}


def test_two_alike_are_told_apart_by_their_colours():
    prompt = "a red ring above a blue ring on a white background"
    picture = rendered(prompt, (30, 16, 11), (33, 46, 11))
    assert judge(picture, parse(prompt))["all"]
    verdict = judge(picture, parse("a blue ring above a red ring on a white background"))
    assert not verdict["relation"] and verdict["colour"]


@pytest.mark.parametrize("radii", [(10, 12), (12, 10)])
def test_a_relation_is_judged_apart_from_colours(radii):
    """Both are of neither colour: which of them is meant can only be told by where they are."""
    prompt = "a green ring above a green cross on a white background"
    picture = rendered(prompt, (30, 16, radii[0]), (33, 46, radii[1]))
    verdict = judge(picture, parse("a red square above a blue circle on a white background"))
    assert verdict["relation"] and not verdict["colour"] and not verdict["shape"]


def test_sizes_and_positions():
    for size, radius in (("small", 9), (None, 13), ("large", 17)):
        for position, (column, row) in POSITIONS.items():
            spot = (22 + 10 * column, 22 + 10 * row, radius)
            picture = rendered("a red circle on a black background", spot)
            (thing,) = detect(picture).things
            assert (thing.size, thing.cell) == (size, (column, row)), (size, position)


def test_an_empty_picture_shows_nothing():
    picture = np.full((64, 64, 3), PALETTE["blue"], np.uint8)
    assert detect(picture).things == ()
    verdict = judge(picture, parse("a small red ring at the left on a blue background"))
    assert verdict.pop("background")
    assert not any(verdict.values())
    verdict = judge(picture, parse("a red ring above a green ring on a blue background"))
    assert verdict.pop("background")
    assert not any(verdict.values())


def test_what_has_no_name_is_no_colour_and_no_shape():
    picture = np.full((64, 64, 3), 128, np.uint8)
    picture[20:26, 10:50] = 255, 0, 255
    seen = detect(picture)
    assert seen.background is None
    assert seen.things[0].colour is None and seen.things[0].shape is None
    assert nearest_colour(np.array([212, 45, 50])) == "red"


def test_a_fleck_counts_and_a_speck_does_not():
    picture = rendered("a red circle on a white background", (32, 32, 13))
    picture[4:8, 4:8] = PALETTE["blue"]
    assert len(detect(picture).things) == 1
    picture[4:9, 4:9] = PALETTE["blue"]
    assert len(detect(picture).things) == 2
    assert not judge(picture, parse("a red circle on a white background"))["all"]


def test_a_filled_ring_is_no_ring():
    picture = rendered("a red ring on a white background", (32, 32, 13))
    picture[24:40, 24:40] = PALETTE["red"]
    assert judge(picture, parse("a red ring on a white background"))["shape"] is False


def test_parts_of_a_mask():
    mask = np.array([[1, 0, 1, 1], [1, 0, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0]], bool)
    labels = components(mask)
    assert np.array_equal(labels >= 0, mask)
    assert labels[0, 0] == labels[1, 0] and labels[0, 2] == labels[2, 1]
    assert len(np.unique(labels)) == 4  # three parts and outside
    spiral = np.zeros((31, 31), bool)
    for ring in range(0, 15, 2):
        spiral[ring, ring : 31 - ring] = spiral[ring : 31 - ring, 30 - ring] = True
        spiral[30 - ring, ring : 31 - ring] = spiral[ring + 2 : 31 - ring, ring] = True
        spiral[ring + 2, ring : ring + 2] = True
    assert len(np.unique(components(spiral))) == 2


@pytest.mark.parametrize("noise", [0, 12])
def test_scenes_are_judged_right(noise):
    rng = np.random.default_rng(0)
    verdicts = []
    for index in range(300):
        scene = training_scene(5, index)
        picture = scene.render() + rng.normal(0, noise, (64, 64, 3))
        picture = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
        verdicts.append(judge(picture, scene.description))
    shares = accuracy(verdicts)
    assert shares["all"] >= 0.99
    assert tuple(shares) == detector.ATTRIBUTES


def test_larger_pictures_are_judged_alike():
    for index in range(40):
        scene = training_scene(6, index)
        assert judge(scene.render(128), scene.description)["all"]


def test_an_attribute_is_judged_where_it_is_said():
    description = Description((Thing("red", "ring"),))
    verdict = judge(rendered("a red ring on a white background", (32, 32, 13)), description)
    assert set(verdict) == {"count", "colour", "shape", "all"}
    assert accuracy([verdict, verdict | {"all": False}])["all"] == 0.5
    assert "size" not in accuracy([verdict])


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64, 3), np.float32),
        np.zeros((64, 32, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((1, 64, 64, 3), np.uint8),
    ],
)
def test_no_picture(picture):
    with pytest.raises(ValueError, match="square of uint8"):
        detect(picture)


def test_records_are_plain():
    assert dataclasses.asdict(detect(PAIR))["background"] == "white"
