"""The report: a perfect model, a blind one, one that swaps colours, one that remembers."""

import json

import numpy as np
import pytest

from kdiffusion.shapes.evaluation import (
    evaluate,
    evaluate_binding,
    markdown,
    nearest_training,
)
from kdiffusion.shapes.grammar import parse
from kdiffusion.shapes.scenes import RandomChoices, Scene, place, render, training_scene

TRAINED = 256


def scene_of(description, number=0):
    return Scene(
        description, description.background, place(description, RandomChoices(9, number, 9))
    )


def perfect(prompts):
    return render([scene_of(parse(prompt), n) for n, prompt in enumerate(prompts)])


def test_a_perfect_model():
    numbers = evaluate(perfect, 32, trained=TRAINED)
    assert json.loads(json.dumps(numbers)) == numbers
    rows = numbers["rows"]
    assert list(rows) == [
        "seen, one thing",
        "seen, two things",
        "held-out pairs, one thing",
        "held-out pairs, two things",
        "held-out templates, one thing",
        "held-out templates, two things",
        "all held out, one thing",
        "all held out, two things",
    ]
    assert [row["n"] for row in rows.values()] == [8] * 6 + [16] * 2
    assert all(row["all"] == 1.0 for row in rows.values())
    assert "size" in rows["seen, one thing"] and "relation" in rows["seen, two things"]
    assert all(row["all"] < 0.2 for row in numbers["shuffled"].values())
    assert numbers["binding"] == {"n": 4, "both": 1.0, "crossed": 0.0}
    nearest = numbers["nearest"]
    assert nearest["pictures"] == pytest.approx(nearest["new_scenes"], rel=0.3)


def test_the_table():
    shares = {"background": 1.0, "count": 0.5, "all": 0.25}
    numbers = {
        "rows": {"seen, one thing": {"n": 8} | shares},
        "shuffled": {"seen, one thing": {"n": 8, "all": 0.125}},
        "binding": {"n": 4, "both": 0.5, "crossed": 0.25},
        "nearest": {"n": 4096, "pictures": 20.0, "new_scenes": 21.0},
    }
    lines = markdown(numbers).splitlines()
    assert lines[2] == "| seen, one thing | 8 | 100.0 | 50.0 | – | – | – | – | – | 25.0 | 12.5 |"
    assert {line.count("|") for line in lines[:3]} == {12}
    assert "50.0% are right with their colours" in lines[4]


def test_a_model_that_ignores_its_prompt():
    picture = training_scene(0, 1).render()
    numbers = evaluate(lambda prompts: np.stack([picture] * len(prompts)), 16, trained=TRAINED)
    assert all(row["all"] <= 0.25 for row in numbers["rows"].values())
    assert numbers["binding"]["both"] == 0.0


def test_a_model_that_swaps_colours():
    def swapping(prompts):
        return render([scene_of(parse(prompt).swapped()) for prompt in prompts])

    assert evaluate_binding(swapping, 8) == {"n": 8, "both": 0.0, "crossed": 1.0}


def test_a_model_that_has_favourites():
    """Its first thing takes the colour that comes first: right for one prompt of each two."""

    def favouring(prompts):
        said = [parse(prompt) for prompt in prompts]
        ordered = [one.things[0].colour < one.things[1].colour for one in said]
        return render([scene_of(one if ok else one.swapped()) for one, ok in zip(said, ordered)])

    assert evaluate_binding(favouring, 8) == {"n": 8, "both": 0.0, "crossed": 0.5}


def test_a_model_that_remembers():
    scenes = [scene for n in range(40) if (scene := training_scene(0, n)).description.background]
    remembered = nearest_training(render(scenes[:16]), scenes[:16], trained=TRAINED)
    assert remembered["pictures"] < 1e-2 < 3 < remembered["new_scenes"]
    other = nearest_training(render(scenes[:16]), scenes[:16], training_seed=1, trained=TRAINED)
    assert other["pictures"] > 3


def test_what_is_refused():
    with pytest.raises(ValueError, match="8 or more"):
        evaluate(perfect, 4)
    with pytest.raises(ValueError, match="one image for each prompt"):
        evaluate(lambda prompts: perfect(prompts[:1]), 32)
