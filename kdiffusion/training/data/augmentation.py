"""Augmentation of images by keras-cv's layers, with random numbers that are known in advance."""

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
# While a layer runs, keras-cv swaps its operations for TensorFlow's in the whole process.
_LOCK = threading.Lock()


class Augmentation:
    """Layers that change each image by random numbers of its own.

    The layers of keras-cv and the preprocessing layers of Keras draw from states of their own.
    While an image is changed, one generator takes the place of all of them. It is seeded anew for
    each image, so the result depends on the caller's seed alone. keras-cv's layers run in
    TensorFlow on every backend, so their images are the same on all; those of Keras itself run in
    the backend.

    Images have values from 0 to 255: layers that ask for a `value_range` must be given
    `(0, 255)`. Of keras-cv 0.9 these cannot serve: `AugMix` and the noise of `RandomCutout`, whose
    random numbers cannot be set; `RandomJpegQuality`, which takes values from 0 to 1;
    `RandomAspectRatio`, which changes the size; and `MixUp`, `CutMix`, `FourierMix` and `Mosaic`,
    which mix images with others. A layer that cannot serve is refused when the augmentation is
    made.

    Args:
        layers: list of layers, such as `keras_cv.layers.RandomColorJitter`.
        height: int, of the images, in pixels.
        width: int, likewise.

    Raises:
        ValueError: If a layer's result is not an image of the same size, not finite or of another
            range, or differs when the same numbers are given twice.

    Example:

    ```python
    layers = [keras_cv.layers.RandomContrast(value_range=(0, 255), factor=0.2)]
    Augmentation(layers, 256, 256)(image, seed=42)
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

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        """Change an image.

        Args:
            image: (height, width, 3) float32 in [0, 1].
            seed: int from 0 to 2**63 - 1, of all random numbers.

        Returns:
            (height, width, 3) float32 in [0, 1].
        """
        changed = self._run(self._layers, 255.0 * image, seed)
        return np.clip(changed / 255.0, 0.0, 1.0)

    def _run(self, layers, image, seed):
        with _LOCK, tf.device("CPU"), self._in_place():
            self._generator.reset_from_seed(seed)
            for number, state in enumerate(self._states):
                state.state.assign([seed % 2**32, number])
            for layer in layers:
                image = layer(image, training=True)
            return np.asarray(image, np.float32)

    @contextlib.contextmanager
    def _in_place(self):
        """Let the layers draw from the common generator within a scope."""
        try:
            for part, name, _, new in self._replaced:
                setattr(part, name, new)
            yield
        finally:
            for part, name, old, _ in self._replaced:
                setattr(part, name, old)

    def _take_over(self, part):
        """Note the generators of a layer, and those to take their place."""
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
                f"{name} would compute in {layer.compute_dtype}, too coarse for images. Make it "
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
                "repeated. Leave it out, or use other layers."
            )

    def _attempt(self, layer, probe, seed):
        name = type(layer).__name__
        try:
            result = self._run([layer], probe, seed)
        # Layers raise errors of any kind for images that they are not made for.
        except Exception as error:
            raise ValueError(f"{name} cannot change a single image: {error}") from error
        if result.shape != probe.shape or not np.isfinite(result).all():
            raise ValueError(
                f"{name} must return an image of the same size, with finite values. "
                f"Received: shape {result.shape} for {probe.shape}"
            )
        if result.max() <= 1.0:
            raise ValueError(
                f"{name} must return values from 0 to 255. Received: a maximum of "
                f"{result.max():g}. Give it value_range=(0, 255) if it has one."
            )
        return result


class _Keyed(FactorSampler):
    """A sampler like another one that draws from the common generator."""

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
    """Yield the layers, those inside them, and those inside these."""
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
