"""Batches for training: which samples a step sees follows from the step's number alone."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.images.reading import to_unit
from kdiffusion.text.tokenizer import SimpleTokenizer

# What random numbers are drawn for; with the seed they key a stream of their own.
_ORDER, _PICTURE, _AUGMENTATION = range(3)

Arrays = dict[str, np.ndarray]


class Batches(Protocol):
    """What trains: a batch for each step, and always the same one."""

    def batch(self, step: int, size: int) -> Arrays:
        """The batch of a step.

        Args:
            step: int, from 0.
            size: int, samples of a batch.

        Returns:
            Dictionary of arrays that lead with the batch axis, see `Data.batch`.
        """


class Data:
    """Samples in an order that is known in advance.

    The order of each epoch is a permutation drawn from (seed, epoch), and the sample at a place is
    cropped, flipped and augmented by numbers drawn from (seed, place). Nothing is remembered from
    one batch to the next, so a resumed run sees what an uninterrupted one would have seen.

    A picture that cannot be read is warned of once, with its file and the reason, and the next in
    the order takes its place.

    Args:
        source: sequence of samples: `ImageFolder`, `InMemory`, or any sequence of dictionaries with
            `image`, whatever `images.to_model` reads, and, if they have one, `caption`, a text,
            and `label`, the number of a class.
        preprocessing: `Preprocessing`, the size of the pictures and how they are cut.
        tokenizer: `SimpleTokenizer` for captions; `None` leaves them out. Captions longer than a
            row lose their end.
        augmentation: list of layers of keras-cv, see `Augmentation`.
        seed: int from 0 to 2**64 - 1.
        shuffle: bool; `False` takes the samples in their own order.
        workers: int, threads that read pictures.

    Attributes:
        broken: dict from the number of each sample that could not be read so far to the reason.

    Raises:
        ValueError: If there are no samples, or for an argument out of range.

    Example:

    ```python
    data = Data(ImageFolder("flowers"), Preprocessing(256, 256, flip=True), model.tokenizer)
    data.batch(step=0, size=8)["images"].shape  # (8, 256, 256, 3)
    ```
    """

    def __init__(
        self,
        source: Sequence[Mapping[str, Any]],
        preprocessing: Preprocessing,
        tokenizer: SimpleTokenizer | None = None,
        *,
        augmentation: Sequence[Any] = (),
        seed: int = 0,
        shuffle: bool = True,
        workers: int | None = None,
    ):
        if not len(source):
            raise ValueError("`source` must hold at least one sample. Received: an empty one")
        self.source = source
        self.seed = check_seed(seed)
        self.shuffle = shuffle
        self.broken: dict[int, str] = {}
        self.preparation = Preparation(preprocessing, tokenizer, augmentation, self.seed)
        self._lock = threading.Lock()
        self.workers = workers or min(4, os.cpu_count() or 1)
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, step: int, size: int) -> Arrays:
        """The batch of a step; a pure function of its arguments.

        Args:
            step: int, from 0.
            size: int, samples of a batch. The samples of step n are those at the places n * size to
                (n + 1) * size - 1 of all epochs in a row.

        Returns:
            Dictionary of `images`, (size, height, width, 3) float32 in [-1, 1]; `tokens`,
            (size, length) int32, if there are captions and a tokenizer; `label`, (size,) int32, if
            there are labels; `index`, (size,) int32, 0 to size - 1; and `sample`, (size,) int32,
            the numbers of the samples in the source.

        Raises:
            ValueError: If no sample can be read.
        """
        places = range(step * size, (step + 1) * size)
        with ThreadPoolExecutor(min(self.workers, size)) as pool:
            found = list(pool.map(self._at, places))
        numbers, samples = zip(*found)
        return {**self._collate(samples), "sample": np.array(numbers, np.int32)}

    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The samples as they come from the source, with their numbers, without broken ones."""
        for index in range(len(self)):
            with self.reporting(index):
                yield index, self.source[index]

    @contextlib.contextmanager
    def reporting(self, index: int) -> Iterator[None]:
        """A scope in which an error means that a sample is broken; it ends there, with a warning.

        Args:
            index: int, the sample's number.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            with self._lock:
                new = index not in self.broken
                self.broken[index] = str(error)
            if new:
                message = f"Sample {index} is left out, the next takes its place: {error}"
                warnings.warn(message, stacklevel=3)

    def _at(self, place):
        """Number and content of the sample at a place of the order, or of the next whole one."""
        epoch, position = divmod(place, len(self))
        order = self._permutation(epoch)
        for later in range(len(order)):
            index = int(order[(position + later) % len(order)])
            if index not in self.broken:
                with self.reporting(index):
                    return index, self._sample(index, place)
        reason = next(iter(self.broken.values()))
        raise ValueError(f"None of the {len(self)} samples can be read. The first: {reason}")

    def _sample(self, index, place):
        return self.preparation.sample(self.source[index], place)

    def _collate(self, samples):
        return self.preparation.collate(samples)

    def _draw_permutation(self, epoch):
        if not self.shuffle:
            return np.arange(len(self))
        # The raw stream is the same in every version of NumPy, which its permutations are not.
        return np.argsort(_stream(self.seed, _ORDER, epoch).random_raw(len(self)), kind="stable")


class Preparation:
    """What becomes of a sample on its way into a batch.

    Args:
        preprocessing, tokenizer, augmentation, seed: see `Data`.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        tokenizer: SimpleTokenizer | None,
        augmentation: Sequence[Any],
        seed: int,
    ):
        self.preprocessing = preprocessing
        self.tokenizer = tokenizer
        self.seed = seed
        self.augment: Callable | None = None
        if augmentation:
            from kdiffusion.training.data.augmentation import Augmentation

            height, width = preprocessing.height, preprocessing.width
            self.augment = Augmentation(augmentation, height, width)

    def sample(self, sample: Mapping[str, Any], place: int) -> dict[str, Any]:
        """The picture in [-1, 1], and the caption and label as they came.

        Args:
            sample: dictionary of `image`, `caption`, `label`.
            place: int, the sample's place among all that are ever drawn.
        """
        picture = to_unit(self.preprocessing(sample["image"], random_view(self.seed, place)))
        if self.augment is not None:
            raw = _stream(self.seed, _AUGMENTATION, place).random_raw()
            picture = self.augment(picture, int(raw) >> 1)
        prepared = {"images": 2.0 * picture - 1.0}
        return prepared | {name: sample[name] for name in ("caption", "label") if name in sample}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Arrays:
        """A batch of what `sample` returned."""
        check_columns(samples)
        images = np.stack([sample["images"] for sample in samples])
        return {"images": images, **self.tokens(samples), **labels_and_index(samples)}

    def tokens(self, samples: Sequence[Mapping[str, Any]]) -> Arrays:
        """The captions' part of a batch, empty without captions or a tokenizer."""
        if self.tokenizer is None or "caption" not in samples[0]:
            return {}
        captions = [sample["caption"] for sample in samples]
        return {"tokens": self.tokenizer.rows(captions, warn=False)}


