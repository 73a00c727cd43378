"""Batches: their order, what takes the place of broken pictures, and reading ahead."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from kdiffusion import SimpleTokenizer
from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.training.data.batches import Data, InMemory, Prefetch, random_view
from kdiffusion.training.data.folders import ImageFolder

# Of ten samples and the seed 0, by the raw stream of Philox.
FIRST_EPOCH = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
SECOND_EPOCH = [1, 9, 2, 8, 3, 5, 0, 4, 7, 6]


def numbered(count=10, **settings):
    """Make grey images whose level, caption and label are their number."""
    pictures = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3), np.uint8)
    captions = [str(number) for number in range(count)]
    source = InMemory(pictures, captions, np.arange(count))
    return Data(source, Preprocessing(4, 4), SimpleTokenizer.byte_level(), **settings)


def labels(data, steps, size=1):
    return np.concatenate([data.batch(step, size)["label"] for step in steps]).tolist()


def equal(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def test_a_batch_holds_what_trainers_expect():
    batch = numbered().batch(1, 3)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "images": ((3, 4, 4, 3), np.float32),
        "tokens": ((3, 77), np.int32),
        "label": ((3,), np.int32),
        "index": ((3,), np.int32),
        "sample": ((3,), np.int32),
    }
    assert batch["label"].tolist() == FIRST_EPOCH[3:6]
    assert batch["sample"].tolist() == FIRST_EPOCH[3:6]
    assert batch["index"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(
        batch["images"][:, 0, 0, 0], np.array(FIRST_EPOCH[3:6]) / 127.5 - 1.0, atol=1e-6
    )
    expected = SimpleTokenizer.byte_level().rows([str(n) for n in FIRST_EPOCH[3:6]])
    np.testing.assert_array_equal(batch["tokens"], expected)


def test_order_is_a_permutation_of_each_epoch():
    data = numbered()
    first, second, third = (labels(data, range(start, start + 10)) for start in (0, 10, 20))
    assert (first, second) == (FIRST_EPOCH, SECOND_EPOCH)
    assert sorted(third) == list(range(10)) and third not in (first, second)
    assert labels(numbered(seed=1), range(10)) not in (first, second, third)
    assert labels(numbered(shuffle=False), range(12)) == [*range(10), 0, 1]


def test_a_step_follows_from_its_number_alone():
    data = numbered()
    run = labels(data, range(7), 4)
    assert run == labels(data, range(28))
    assert run[:10] == FIRST_EPOCH
    resumed = numbered()
    assert labels(resumed, range(5, 7), 4) == run[20:]
    assert labels(resumed, (0, 3, 1), 4) == run[:4] + run[12:16] + run[4:8]
    assert equal(numbered(workers=1).batch(2, 4), numbered(workers=3).batch(2, 4))


def test_crops_and_flips_follow_from_the_place():
    picture = np.random.default_rng(0).integers(0, 256, (8, 40, 3), dtype=np.uint8)
    views = Preprocessing(8, 8, crop="random", flip=True)
    data = Data(InMemory([picture]), views, seed=3)
    batch = data.batch(0, 16)["images"]
    assert len(np.unique(batch, axis=0)) > 8
    assert equal(data.batch(3, 4), Data(InMemory([picture]), views, seed=3).batch(3, 4))
    assert not equal(data.batch(3, 4), Data(InMemory([picture]), views, seed=4).batch(3, 4))
    expected = views(picture, random_view(3, 13)) / np.float32(127.5) - 1.0
    np.testing.assert_allclose(data.batch(13, 1)["images"][0], expected, atol=1e-6)
    uniform = np.array([random_view(0, place) for place in range(2000)])
    assert abs(uniform.mean(axis=0) - 0.5).max() < 0.03
    assert abs(uniform.var(axis=0) - 1 / 12).max() < 0.005


@pytest.fixture
def folder(tmp_path):
    """Make ten images, of which 9 is damaged, 4 missing and 5 no image."""
    names = [f"{number}.png" for number in range(10)]
    for number, name in enumerate(names):
        Image.new("RGB", (4, 4), (number,) * 3).save(tmp_path / name)
    damaged = (tmp_path / "9.png").read_bytes()
    (tmp_path / "9.png").write_bytes(damaged[: len(damaged) // 2])
    (tmp_path / "4.png").unlink()
    (tmp_path / "5.png").write_text("<html></html>")
    rows = [{"file_name": name, "label": number} for number, name in enumerate(names)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_broken_pictures_are_told_once_and_the_next_takes_their_place(folder):
    data = Data(ImageFolder(folder), Preprocessing(4, 4))
    with pytest.warns(UserWarning) as told:
        run = labels(data, range(3), 10)
    # the orders above without 9, 5 and 4
    assert run[:10] == [0, 2, 1, 1, 8, 3, 3, 3, 6, 7]
    assert run[10:20] == [1, 2, 2, 8, 3, 0, 0, 7, 7, 6]
    messages = sorted(str(warning.message) for warning in told)
    assert len(messages) == 3
    for message, number, reason in zip(
        messages, (4, 5, 9), ("is not a file", "It is a web page", "damaged")
    ):
        assert message.startswith(f"Sample {number} is left out, the next takes its place: ")
        assert f"{number}.png" in message and reason in message
    assert sorted(data.broken) == [4, 5, 9]
    assert labels(data, range(2), 10) == run[:20]  # and no further warning
    with pytest.warns(UserWarning):
        assert labels(Data(ImageFolder(folder), Preprocessing(4, 4)), (1,), 10) == run[10:20]


def test_no_picture_can_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    data = Data(ImageFolder(tmp_path), Preprocessing(4, 4))
    with pytest.warns(UserWarning, match="The file is empty"):
        with pytest.raises(ValueError, match="None of the 1 samples.*The file is empty"):
            data.batch(0, 2)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="at least one sample"):
        Data([], Preprocessing(4, 4))
    for seed in (-1, 2**64, 1.5, True):
        with pytest.raises(ValueError, match="`seed` must be a whole number"):
            numbered(seed=seed)
    with pytest.raises(ValueError, match="as many of each.*'image': 2, 'label': 3"):
        InMemory(np.zeros((2, 4, 4, 3)), labels=[0, 1, 2])
    mixed = [{"image": np.zeros((4, 4, 3)), "label": 0}, {"image": np.zeros((4, 4, 3))}]
    with pytest.raises(ValueError, match="Either all samples"):
        Data(mixed, Preprocessing(4, 4)).batch(0, 2)


def test_captions_may_be_left_out_or_too_long():
    picture = np.zeros((4, 4, 3))
    samples = [{"image": picture, "caption": "word " * 1000}]
    assert "tokens" not in Data(samples, Preprocessing(4, 4)).batch(0, 1)
    data = Data(samples, Preprocessing(4, 4), SimpleTokenizer.byte_level(max_length=5))
    assert data.batch(0, 1)["tokens"].shape == (1, 5)


class Watched:
    """Data that counts its batches."""

    def __init__(self, data):
        self.data = data
        self.made = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def batch(self, step, size):
        self.made.append(step)
        self.may_go_on.wait()
        if step == 7:
            raise ValueError("step 7 is broken")
        return self.data.batch(step, size)


def test_prefetch_gives_the_same_batches_and_reads_no_further_than_its_depth():
    data, watched = numbered(), Watched(numbered())
    with Prefetch(watched, depth=2) as ahead:
        for step in (0, 1, 2, 5, 0):
            assert equal(ahead.batch(step, 2), data.batch(step, 2))
        assert not equal(ahead.batch(1, 3), data.batch(1, 2))
    assert max(watched.made) <= 5 + 2
    assert watched.made[:3] == [0, 1, 2]


def test_prefetch_raises_what_went_wrong_and_leaves_no_thread():
    threads = threading.active_count()
    with Prefetch(Watched(numbered()), depth=2) as ahead:
        ahead.batch(6, 2)
        with pytest.raises(ValueError, match="step 7 is broken"):
            ahead.batch(7, 2)
        assert len(ahead.batch(8, 2)["label"]) == 2
    assert threading.active_count() == threads
    watched = Watched(numbered())
    ahead = Prefetch(watched, depth=3)
    ahead.batch(0, 2)
    watched.may_go_on.clear()
    threading.Timer(0.05, watched.may_go_on.set).start()
    ahead.close()
    assert threading.active_count() <= threads + 1  # the timer
    assert len(watched.made) <= 3
    with pytest.raises(RuntimeError):
        ahead.batch(1, 2)
