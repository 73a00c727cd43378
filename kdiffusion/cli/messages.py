"""What the command line says to people: warnings, errors and notes, one line each."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator


def log(*lines: str) -> None:
    """Say something on the standard error."""
    sys.stderr.writelines(f"kdiffusion: {line}\n" for line in lines)


def describe(error: Exception) -> str:
    """The message of an error the user can mend; of any other the class too."""
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and message:
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def notes(error: BaseException) -> Iterable[str]:
    """What was added to an error on its way."""
    return getattr(error, "__notes__", ())


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the line of code that gave them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: log(f"warning: {message}")
        yield


@contextlib.contextmanager
def silent_import() -> Iterator[None]:
    """Keep TensorFlow from talking, unless the user has chosen a log level.

    While its libraries are loaded it writes to the file descriptor whatever the level is.
    """
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
