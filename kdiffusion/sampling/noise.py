"""Unit noise from a seed, value for value the streams that PyTorch draws on a CPU and on a GPU.

A seed then gives the start that diffusers and ComfyUI ("cpu") or AUTOMATIC1111 ("cuda") give it.
Uniforms and angles are float32, as in PyTorch. Log, sqrt, sin and cos are float64 and rounded
once, so that every machine draws the same values.
"""

from __future__ import annotations

import abc
import math
import operator
from collections.abc import Sequence

import numpy as np

_TWO_PI = np.float32(2.0 * math.pi)


class NoiseStream(abc.ABC):
    """A stream of unit normal noise of one image; each draw continues where the last one ended.

    A stream is mutable, and an image depends on the order in which it is read: first what the
    start of a run needs (samples of encoded images, then the start noise), then the fresh noise of
    each row of the sampler's table, in order. Make a new stream for each image that is generated.

    Args:
        seed: int, 0 to 2**64 - 1.
    """

    def draw(self, height: int, width: int, channels: int) -> np.ndarray:
        """Draw the noise of one image, `(height, width, channels)` float32.

        It is drawn with channels first, as the reference implementations lay their latents out.
        """
        return np.ascontiguousarray(self.normal((channels, height, width)).transpose(1, 2, 0))

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """Draw float32 noise of any shape, filled in C order as `torch.randn` fills it."""
        shape = tuple(shape)
        return self._values(math.prod(shape)).reshape(shape)

    @abc.abstractmethod
    def _values(self, count: int) -> np.ndarray:
        """Return the next `count` numbers of the stream, float32."""


def noise_stream(seed: int, kind: str = "cpu") -> NoiseStream:
    """Return the noise stream of a seed.

    Args:
        seed: int, -2**63 to 2**64 - 1; a negative one is the seed `2**64 + seed`, as in PyTorch.
        kind: `"cpu"`, the stream of PyTorch's CPU generator, or `"cuda"`, that of its GPU
            generator.

    Returns:
        `NoiseStream`.

    Raises:
        ValueError: If the seed is out of range or the kind unknown.

    Example:

    >>> noise_stream(0).draw(64, 64, 4)[0, :2, 0]
    array([-1.1258398, -1.1523602], dtype=float32)
    """
    if kind not in _STREAMS:
        raise ValueError(f"Unknown noise. Received: {kind!r}. Use one of {sorted(_STREAMS)}.")
    try:
        number = operator.index(seed)
    except TypeError:
        number = None
    if number is None or not -(2**63) <= number < 2**64:
        raise ValueError(
            f"`seed` must be a whole number from -2**63 to 2**64 - 1. Received: seed={seed!r}. "
            "Use an int such as 42."
        )
    return _STREAMS[kind](number % 2**64)


class _CpuStream(NoiseStream):
    """MT19937 with PyTorch's two Box-Muller layouts: one from 16 values on, one for fewer."""

    def __init__(self, seed):
        # PyTorch's engine takes the low 32 bits of the seed.
        self._words = np.random.RandomState(seed % 2**32)
        self._cached = None

    def _values(self, count):
        if count < 16:
            return np.array([self._value() for _ in range(count)], np.float32)
        uniforms = self._uniforms(count)
        values = np.empty(count, np.float32)
        whole = count - count % 16
        values[:whole] = _blocks_of_16(uniforms[:whole])
        if whole < count:
            values[-16:] = _blocks_of_16(self._uniforms(16))
        return values

    def _uniforms(self, count):
        words = self._words.randint(0, 2**32, count, np.uint32)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _value(self):
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        high, low = self._words.randint(0, 2**32, (2, 2), np.uint32).astype(np.uint64).T
        first, second = ((high << 32 | low) & (2**53 - 1)) * 2.0**-53
        radius, angle = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
        self._cached = radius * math.sin(angle)
        return radius * math.cos(angle)


class _CudaStream(NoiseStream):
    """Philox4x32 with 10 rounds (Salmon et al. 2011): draw `d`, value `i` is counter (d, 0, i, 0).

    A GPU draws the same values up to as many as it has threads, so draw image by image.
    """

    def __init__(self, seed):
        self._key = seed % 2**32, seed >> 32
        self._draws = 0

    def _values(self, count):
        index, zero = np.arange(count, dtype=np.uint32), np.zeros(count, np.uint32)
        counter = (np.full(count, self._draws, np.uint32), zero, index, zero)
        self._draws += 1
        uniform, turn = (
            word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
            for word in _philox(counter, self._key)[:2]
        )
        return _polar(uniform, turn, np.sin)


_STREAMS = {"cpu": _CpuStream, "cuda": _CudaStream}


def _blocks_of_16(uniforms):
    blocks = uniforms.reshape(-1, 2, 8)
    uniform, turn = np.float32(1.0) - blocks[:, 0], blocks[:, 1]
    pair = _polar(uniform, turn, np.cos), _polar(uniform, turn, np.sin)
    return np.stack(pair, axis=1).reshape(-1)


def _polar(uniform, turn, wave):
    """Return one of the two normals of two uniforms (Box & Muller 1958)."""
    angle = (_TWO_PI * turn).astype(np.float64)
    return (np.sqrt(-2.0 * np.log(uniform.astype(np.float64))) * wave(angle)).astype(np.float32)


def _philox(counter, key):
    """Return the four uint32 words of each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0.astype(np.uint64) * 0xD2511F53, c2.astype(np.uint64) * 0xCD9E8D57
        c0, c1, c2, c3 = (
            _high(second) ^ c1 ^ np.uint32(k0),
            _low(second),
            (_high(first) ^ c3 ^ np.uint32(k1)),
            _low(first),
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def _high(product):
    return (product >> 32).astype(np.uint32)


def _low(product):
    return product.astype(np.uint32)
