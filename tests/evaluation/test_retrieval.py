"""Retrieval and zero-shot accuracy, by hand."""

import numpy as np
import pytest

from kdiffusion.evaluation.retrieval import (
    class_vectors,
    recall_at,
    retrieval,
    zero_shot,
)

RIGHT = np.eye(3, dtype=bool)
# Query 0 finds its own first, query 1 second, query 2 third.
SCORES = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.3], [0.3, 0.4, 0.2]])


def degrees(*angles):
    return np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)


@pytest.mark.parametrize("k, share", [(1, 1 / 3), (2, 2 / 3), (3, 1), (10, 1)])
def test_recall(k, share):
    assert recall_at(k, SCORES, RIGHT) == pytest.approx(share)


@pytest.mark.parametrize("value", [0.5, 0.0, np.nan])
def test_a_model_that_says_the_same_of_everything_finds_nothing(value):
    assert recall_at(2, np.full((3, 3), value), RIGHT) == 0


def test_the_best_of_several_right_answers_counts():
    relevant = np.array([[False, True, True]])
    assert recall_at(1, np.array([[0.5, 0.1, 0.9]]), relevant) == 1
    assert recall_at(1, np.array([[0.95, 0.1, 0.9]]), relevant) == 0


def test_a_query_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="none for query 1"):
        recall_at(1, SCORES, np.array([[True] * 3, [False] * 3, [True] * 3]))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shapes \(3, 3\) and \(3, 2\)"):
        recall_at(1, SCORES, RIGHT[:, :2])


def test_retrieval_in_both_directions():
    # Both pictures are nearer to the caption at 10 degrees; the one at 100 is nearer to the second.
    found = retrieval(degrees(0, 50), degrees(10, 100), ["a", "b"], ks=(1, 2))
    assert found == {
        "image_to_text@1": 0.5,
        "image_to_text@2": 1.0,
        "text_to_image@1": 1.0,
        "text_to_image@2": 1.0,
    }


def test_equal_captions_are_one_candidate_and_one_query():
    images, texts = degrees(0, 40, 90), degrees(10, 10, 100)
    found = retrieval(images, texts, ["dog", "dog", "cat"], ks=(1, 2))
    assert found == {
        "image_to_text@1": 1.0,
        "image_to_text@2": 1.0,
        "text_to_image@1": 1.0,
        "text_to_image@2": 1.0,
    }
    # As three different captions, the first two tie with each other.
    assert retrieval(images, texts, ["a", "b", "cat"], ks=(1,))["image_to_text@1"] == 1 / 3


def test_copies_of_a_wrong_caption_do_not_fill_the_list():
    texts = degrees(10, 10, 10, 60)
    found = retrieval(degrees(0, 0, 0, 20), texts, [7, 7, 7, 8], ks=(2,))
    assert found["image_to_text@2"] == 1.0


def test_rows_of_tokens_tell_captions_apart():
    rows = np.array([[1, 2], [1, 2], [1, 3]])
    by_rows = retrieval(degrees(0, 40, 90), degrees(10, 10, 100), rows)
    assert by_rows == retrieval(degrees(0, 40, 90), degrees(10, 10, 100), ["a", "a", "b"])


def test_every_picture_needs_a_caption():
    with pytest.raises(ValueError, match="2, 2 and 1"):
        retrieval(degrees(0, 1), degrees(0, 1), ["a"])


def test_class_vectors_are_means_of_prompts():
    angles = {"a cat": 0, "one cat": 90, "a dog": 200, "one dog": 200}
    asked = []

    def encode(texts):
        asked.extend(texts)
        return degrees(*(angles[text] for text in texts))

    vectors = class_vectors(encode, ["cat", "dog"], ["a {}", "one {}"])
    np.testing.assert_allclose(vectors, degrees(45, 200), atol=1e-6)
    assert asked == ["a cat", "one cat", "a dog", "one dog"]


@pytest.mark.parametrize("templates", ["a {}", [], ["a photo"]])
def test_templates_need_a_place_for_the_name(templates):
    with pytest.raises(ValueError, match="where the name of a class stands"):
        class_vectors(lambda texts: np.zeros((len(texts), 2)), ["cat"], templates)


def test_zero_shot():
    images = degrees(5, 85, 80)
    found = zero_shot(images, degrees(0, 90, 180), [0, 1, 0], ks=(1, 2))
    assert found == {"top-1": pytest.approx(2 / 3), "top-2": 1.0}


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [[0], [1], [0]]])
def test_labels_must_be_classes(labels):
    with pytest.raises(ValueError, match="from 0 to 1 for each of the 3 images"):
        zero_shot(degrees(0, 1, 2), degrees(0, 90), labels)
