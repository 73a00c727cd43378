"""Scenes: pure functions of their numbers, rendered as their captions say, none held out."""

import itertools

import numpy as np
import pytest

from kdiffusion.shapes import grammar as grammar
from kdiffusion.shapes.data import (
    MAX_LENGTH,
    SPLITS,
    VOCABULARY_SIZE,
    SceneData,
    evaluation_scenes,
    scene_tokenizer,
)
from kdiffusion.shapes.grammar import Description, Thing
from kdiffusion.shapes.scenes import (
    EXTENT,
    GAP,
    MARGIN,
    PALETTE,
    SIZE,
    Placement,
    RandomChoices,
    Scene,
    Words,
    coverage,
    describe,
    render,
    training_scene,
)
from kdiffusion.text.learning import UNKNOWN, learn_tokenizer
from kdiffusion.text.tokenizer import SimpleTokenizer

# What a round corner takes away from a right angle.
CORNER = (1 - np.pi / 4) * 0.06**2


@pytest.fixture(scope="module")
def scenes():
    return [training_scene(0, index) for index in range(2000)]


def test_colours_are_apart():
    for first, second in itertools.combinations(PALETTE.values(), 2):
        assert np.linalg.norm(np.subtract(first, second)) >= 86
    assert set(PALETTE) == set(grammar.COLOURS)


def test_a_scene_by_hand():
    """A white circle of 20 pixels on black: its middle, its edge, its surroundings, its area."""
    description = Description((Thing("white", "circle"),), "black")
    scene = Scene(description, "black", (Placement(0.5, 0.5, 20 / 64),))
    picture = scene.render(64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert tuple(picture[32, 32]) == PALETTE["white"]
    assert tuple(picture[0, 0]) == tuple(picture[32, 10]) == PALETTE["black"]
    assert tuple(picture[32, 13]) == PALETTE["white"]  # the edge is between 11 and 12
    share = coverage("circle", np.array([[0.5, 0.5, 20 / 64]]), 64)[0]
    assert share.sum() == pytest.approx(np.pi * 20**2, rel=1e-3)
    assert np.array_equal(share, share[::-1]) and np.array_equal(share, share.T)
    assert scene.caption == "a white circle on a black background"


def test_edges_are_shares_of_a_pixel():
    """A square of half side 0.9 * 20 = 18 pixels, moved by a quarter of one."""
    spot = (0.5 + 0.25 / 64, 0.5, 20 / 64)
    share = coverage("square", np.array([spot]), 64)[0]
    np.testing.assert_allclose(share[32, 13:16], [0.0, 0.75, 1.0], atol=1e-5)
    np.testing.assert_allclose(share[32, 49:52], [1.0, 0.25, 0.0], atol=1e-5)
    description = Description((Thing("yellow", "square"),), "green")
    picture = Scene(description, "green", (Placement(*spot),)).render()
    # Green (42, 157, 76), and three quarters of the way to yellow (252, 213, 58): rounded.
    assert tuple(picture[32, 13]) == (42, 157, 76) and tuple(picture[32, 15]) == (252, 213, 58)
    np.testing.assert_allclose(picture[32, 14].astype(int), (199.5, 199.0, 62.5), atol=0.5)
    assert picture[32, 50, 0] == 94 and picture[32, 50, 2] in (71, 72)  # 94.5 and 71.5, to even


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("ring", np.pi * (1.06**2 - 0.56**2)),
        ("square", 1.8**2 - 4 * CORNER),
        ("diamond", 2 * 1.15**2 - 4 * CORNER),
        ("cross", 4 * 1.08 * 0.74 - 0.74**2 - 8 * CORNER),
        # Steiner's formula: the triangle within, a strip along it, three corners.
        ("triangle", 1.09 * 1.88 + 0.06 * 2 * (np.hypot(1.09, 1.88) + 1.09) + np.pi * 0.06**2),
    ],
)
def test_areas_of_shapes(shape, area):
    """As geometry gives them."""
    share = coverage(shape, np.array([[0.5, 0.5, 0.4]]), 256)[0]
    assert share.mean() / 0.4**2 == pytest.approx(area, rel=2e-3)
    rows, columns = np.nonzero(share > 0.5)
    for places in (rows, columns):  # centred, and within the box
        assert abs(places.min() + places.max() - 255) <= 1
        assert places.max() - places.min() <= 2 * EXTENT * 0.4 * 256


@pytest.mark.parametrize("shape", grammar.SHAPES)
def test_larger_pictures_are_the_same_pictures(shape):
    spots = np.array([[0.41, 0.56, 0.19]])
    small, large = coverage(shape, spots, 64)[0], coverage(shape, spots, 256)[0]
    mean = large.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    assert np.abs(mean - small).max() < 0.3 and np.abs(mean - small).mean() < 0.003


