"""One row of the table of `inputs.py`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """A call, and what must come of it: a picture like that of another call, or an error.

    Args:
        name: what the table calls it.
        expected: likewise.
        draw: returns an array.
        error: pattern of the message of a `ValueError`.
        warning: pattern of the only warning.
        like: returns the array that is expected; `None` if there is nothing to compare with.
        unlike: returns the array that a mistake would give.
        bar: largest difference from `like`.
        near: whether it is enough to be a quarter as far from `like` as from `unlike`, on average.
        seconds: how long it may take.
    """

    name: str
    expected: str
    draw: Callable[[], np.ndarray]
    error: str = ""
    warning: str = ""
    like: Callable[[], np.ndarray] | None = None
    unlike: Callable[[], np.ndarray] | None = None
    bar: float = 0.0
    near: bool = False
    seconds: float = np.inf
