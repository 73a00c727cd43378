"""Batches for training: the samples of a step follow from its number alone."""

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

# Purposes of random numbers; each has a stream of its own, keyed by the seed and the purpose.
_ORDER, _VIEW, _AUGMENTATION = range(3)

Arrays = dict[str, np.ndarray]


class Batches(Protocol):
    """Training data: a batch for each step, always the same one."""

    def batch(self, step: int, size: int) -> Arrays:
        """Return the batch of a step.

        Args:
            step: int, from 0.
            size: int, samples of a batch.

        Returns:
            Dictionary of arrays that lead with the batch axis, see `Data.batch`.
        """


class Data:
    """Samples in an order that is known in advance.

    The order of each epoch is a permutation drawn from (seed, epoch). A sample is cropped, flipped
    and augmented by numbers drawn from (seed, position), where positions count the samples of all
    epochs in a row. Nothing is remembered from one batch to the next, so a resumed run sees the
    batches of an uninterrupted one.

    An image that cannot be read is warned of once, with its file and the reason, and the next in
    the order takes its place.

    Args:
        source: sequence of samples: `ImageFolder`, `InMemory`, or any sequence of dictionaries with
            `image`, anything that `images.to_model` reads, and, if they have one, `caption`, a
            text, and `label`, the number of a class.
        preprocessing: `Preprocessing`, the size of the images and how they are cut.
        tokenizer: `SimpleTokenizer` for captions; `None` leaves them out. Captions longer than a
            row lose their end.
        augmentation: list of layers of keras-cv, see `Augmentation`.
        seed: int from 0 to 2**64 - 1.
        shuffle: bool; `False` takes the samples in their own order.
        workers: int, threads that read images.

    Attributes:
        broken: dictionary from the number of each sample that could not be read to the reason.

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
        self._permutation = functools.lru_cache(maxsize=2)(self._random_permutation)

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, step: int, size: int) -> Arrays:
        """Return the batch of a step; a pure function of its arguments.

        Args:
            step: int, from 0.
            size: int, samples of a batch. The samples of step n are those at the positions
                n * size to (n + 1) * size - 1 of all epochs in a row.

        Returns:
            Dictionary of `images`, (size, height, width, 3) float32 in [-1, 1]; `tokens`,
            (size, length) int32, if there are captions and a tokenizer; `label`, (size,) int32, if
            there are labels; `index`, (size,) int32, 0 to size - 1; and `sample`, (size,) int32,
            the numbers of the samples in the source.

        Raises:
            ValueError: If no sample can be read.
        """
        positions = range(step * size, (step + 1) * size)
        with ThreadPoolExecutor(min(self.workers, size)) as pool:
            found = list(pool.map(self._at, positions))
        numbers, samples = zip(*found)
        return {**self._collate(samples), "sample": np.array(numbers, np.int32)}

    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the number and the content of each sample of the source that can be read."""
        for index in range(len(self)):
            with self.reporting(index):
                yield index, self.source[index]

    @contextlib.contextmanager
    def reporting(self, index: int) -> Iterator[None]:
        """Turn an error within a scope into a warning that a sample is broken.

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

    def _at(self, position):
        """Return number and content of the sample at a position, or of the next whole one."""
        epoch, first = divmod(position, len(self))
        order = self._permutation(epoch)
        for later in range(len(order)):
            index = int(order[(first + later) % len(order)])
            if index not in self.broken:
                with self.reporting(index):
                    return index, self._sample(index, position)
        reason = next(iter(self.broken.values()))
        raise ValueError(f"None of the {len(self)} samples can be read. The first: {reason}")

    def _sample(self, index, position):
        return self.preparation.sample(self.source[index], position)

    def _collate(self, samples):
        return self.preparation.collate(samples)

    def _random_permutation(self, epoch):
        if not self.shuffle:
            return np.arange(len(self))
        # The raw stream is the same in every version of NumPy; its permutations are not.
        return np.argsort(_stream(self.seed, _ORDER, epoch).random_raw(len(self)), kind="stable")


class Preparation:
    """The preparation of samples for a batch.

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

    def sample(self, sample: Mapping[str, Any], position: int) -> dict[str, Any]:
        """Return the image in [-1, 1], and the caption and label as they came.

        Args:
            sample: dictionary of `image`, `caption`, `label`.
            position: int, of the sample among those of all epochs in a row.
        """
        image = to_unit(self.preprocessing(sample["image"], random_view(self.seed, position)))
        if self.augment is not None:
            raw = _stream(self.seed, _AUGMENTATION, position).random_raw()
            image = self.augment(image, int(raw) >> 1)
        prepared = {"images": 2.0 * image - 1.0}
        return prepared | {name: sample[name] for name in ("caption", "label") if name in sample}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Arrays:
        """Return the batch of some results of `sample`."""
        check_columns(samples)
        images = np.stack([sample["images"] for sample in samples])
        return {"images": images, **self.tokens(samples), **labels_and_index(samples)}

    def tokens(self, samples: Sequence[Mapping[str, Any]]) -> Arrays:
        """Return the tokens of captions; an empty dictionary without captions or a tokenizer."""
        if self.tokenizer is None or "caption" not in samples[0]:
            return {}
        captions = [sample["caption"] for sample in samples]
        return {"tokens": self.tokenizer.rows(captions, warn=False)}


class InMemory(Sequence):
    """Images in memory, as a sequence of samples.

    Args:
        images: (n, height, width, 3) array, uint8 or float from 0 to 1; or a list of anything that
            `images.to_model` reads.
        captions: list of n texts, or `None`.
        labels: n numbers of classes, or `None`.

    Raises:
        ValueError: If they differ in number.
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
    """A thread that makes the next batches while one is trained with.

    At most `depth` batches wait. `batch` raises the errors of the thread.

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
        """See `Data.batch`; quick if the last call was for the batch before this one."""
        wanted = [(step + ahead, size) for ahead in range(self.depth + 1)]
        for key in self._waiting.keys() - set(wanted):
            self._waiting.pop(key).cancel()
        for key in wanted:
            if key not in self._waiting:
                self._waiting[key] = self._thread.submit(self.data.batch, *key)
        return self._waiting.pop((step, size)).result()

    def close(self) -> None:
        """Stop the thread after its current batch."""
        self._waiting.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)


def random_view(seed: int, position: int) -> np.ndarray:
    """Draw three uniform numbers in [0, 1) for the crop and the flip of a sample.

    Args:
        seed: int, of the data.
        position: int, of the sample among those of all epochs in a row.
    """
    raw = _stream(seed, _VIEW, position).random_raw(3)
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
    """Return the index and the labels of a batch."""
    batch = {"index": np.arange(len(samples), dtype=np.int32)}
    if "label" in samples[0]:
        batch["label"] = np.array([sample["label"] for sample in samples], np.int32)
    return batch


def check_seed(seed: int) -> int:
    """Return a seed as an int; refuse one out of range."""
    whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**64:
        raise ValueError(f"`seed` must be a whole number from 0 to 2**64 - 1. Received: {seed!r}")
    return int(seed)


def _stream(seed, purpose, number):
    """Return Philox (Salmon et al. 2011) at the start of the numbers of (seed, purpose, number)."""
    return np.random.Philox(
        key=np.array([seed, purpose], np.uint64), counter=np.array([0, 0, number, 0], np.uint64)
    )