def test_a_scene_is_a_function_of_seed_and_index(scenes):
    assert training_scene(0, 7) == scenes[7]
    assert training_scene(1, 7) != scenes[7]
    assert len({scene.placements for scene in scenes}) == len(scenes)
    assert np.array_equal(scenes[7].render(), render(scenes[:8])[7])


def test_scenes_stay_as_they_are():
    """Weights were trained on them."""
    assert [training_scene(0, index).caption for index in (0, 1, 2)] == [
        "a purple diamond to the left of an orange cross, and the background is blue",
        "a large white triangle against an orange background",
        "a yellow triangle at the top on a black background",
    ]
    assert RandomChoices(1, 2, 3).below(2**32) == 2625735159


def test_training_sees_nothing_that_is_held_out(scenes):
    assert not any(grammar.held_out(scene.description) for scene in scenes)
    assert {scene.template for scene in scenes} == set(range(grammar.NUM_TRAINED_TEMPLATES))


def test_training_sees_every_word(scenes):
    descriptions = [scene.description for scene in scenes]
    things = {thing for one in descriptions for thing in one.things}
    pairs = {(thing.colour, thing.shape) for thing in things}
    assert len(pairs) == len(grammar.COLOURS) * len(grammar.SHAPES) - 6
    assert {thing.size for thing in things} == {None, *grammar.SIZES}
    assert {one.background for one in descriptions} == {None, *grammar.COLOURS}
    assert {one.position for one in descriptions} == {None, *grammar.POSITIONS}
    assert {one.relation for one in descriptions} == {None, *grammar.RELATIONS}


def test_things_are_within_the_frame_and_apart(scenes):
    for scene in scenes:
        boxes = [
            (
                spot.x - EXTENT * spot.radius,
                spot.x + EXTENT * spot.radius,
                spot.y - EXTENT * spot.radius,
                spot.y + EXTENT * spot.radius,
            )
            for spot in scene.placements
        ]
        for box in boxes:
            assert min(box) >= MARGIN / SIZE - 1e-9 and max(box) <= 1 - MARGIN / SIZE + 1e-9
        if len(boxes) == 2:
            (l1, r1, t1, b1), (l2, r2, t2, b2) = boxes
            assert max(l1 - r2, l2 - r1, t1 - b2, t2 - b1) >= GAP / SIZE - 1e-9


def test_positions_and_relations_are_as_said(scenes):
    for scene in scenes:
        first, *others = scene.placements
        if cell := grammar.POSITIONS.get(scene.description.position):
            assert tuple(np.searchsorted((0.38, 0.62), (first.x, first.y))) == cell
        if others:
            right, down = grammar.RELATIONS[scene.description.relation]
            x, y = first.x - others[0].x, first.y - others[0].y
            assert x * right + y * down > 2 * abs(x * down + y * right)


def test_fewer_words():
    words = Words(("red", "blue"), ("circle", "square"), ("white",), pairs=0.0)
    scenes = [training_scene(0, index, words) for index in range(100)]
    assert {scene.background for scene in scenes} == {"white"}
    kinds = {(it.colour, it.shape) for scene in scenes for it in scene.description.things}
    assert kinds == set(itertools.product(("red", "blue"), ("circle", "square")))
    with pytest.raises(ValueError, match="must make scenes for training"):
        training_scene(0, 0, Words(("red",), ("circle",), ("red",)))


@pytest.mark.parametrize("numbers", [(-1, 0), (2**64, 0), (0, -1)])
def test_numbers_out_of_range(numbers):
    with pytest.raises(ValueError, match="whole numbers from 0"):
        training_scene(*numbers)


def test_batches():
    data = SceneData(seed=3)
    batch = data.batch(5, 4)
    assert batch["images"].shape == (4, 64, 64, 3) and batch["images"].dtype == np.float32
    assert batch["images"].min() >= -1 and batch["images"].max() <= 1
    scenes = data.scenes(5, 4)
    assert scenes[1] == training_scene(3, 21)
    np.testing.assert_allclose((batch["images"] + 1) * 127.5, render(scenes), atol=1e-4)
    assert batch["tokens"].shape == (4, MAX_LENGTH) and batch["tokens"].dtype == np.int32
    assert data.tokenizer.decode(batch["tokens"][1]).startswith(
        "<|startoftext|>" + scenes[1].caption.replace(",", " ,")
    )
    assert batch["index"].tolist() == [0, 1, 2, 3] and batch["index"].dtype == np.int32
    again = SceneData(seed=3).batch(5, 4)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    # A batch is cut from one sequence, whatever its size.
    halves = [SceneData(seed=3).batch(step, 2)["images"] for step in (10, 11)]
    assert np.array_equal(np.concatenate(halves), batch["images"])
    assert SceneData(image_size=96).batch(0, 1)["images"].shape == (1, 96, 96, 3)


