"""Batches from `tf.data.Dataset`s."""

import numpy as np
import pytest
import tensorflow as tf

from kdiffusion import SimpleTokenizer
from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.training.data.streams import Stream

SIX_BY_FOUR = np.ones((6, 4, 3), np.uint8)


def numbered(count=10, **more):
    rows = [{"label": n, "text": f"eine Blüte, {n}"} | more for n in range(count)]
    images = [n % 256 * SIX_BY_FOUR for n in range(count)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return tf.data.Dataset.from_tensor_slices({"image": images, **columns})


def labels(data, steps, size=4):
    return np.concatenate([data.batch(step, size)["label"] for step in steps]).tolist()


def test_elements_become_batches():
    tokenizer = SimpleTokenizer.byte_level()
    data = Stream(numbered(), Preprocessing(4, 4), tokenizer, columns={"caption": "text"})
    batch = data.batch(1, 3)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "images": ((3, 4, 4, 3), np.float32),
        "tokens": ((3, 77), np.int32),
        "label": ((3,), np.int32),
        "index": ((3,), np.int32),
    }
    assert batch["label"].tolist() == [3, 4, 5]
    np.testing.assert_allclose(batch["images"][:, 0, 0, 0], np.arange(3, 6) / 127.5 - 1, atol=1e-6)
    expected = tokenizer.rows([f"eine Blüte, {n}" for n in (3, 4, 5)])
    np.testing.assert_array_equal(batch["tokens"], expected)


def test_a_later_step_is_found_by_skipping():
    shuffled = numbered().shuffle(10, seed=3, reshuffle_each_iteration=False)
    run = labels(Stream(shuffled, Preprocessing(4, 4)), range(6))
    assert sorted(run[:10]) == list(range(10)) != run[:10]
    assert run[10:20] == run[:10]
    data = Stream(shuffled, Preprocessing(4, 4))
    assert labels(data, (4, 5, 2)) == run[16:24] + run[8:12]
    assert labels(Stream(numbered().repeat(), Preprocessing(4, 4)), range(3)) == [*range(10), 0, 1]


def test_pictures_may_differ_in_size():
    def generate():
        for side in (4, 7, 9):
            yield {"image": np.full((side, side + 1, 1), side / 10, np.float32)}

    spec = {"image": tf.TensorSpec((None, None, 1), tf.float32)}
    dataset = tf.data.Dataset.from_generator(generate, output_signature=spec)
    levels = Stream(dataset, Preprocessing(4, 4)).batch(0, 4)["images"][:, 0, 0, 0]
    np.testing.assert_allclose(levels, [-0.2, 0.4, 0.8, -0.2], atol=1e-6)


def test_broken_pictures_are_told_once_and_the_next_takes_their_place():
    levels = np.array([0.0, 7.0, 0.5, np.nan], np.float32)
    images = np.ones((4, 4, 4, 3), np.float32) * levels[:, None, None, None]
    dataset = tf.data.Dataset.from_tensor_slices({"image": images, "label": [0, 1, 2, 3]})
    data = Stream(dataset, Preprocessing(4, 4))
    with pytest.warns(UserWarning) as told:
        assert labels(data, range(3)) == [0, 2, 2, 0] * 3
    messages = [str(warning.message) for warning in told]
    assert len(messages) == 2
    assert messages[0].startswith("Element 1 is left out, the next one takes its place: ")
    assert sorted(data.broken) == [1, 3]
    with pytest.raises(ValueError, match="No element of a batch can be read"):
        data.batch(1, 1)


def test_datasets_that_cannot_serve():
    size = Preprocessing(4, 4)
    with pytest.raises(ValueError, match=r"dictionaries with 'picture'. Received: \['image'"):
        Stream(numbered(), size, columns={"image": "picture"})
    with pytest.raises(ValueError, match="`columns` may name.*'text'"):
        Stream(numbered(), size, columns={"text": "caption"})
    with pytest.raises(ValueError, match="dictionaries with 'image'. Received: TensorSpec"):
        Stream(tf.data.Dataset.range(3), size)
    with pytest.raises(ValueError, match="holds no elements"):
        Stream(numbered().take(0), size)
    with pytest.raises(ValueError, match="begins with another element each time"):
        Stream(numbered(1000).shuffle(1000), size)
    with pytest.warns(UserWarning, match="One image was expected"):
        with pytest.raises(ValueError, match="One image was expected. Received: a batch of 5"):
            Stream(numbered().batch(5), size).batch(0, 2)
