"""A file, or several, and what must come of opening it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from weights_conversion import open_checkpoint


def read_all(path):
    """Opens a checkpoint and reads every tensor; gives the arrays by name."""
    checkpoint = open_checkpoint(path)
    return {name: checkpoint[name] for name in checkpoint}


class Case(NamedTuple):
    """One row of the corpus.

    Attributes:
        number: of the list of threats that the corpus answers; "valid" of odd but sound files.
        name: what is odd about it.
        content: the file's bytes, or a function that is given a folder, writes into it what it
            needs, and returns the path to open.
        error: the class that must be raised (or a subclass), None if it must load.
        message: words that must stand in the error's message.
        expected: arrays that must be read, exactly; None if any will do.
        use: what is done with the path; gives the arrays.
        seconds: within which it must be done.
    """

    number: int | str
    name: str
    content: bytes | Callable[[Path], Path]
    error: type[Exception] | None = None
    message: str = ""
    expected: Mapping[str, np.ndarray] | None = None
    use: Callable[[Path], Mapping[str, np.ndarray]] = read_all
    seconds: float = 5.0

    def make(self, folder: Path) -> Path:
        if callable(self.content):
            return self.content(folder)
        path = folder / "model.ckpt"
        path.write_bytes(self.content)
        return path