def test_contrasts_follow_what_they_differ_from():
    plain, data = SceneData(seed=3), SceneData(seed=3, contrasts=True)
    scenes = data.scenes(0, 400)
    assert scenes[::2] == plain.scenes(0, 400)[::2]
    assert data.scenes(1, 2) == scenes[2:4]
    kinds = set()
    for one, other in zip(scenes[::2], scenes[1::2]):
        assert not grammar.held_out(other.description)
        assert other.background == one.background and other.template == one.template
        words, others = one.caption.split(), other.caption.split()
        if one.description.relation == other.description.relation is not None:
            assert other.description == one.description.swapped()
            kinds.add("colours")
            continue
        fields = ("things", "position", "relation")
        (field,) = (
            name
            for name in fields
            if getattr(one.description, name) != getattr(other.description, name)
        )
        kinds.add(field)
        if field == "things":
            (thing,), (changed,) = one.description.things, other.description.things
            assert thing.colour == changed.colour
            assert (thing.shape == changed.shape) != (thing.size == changed.size)
            kinds.add("shape" if thing.size == changed.size else "size")
        assert words != others
        assert len(set(words) ^ set(others)) <= 6
    assert kinds == {"colours", "things", "shape", "size", "position", "relation"}


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_to_evaluate_with(split):
    scenes = evaluation_scenes(split, 512)
    assert scenes == evaluation_scenes(split, 512) and scenes[:64] == evaluation_scenes(split, 64)
    assert scenes[0] != evaluation_scenes(split, 1, seed=1)[0]
    assert len({scene.description for scene in scenes}) == len(scenes) == 512
    assert sum(len(scene.description.things) for scene in scenes) == 768
    assert all(scene.description.background for scene in scenes)
    held_out = {grammar.held_out(scene.description) for scene in scenes}
    assert held_out == {split == "held-out pairs"}
    new_form = {scene.template >= grammar.NUM_TRAINED_TEMPLATES for scene in scenes}
    assert new_form == {split == "held-out templates"}


def test_what_cannot_be_evaluated():
    with pytest.raises(ValueError, match="'unseen'"):
        evaluation_scenes("unseen")
    with pytest.raises(ValueError, match="make 512 different descriptions"):
        evaluation_scenes("seen", 512, words=Words(("red",), ("circle",), ("blue",), pairs=0.0))


def test_each_word_is_one_token_and_every_caption_fits():
    tokenizer = scene_tokenizer()
    assert len(tokenizer.vocab) <= VOCABULARY_SIZE and tokenizer.max_length == MAX_LENGTH
    random, longest = RandomChoices(0, 0), 0
    for pairs in (0.0, 1.0):
        for _ in range(60):
            _, description = describe(random, Words(pairs=pairs))
            for template, wording in itertools.product(range(15), range(3)):
                caption = grammar.write(description, template, wording)
                ids = tokenizer.encode(caption)
                words = caption.replace(",", " ,").split()
                assert len(ids) == len(words) + 2 and tokenizer.unknown_id not in ids
                longest = max(longest, len(ids))
    assert longest == 21 <= MAX_LENGTH


def test_a_tokenizer_learnt_by_hand():
    """ "ab" is the most frequent pair, then "ab c"; the single "xy" comes last."""
    texts = ["abc abc abd", "xy"]
    tokenizer = learn_tokenizer(texts, 512, 8)
    assert tokenizer.merges[:2] == (("a", "b"), ("ab", "c</w>"))
    assert set(tokenizer.merges[2:]) == {("ab", "d</w>"), ("x", "y</w>")}
    assert tokenizer.vocab[-3] == UNKNOWN
    assert tokenizer.encode("abc")[1:-1] == [tokenizer.encoder["abc</w>"]]
    assert tokenizer.encode("é")[1:-1] == [tokenizer.unknown_id] * 2
    small = learn_tokenizer(texts, len(tokenizer.vocab) - 3, 8)
    assert small.merges == tokenizer.merges[:1]
    with pytest.raises(ValueError, match="139 or more"):
        learn_tokenizer(texts, 100, 8)


def test_the_tokenizer_is_saved_and_read(tmp_path):
    tokenizer = scene_tokenizer()
    tokenizer.save(tmp_path)
    again = SimpleTokenizer.from_folder(tmp_path)
    prompts = ["a small orange ring in the top left corner, 3 café", ""]
    assert np.array_equal(again.rows(prompts), tokenizer.rows(prompts))
    assert (again.max_length, again.pad_id, again.unknown_id) == (24, 279, 277)
