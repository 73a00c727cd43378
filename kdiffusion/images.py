"""Pictures as arrays."""

from __future__ import annotations

import numpy as np


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """The decoder's output as pixels, rounded.

    Args:
        pictures: float array of any shape, nominally in [-1, 1].

    Returns:
        uint8 array of the same shape.
    """
    pictures = np.clip(np.asarray(pictures, np.float32) * 0.5 + 0.5, 0.0, 1.0)
    return np.rint(pictures * 255.0).astype(np.uint8)


def check_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Refuse a picture size that the autoencoder cannot make; nothing is rounded silently.

    Args:
        height: int, in pixels.
        width: int, in pixels.
        multiple: int, the autoencoder's downsampling factor.

    Returns:
        Height and width as plain ints.

    Raises:
        ValueError: If one of them is not a positive multiple of `multiple`.
    """
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or value != int(value) or value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ValueError(
                f"`{name}` must be a positive multiple of {multiple}. Received: {name}={value}. "
                f"Use {nearest}."
            )
    return int(height), int(width)
