"""Large feature maps: in one pass over memory, or part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kdiffusion.runtime import tracing


class Elementwise(NamedTuple):
    """An elementwise function, for a whole feature map or any part of it.

    XLA makes one pass over memory of a chain of elementwise operations; a plain TensorFlow graph
    makes one of each operation. A call is one pass everywhere.

    Args:
        function: function `(x, *arguments) -> x` at the top level of a module.
        arguments: tuple of tensors that broadcast to any part.
    """

    function: Callable
    arguments: tuple[Any, ...]

    def __call__(self, x):
        return tracing.fuse(self.function)(x, *self.arguments)


def num_parts(length: int, size: int, limit: int) -> int:
    """Return the least number of equal parts of which none is above a limit.

    Args:
        length: int, what is split, such as the rows of a feature map.
        size: int, bytes of the whole.
        limit: int, bytes of a part.

    Returns:
        A divisor of `length`: `length` itself where no divisor is large enough.
    """
    least = max(-(-size // limit), 1)
    return next((n for n in range(least, length) if length % n == 0), length)
