"""Messages of the command line: warnings, errors and notes, one line each."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator


def log(*lines: str) -> None:
    """Write lines to the standard error."""
    sys.stderr.writelines(f"kdiffusion: {line}\n" for line in lines)


def describe(error: Exception) -> str:
    """Return the message of an error; also its class, unless the user can correct it."""
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and message:
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def notes(error: BaseException) -> Iterable[str]:
    """Return the notes that were added to an error."""
    return getattr(error, "__notes__", ())


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Show each warning on one line, without the line of code that caused it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: log(f"warning: {message}")
        yield


@contextlib.contextmanager
def silent_import() -> Iterator[None]:
    """Silence TensorFlow while it is imported, unless the user has chosen a log level.

    Its libraries write to the file descriptor of the standard error, whatever the level is.
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
