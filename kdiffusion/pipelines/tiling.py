"""Decode large latents tile by tile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Latent cells. Up to 1024 x 1024 pixels a picture is decoded whole, which takes 3 GiB in float32.
MAX_CELLS = 128 * 128
TILE = 96
OVERLAP = 24


def decode_in_tiles(
    decode: Callable[[np.ndarray], np.ndarray],
    latents: np.ndarray,
    factor: int,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> np.ndarray:
    """Decode latents as overlapping tiles of one size, blended linearly where they overlap.

    The decoder normalizes over what it sees, so the result is close to that of a whole decode, not
    equal to it.

    Args:
        decode: function of (1, height, width, channels) latents to (1, factor * height,
            factor * width, 3) pictures.
        latents: (1, height, width, channels) float32.
        factor: int, pixels along one side of a latent cell.
        tile: int, side of a tile in cells.
        overlap: int, cells that neighbouring tiles share at least.

    Returns:
        (1, factor * height, factor * width, 3) float32.
    """
    _, height, width, _ = latents.shape
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    weight = _ramp(min(tile, height), overlap)[:, None] * _ramp(min(tile, width), overlap)
    weight = weight.repeat(factor, axis=0).repeat(factor, axis=1)[..., None]
    total = np.zeros((height * factor, width * factor, 1), np.float32)
    picture = np.zeros((height * factor, width * factor, 3), np.float32)
    for top in rows:
        for left in columns:
            part = decode(latents[:, top : top + tile, left : left + tile])[0]
            window = tuple(slice(start * factor, (start + tile) * factor) for start in (top, left))
            picture[window] += weight * part
            total[window] += weight
    return (picture / total)[None]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Spread the first cells of equal tiles evenly over `size` cells."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(tile: int, overlap: int) -> np.ndarray:
    """Return the weights along a side: rising over the overlap, then 1, then falling; never 0."""
    distance = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 1.0
    return np.minimum(distance / (overlap + 1.0), 1.0).astype(np.float32)
