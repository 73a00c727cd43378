"""Batches from a `tf.data.Dataset`, such as those of TensorFlow Datasets."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.training.data.batches import Arrays, Preparation, check_seed

_COLUMNS = {"image": "image", "caption": "caption", "label": "label"}


class Stream:
    """The elements of a `tf.data.Dataset`, one after the other and from the start again.

    The dataset keeps its own order, so a run is repeatable only if the dataset is: shuffle with a
    seed and `reshuffle_each_iteration=False`, and read files in a fixed order. To begin at a later
    step the dataset is skipped through, which takes as long as reading it.

    An image that cannot be read is warned of once, and the next one of its batch takes its place.

    Args:
        dataset: `tf.data.Dataset` of dictionaries, not batched, with images of shape
            (height, width, channels), uint8 or float from 0 to 1, of any size.
        preprocessing, tokenizer, augmentation, seed: see `Data`.
        columns: dictionary from `image`, `caption` and `label` to their names in the dataset,
            where these differ: `{"caption": "text"}`.

    Raises:
        ValueError: If the elements are no dictionaries or hold no image, or there are none.

    Example:

    ```python
    flowers = tfds.load("oxford_flowers102", split="train")
    data = Stream(flowers, Preprocessing(64, 64))
    data.batch(step=0, size=8)["label"].shape  # (8,)
    ```
    """

    def __init__(
        self,
        dataset: Any,
        preprocessing: Preprocessing,
        tokenizer: SimpleTokenizer | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        augmentation: Sequence[Any] = (),
        seed: int = 0,
    ):
        unknown = sorted(set(columns or ()) - set(_COLUMNS))
        if unknown:
            raise ValueError(f"`columns` may name {list(_COLUMNS)}. Received: {unknown}")
        self.columns = {**_COLUMNS, **(columns or {})}
        self.broken: dict[int, str] = {}
        self.preparation = Preparation(preprocessing, tokenizer, augmentation, check_seed(seed))
        self._length = max(int(dataset.cardinality()), 0)  # negative: infinite or unknown
        self._dataset = dataset.repeat()
        self._check_structure(dataset.element_spec)
        self._check_order()
        self._elements: Any = iter(())
        self._position = -1

    def batch(self, step: int, size: int) -> Arrays:
        """Return the batch of a step; see `Data.batch`."""
        if self._position != step * size:
            self._elements = self._dataset.skip(step * size).as_numpy_iterator()
        positions = range(step * size, (step + 1) * size)
        self._position = -1  # after an error of the dataset it starts anew
        elements = list(itertools.islice(self._elements, size))
        self._position = positions.stop
        samples = [self._sample(*pair) for pair in zip(elements, positions)]
        return self.preparation.collate(_filled(samples, self.broken))

    def _sample(self, element, position):
        """Return a prepared sample, or `None` for a broken one."""
        sample = {name: element[key] for name, key in self.columns.items() if key in element}
        if isinstance(sample.get("caption"), bytes):
            sample["caption"] = sample["caption"].decode(errors="replace")
        try:
            return self.preparation.sample(sample, position)
        except (ValueError, OSError) as error:
            number = position % self._length if self._length else position
            if number not in self.broken:
                warnings.warn(
                    f"Element {number} is left out, the next one takes its place: {error}",
                    stacklevel=2,
                )
            self.broken[number] = str(error)
            return None

    def _check_structure(self, spec):
        if not isinstance(spec, Mapping) or self.columns["image"] not in spec:
            found = sorted(spec) if isinstance(spec, Mapping) else type(spec).__name__
            raise ValueError(
                f"The dataset's elements must be dictionaries with {self.columns['image']!r}. "
                f"Received: {found}. Name its columns with `columns`, or map it."
            )

    def _check_order(self):
        first: Any = next(self._dataset.as_numpy_iterator(), None)
        again: Any = next(self._dataset.as_numpy_iterator(), None)
        if first is None:
            raise ValueError("The dataset holds no elements.")
        names = first.keys() & set(self.columns.values())
        if not all(np.array_equal(first[name], again[name]) for name in names):
            raise ValueError(
                "The dataset begins with another element each time it is read, so that no run "
                "could be resumed. Shuffle it with a seed and reshuffle_each_iteration=False."
            )


def _filled(samples, broken):
    """Return the samples, with the next whole one in place of each broken one."""
    if not any(samples):
        reason = list(broken.values())[-1]
        raise ValueError(f"No element of a batch can be read. The last: {reason}")
    twice = [*samples, *samples]
    return [next(filter(None, twice[start:])) for start in range(len(samples))]
