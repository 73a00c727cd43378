"""Guidance: transforms of a prediction function into another.

A prediction function maps `(x, timestep)` to what the network returns. Guiding the raw prediction
equals guiding the denoised latents, because one is an affine function of the other that the two
halves share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

Predict = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Guidance:
    """Options of guidance beyond its scale.

    Args:
        rescale: float in [0, 1], how far the guided prediction is brought back to the standard
            deviation of the text-conditional one (Lin et al. 2023, eq. 15 and 16); 0 is off.
        interval: pair of shares of the run, `0 <= start < stop <= 1`. Steps outside are not
            guided and take half the time (Kynkäänniemi et al. 2024).

    Raises:
        ValueError: If a value is out of range.

    Example:

    ```python
    model.text_to_image("a lighthouse", guidance=Guidance(rescale=0.7, interval=(0.1, 0.8)))
    ```
    """

    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        object.__setattr__(self, "interval", tuple(self.interval))
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(
                f"`rescale` must be between 0 (off) and 1. Received: rescale={self.rescale!r}"
            )
        if len(self.interval) != 2 or not 0.0 <= self.interval[0] < self.interval[1] <= 1.0:
            raise ValueError(
                "`interval` must be two shares of the run, 0 <= start < stop <= 1. "
                f"Received: interval={self.interval!r}"
            )

    def row_scales(self, steps: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Return the guidance scale of every row and image; 1, which is off, outside the interval.

        Args:
            steps: (rows, batch) int, the step that each row belongs to, -1 where an image is done.
            scales: (batch,) float, the guidance scale of each image.

        Returns:
            (rows, batch) float32.
        """
        share = steps / (steps.max(axis=0) + 1)
        start, stop = self.interval
        return np.where((share >= start) & (share < stop), scales, 1.0).astype(np.float32)


def classifier_free(predict: Predict, scale: Any, rescale: Any) -> Predict:
    """Guide without a classifier, in one network call of twice the batch (Ho & Salimans 2022).

    Args:
        predict: prediction function that takes x once and returns twice the batch, the negative
            half first.
        scale: (batch,) float32; negative + scale * (positive - negative).
        rescale: (batch,) float32, see `Guidance`.

    Returns:
        A prediction function of the undoubled batch.
    """
    scale, rescale = per_image(scale), per_image(rescale)

    def guided(x, timestep):
        negative, positive = ops.split(predict(x, timestep), 2)
        prediction = negative + scale * (positive - negative)
        ratio = _deviation(positive) / _deviation(prediction)
        return prediction * ops.where(rescale > 0.0, 1.0 + rescale * (ratio - 1.0), 1.0)

    return guided


def per_image(values: Any) -> Any:
    """Reshape (batch,) values to (batch, 1, 1, 1), to be combined with images or latents."""
    return ops.reshape(values, (-1, 1, 1, 1))


def _deviation(x):
    return ops.std(x, axis=(1, 2, 3), keepdims=True)