class InMemory(Sequence):
    """Pictures in memory, as a sequence of samples.

    Args:
        images: (n, height, width, 3) array, uint8 or float from 0 to 1; or a list of whatever
            `images.to_model` reads.
        captions: list of n texts, or `None`.
        labels: n numbers of classes, or `None`.

    Raises:
        ValueError: If there are not as many of each.
    """

    def __init__(
        self,
        images: Sequence[Any] | np.ndarray,
        captions: Sequence[str] | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
    ):
        columns = {"image": images, "caption": captions, "label": labels}
        self._columns = {name: column for name, column in columns.items() if column is not None}
        lengths = {name: len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"There must be as many of each. Received: {lengths}")

    def __len__(self) -> int:
        return len(self._columns["image"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self._columns.items()}


class Prefetch:
    """Makes the next batches in a thread while one is trained with.

    At most `depth` batches wait; what goes wrong in the thread is raised by `batch`.

    Args:
        data: `Data` or any other `Batches`.
        depth: int, how many batches may wait.

    Example:

    ```python
    with Prefetch(data) as batches:
        Loop(trainer, optimizer, batches, "run", settings).run(1000)
    ```
    """

    def __init__(self, data: Batches, depth: int = 2):
        self.data = data
        self.depth = depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._waiting: dict[tuple[int, int], Future] = {}

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def batch(self, step: int, size: int) -> Arrays:
        """See `Data.batch`; quick if the batch before this one was the last that was asked for."""
        wanted = [(step + ahead, size) for ahead in range(self.depth + 1)]
        for key in self._waiting.keys() - set(wanted):
            self._waiting.pop(key).cancel()
        for key in wanted:
            if key not in self._waiting:
                self._waiting[key] = self._thread.submit(self.data.batch, *key)
        return self._waiting.pop((step, size)).result()

    def close(self) -> None:
        """Stop the thread, when it is done with the batch in hand."""
        self._waiting.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)


def random_view(seed: int, place: int) -> np.ndarray:
    """Three uniform numbers in [0, 1) for the crop and the flip of a sample.

    Args:
        seed: int, of the data.
        place: int, the sample's place among all that are ever drawn.
    """
    raw = _stream(seed, _PICTURE, place).random_raw(3)
    return (raw >> np.uint64(11)) * 2.0**-53


def check_columns(samples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a batch whose samples do not have the same parts."""
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise ValueError(
                "Either all samples have a caption, or a label, or none has. Received: one with "
                f"{sorted(sample)} after one with {sorted(samples[0])}"
            )


def labels_and_index(samples: Sequence[Mapping[str, Any]]) -> Arrays:
    """The parts of a batch that are whole numbers."""
    batch = {"index": np.arange(len(samples), dtype=np.int32)}
    if "label" in samples[0]:
        batch["label"] = np.array([sample["label"] for sample in samples], np.int32)
    return batch


def check_seed(seed: int) -> int:
    """Refuse what is no seed."""
    whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**64:
        raise ValueError(f"`seed` must be a whole number from 0 to 2**64 - 1. Received: {seed!r}")
    return int(seed)


def _stream(seed, purpose, number):
    """A bit generator of Salmon et al. 2011, set to where (seed, purpose, number) begins."""
    return np.random.Philox(
        key=np.array([seed, purpose], np.uint64), counter=np.array([0, 0, number, 0], np.uint64)
    )
