"""Augmentation of pictures by keras-cv's layers, with random numbers that are known in advance."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras_cv.core import FactorSampler, NormalFactorSampler, UniformFactorSampler

_NUM_TRIALS = 8
# keras-cv swaps its operations for TensorFlow's while a layer runs, for the whole process.
_LOCK = threading.Lock()


class Augmentation:
    """Layers that change each picture as its own random numbers tell.

    The layers of keras-cv and the preprocessing layers of Keras draw from states of their own.
    While a picture is changed one generator takes the place of all of them, and is set anew, so
    that what happens depends on a number that the caller gives and on nothing else. keras-cv's
    layers run in TensorFlow whatever the backend is, so their pictures are the same on all; those
    of Keras itself run in the backend.

    Pictures have values from 0 to 255: layers that ask for a `value_range` must be given
    `(0, 255)`. Of keras-cv 0.9 these cannot serve: `AugMix` and the noise of `RandomCutout`, which
    draw where nothing reaches them; `RandomJpegQuality`, which wants values from 0 to 1;
    `RandomAspectRatio`, which changes the size; and `MixUp`, `CutMix`, `FourierMix` and `Mosaic`,
    which mix pictures with others. What cannot serve is refused when the augmentation is made.

    Args:
        layers: list of layers, such as `keras_cv.layers.RandomColorJitter`.
        height: int, of the pictures, in pixels.
        width: int, likewise.

    Raises:
        ValueError: If a layer's result is not a picture of the same size, not finite or of another
            range, or differs when the same numbers are given twice.

    Example:

    ```python
    layers = [keras_cv.layers.RandomContrast(value_range=(0, 255), factor=0.2)]
    Augmentation(layers, 256, 256)(picture, seed=42)
    ```
    """

    def __init__(self, layers: Sequence[keras.layers.Layer], height: int, width: int):
        self._layers = list(layers)
        with tf.device("CPU"):
            self._generator = tf.random.Generator.from_seed(0, alg="philox")
        self._states: list[keras.random.SeedGenerator] = []
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # layer, attribute, old, new
        for part in _parts(self._layers):
            self._take_over(part)
        for layer in self._layers:
            self._try(layer, height, width)

    def __call__(self, picture: np.ndarray, seed: int) -> np.ndarray:
        """Change a picture.

        Args:
            picture: (height, width, 3) float32 in [0, 1].
            seed: int from 0 to 2**63 - 1, which decides all that is drawn.

        Returns:
            (height, width, 3) float32 in [0, 1].
        """
        changed = self._run(self._layers, 255.0 * picture, seed)
        return np.clip(changed / 255.0, 0.0, 1.0)

    def _run(self, layers, picture, seed):
        with _LOCK, tf.device("CPU"), self._in_place():
            self._generator.reset_from_seed(seed)
            for number, state in enumerate(self._states):
                state.state.assign([seed % 2**32, number])
            for layer in layers:
                picture = layer(picture, training=True)
            return np.asarray(picture, np.float32)

    @contextlib.contextmanager
    def _in_place(self):
        """A scope in which the layers draw from the common generator."""
        try:
            for part, name, _, new in self._replaced:
                setattr(part, name, new)
            yield
        finally:
            for part, name, old, _ in self._replaced:
                setattr(part, name, old)

    def _take_over(self, part):
        """Note what a layer draws from, and what is to take its place."""
        for name, value in list(vars(part).items()):
            if isinstance(value, (UniformFactorSampler, NormalFactorSampler)):
                keyed = _Keyed(value, self._generator)
                self._replaced.append((part, name, value, keyed))
            elif isinstance(value, tf.random.Generator):
                self._replaced.append((part, name, value, self._generator))
            elif isinstance(value, keras.random.SeedGenerator) and value not in self._states:
                self._states.append(value)

    def _try(self, layer, height, width):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"An augmentation is made of layers. Received: {layer!r:.80}")
        name = type(layer).__name__
        if layer.compute_dtype != "float32":
            raise ValueError(
                f"{name} would compute in {layer.compute_dtype}, too coarse for pictures. Make it "
                "with dtype='float32'."
            )
        probe = np.random.Generator(np.random.Philox(0)).uniform(0, 255, (height, width, 3))
        first, second = (
            [self._attempt(layer, probe.astype(np.float32), seed) for seed in range(_NUM_TRIALS)]
            for _ in range(2)
        )
        if not np.array_equal(first, second):
            raise ValueError(
                f"{name} draws random numbers that cannot be set, so that no run could be "
                "repeated. Leave it out, or write it with other layers."
            )

    def _attempt(self, layer, probe, seed):
        name = type(layer).__name__
        try:
            result = self._run([layer], probe, seed)
        # Layers answer pictures that they are not made for with whatever they stumble upon.
        except Exception as error:
            raise ValueError(f"{name} cannot change a single picture: {error}") from error
        if result.shape != probe.shape or not np.isfinite(result).all():
            raise ValueError(
                f"{name} must return a picture of the same size, with finite values. "
                f"Received: shape {result.shape} for {probe.shape}"
            )
        if result.max() <= 1.0:
            raise ValueError(
                f"{name} must return values from 0 to 255. Received: a maximum of "
                f"{result.max():g}. Give it value_range=(0, 255) if it has one."
            )
        return result


class _Keyed(FactorSampler):
    """Draws what another sampler would, from the common generator."""

    def __init__(self, sampler, generator):
        self.sampler = sampler
        self.generator = generator

    def __call__(self, shape=(), dtype="float32"):
        sampler = self.sampler
        if isinstance(sampler, UniformFactorSampler):
            return self.generator.uniform(shape, sampler.lower, sampler.upper, dtype)
        values = self.generator.normal(shape, sampler.mean, sampler.stddev, dtype)
        return tf.clip_by_value(values, sampler.min_value, sampler.max_value)

    def get_config(self):
        return {}


def _parts(layers) -> Iterator[Any]:
    """The layers, those inside them, and those inside these."""
    seen: set[int] = set()
    waiting = list(layers)
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, keras.layers.Layer):
            yield part
            waiting += list(vars(part).values())
        elif isinstance(part, (list, tuple)):
            waiting += list(part)
