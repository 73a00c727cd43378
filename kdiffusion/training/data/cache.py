"""Cached latents and text states, for training without encoders."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from kdiffusion import images
from kdiffusion.files import file_sha256, replacing
from kdiffusion.images.reading import to_unit
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.pipelines.latent import encode_pixels
from kdiffusion.pipelines.text import encode_tokens
from kdiffusion.runtime import programs
from kdiffusion.runtime.programs import Program
from kdiffusion.training.data.batches import (
    Arrays,
    Data,
    check_columns,
    labels_and_index,
    random_view,
)

_VERSION = 1  # of the files' content; another one makes other names

# NumPy parses the header of a file with `ast`, which sometimes fails in CPython 3.11 when two
# threads do so (github.com/python/cpython/issues/106905).
_parsing = threading.Lock()


class CachedData(Data):
    """Samples whose latents, text states or both come from files; `cached` makes it.

    Args:
        data: `Data`, whose order, source and preparation are used.
        latents: list with the file of each sample's latents, `None` for a broken sample; or `None`
            to read the images.
        contexts: dictionary from each caption to the file of its states; or `None` to return
            tokens.

    Attributes:
        empty_context: (tokens, width) float32, the states of the empty caption, which caption
            dropout puts in place of others; `None` if captions are not cached.
    """

    def __init__(
        self, data: Data, latents: list[Path | None] | None, contexts: dict[str, Path] | None
    ):
        preparation = data.preparation
        super().__init__(
            data.source,
            preparation.preprocessing,
            preparation.tokenizer,
            seed=data.seed,
            shuffle=data.shuffle,
            workers=data.workers,
        )
        self.preparation = preparation
        self.broken = data.broken
        self._latents = latents
        self._contexts = contexts
        self.empty_context = None if contexts is None else _load(contexts[""]).astype(np.float32)

    def batch(self, step: int, size: int) -> Arrays:
        """See `Data.batch`; cached values take the place of `images` and `tokens`.

        These are `mean` and `logvar`, (size, height, width, channels) float32, as `ImageEncoder`
        returns them, and `context`, (size, tokens, width) float32.
        """
        return super().batch(step, size)

    def _sample(self, index, position):
        sample = self.source[index]
        if self._latents is None:
            parts = self.preparation.sample(sample, position)
        else:
            parts = {name: sample[name] for name in ("caption", "label") if name in sample}
            flipped = (
                self.preparation.preprocessing.flip and random_view(self.seed, position)[2] < 0.5
            )
            moments = _load(self._latents[index])[int(flipped)]
            parts["mean"], parts["logvar"] = moments.astype(np.float32)
        if self._contexts is not None:
            parts["context"] = _load(self._contexts[parts.pop("caption")]).astype(np.float32)
        return parts

    def _collate(self, samples):
        check_columns(samples)
        names = samples[0].keys() & {"images", "mean", "logvar", "context"}
        batch = {name: np.stack([sample[name] for sample in samples]) for name in names}
        return {**batch, **self.preparation.tokens(samples), **labels_and_index(samples)}


def cached(
    data: Data,
    folder: str | os.PathLike,
    *,
    image_encoder: ArchitectureModel | None = None,
    text_encoder: ArchitectureModel | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], Any] | None = None,
) -> CachedData:
    """Compute the latents and text states that a folder lacks, and return data that reads them.

    Latents are kept as mean and log-variance, so training still samples them; both mirror images
    are kept if images are flipped. The name of a file is the hash of everything that its content
    depends on: the bytes of the image, its preprocessing, and the weights of the encoder. A change
    of any of them makes new files, and one folder may serve many runs. Files are whole or missing.

    Args:
        data: `Data`, with a tokenizer if captions are cached.
        folder: path of the cache, made if it is missing.
        image_encoder: `ImageEncoder`, or `None` to leave images as they are.
        text_encoder: `TextEncoder`, or `None` to leave tokens as they are.
        batch_size: int, images or captions that are encoded at a time.
        progress: function, called with the numbers of items that are done and that there are.

    Returns:
        A `CachedData`.

    Raises:
        ValueError: If images are cropped at random or augmented, which a cache would undo; if
            captions are to be cached and there is no tokenizer or no caption; or if an encoder
            returns NaN or infinity.

    Example:

    ```python
    data = Data(ImageFolder("flowers"), Preprocessing(512, 512, flip=True), model.tokenizer)
    data = cached(
        data, "cache", image_encoder=model.image_encoder, text_encoder=model.text_encoder
    )
    data.batch(0, 4)["mean"].shape  # (4, 64, 64, 4)
    ```
    """
    store = _Store(Path(folder), data.workers, batch_size, progress or (lambda done, total: None))
    contexts = None if text_encoder is None else _cache_contexts(data, text_encoder, store)
    latents = None if image_encoder is None else _cache_latents(data, image_encoder, store)
    return CachedData(data, latents, contexts)


class _Store:
    """The folder of cached files.

    Args:
        folder, batch_size, progress: see `cached`.
        workers: int, threads that hash and read.
    """

    def __init__(self, folder, workers, batch_size, progress):
        self.folder = folder
        self.workers = workers
        self.batch_size = batch_size
        self.progress = progress

    def path(self, *parts: str | bytes) -> Path:
        """Return the file whose content follows from these parts."""
        name = _digest([f"kdiffusion {_VERSION}", *parts])
        return self.folder / name[:2] / f"{name}.npy"

    def fill(
        self, count: int, path_of: Callable, load: Callable, encode: Callable
    ) -> list[Path | None]:
        """Write the files that are missing.

        Args:
            count: int, how many items there are.
            path_of: function from an item's number to its file, or to `None` for a broken one.
            load: function from an item's number to the encoder's input, or to `None`.
            encode: function from a batch of inputs to one array for each.

        Returns:
            The file of each item, or `None`.
        """
        paths: list[Path | None] = []
        with ThreadPoolExecutor(self.workers) as pool:
            for start in range(0, count, self.batch_size):
                chunk = range(start, min(start + self.batch_size, count))
                found = list(pool.map(path_of, chunk))
                paths += found
                missing = [n for n, path in zip(chunk, found) if path and not _is_whole(path)]
                loaded = zip(missing, pool.map(load, missing))
                whole = {paths[number]: value for number, value in loaded if value is not None}
                if whole:
                    self._write(whole, encode)
                self.progress(chunk.stop, count)
        return paths

    def _write(self, values, encode):
        inputs = list(values.values())
        padding = inputs[-1:] * (self.batch_size - len(inputs))  # one shape is compiled
        for path, array in zip(values, encode(np.stack(inputs + padding))):
            if not np.isfinite(array).all():
                raise ValueError(
                    "The encoder's result is NaN or infinite. Check its weights, or load it "
                    "with dtype='float32'."
                )
            _save(path, array)


def _cache_contexts(data, encoder, store):
    """Return the file of the states of each caption and of the empty caption."""
    tokenizer = data.preparation.tokenizer
    rows = [row for _, row in data.rows()]
    if tokenizer is None or not all("caption" in row for row in rows):
        raise ValueError(
            "Text states need captions and a tokenizer. Received: data with no "
            f"{'tokenizer' if tokenizer is None else 'captions'}"
        )
    captions = list(dict.fromkeys(["", *(row["caption"] for row in rows)]))
    program = Program(encode_tokens, programs.use_jit("auto"))
    weights = _weights_digest(encoder)

    def tokens(number):
        return tokenizer.rows(captions[number : number + 1], warn=False)[0]

    def path(number):
        return store.path("context", weights, tokens(number).tobytes())

    def encode(batch):
        return ops.convert_to_numpy(program(encoder, ops.convert_to_tensor(batch, "int32")))

    return dict(zip(captions, store.fill(len(captions), path, tokens, encode)))


def _cache_latents(data, encoder, store):
    """Return the file of each image's latents; those of broken ones are `None` or missing."""
    preprocessing = data.preparation.preprocessing
    augments = data.preparation.augment is not None
    if preprocessing.crop != "center" or augments:
        raise ValueError(
            "Latents are cached of one view of each image: use crop='center' and no augmentation, "
            f"or do not cache them. Received: crop={preprocessing.crop!r} and "
            f"{'some' if augments else 'no'} augmentation"
        )
    factor = encoder.architecture.downsampling
    images.check_size(preprocessing.height, preprocessing.width, factor)
    program = Program(encode_pixels, programs.use_jit("auto"))
    parts = ["latents", _weights_digest(encoder), repr(preprocessing)]

    def path(index):
        with data.reporting(index):
            return store.path(*parts, _image_digest(data.source[index]["image"], preprocessing))

    def pixels(index):
        with data.reporting(index):
            return 2.0 * to_unit(preprocessing(data.source[index]["image"])) - 1.0

    def encode(batch):
        views = [batch, batch[:, :, ::-1]] if preprocessing.flip else [batch]
        moments = [program(encoder, ops.convert_to_tensor(view)) for view in views]
        pairs = [[ops.convert_to_numpy(m[name]) for name in ("mean", "logvar")] for m in moments]
        return np.moveaxis(np.array(pairs), 2, 0)

    return store.fill(len(data), path, pixels, encode)


def _image_digest(image, preprocessing):
    """Return the digest of an image's file, or of its pixels if it is in memory."""
    if isinstance(image, (str, os.PathLike)):
        return bytes.fromhex(file_sha256(image))  # the form in the names of existing files
    pixels = preprocessing(image)
    return _digest([str(pixels.dtype), pixels.tobytes()])


def _weights_digest(model):
    parts: list[str | bytes] = [repr(model.architecture), model.compute_dtype]
    for variable in sorted(model.variables, key=lambda variable: variable.path):
        parts += [variable.path, ops.convert_to_numpy(variable.value).tobytes()]
    return _digest(parts)


def _digest(parts: Iterable[str | bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        # All hashes have one length, so different lists of parts have different digests.
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        _load(path)
    except (OSError, ValueError, EOFError):  # a power failure may leave a file cut short
        return False
    return True


def _load(path: Path) -> np.ndarray:
    """Map the array of a file into memory."""
    with _parsing:
        return np.load(path, mmap_mode="r")


def _save(path: Path, array: np.ndarray) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.save(file, np.ascontiguousarray(array))
