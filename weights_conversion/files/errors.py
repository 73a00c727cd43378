"""The errors of checkpoints, all of which are ValueErrors."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 10  # names in one message


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the next step."""


class UnsafeCheckpoint(CheckpointError):
    """The checkpoint asks for something that no weights need, such as a file outside its folder."""


class CorruptCheckpoint(CheckpointError):
    """The bytes break the rules of the format: truncated, inconsistent, or another format."""


class CheckpointLimit(CheckpointError):
    """The checkpoint asks for more than a model can need, so it is refused before allocating."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint is sound, but it is not what this model needs."""


class NonFiniteWeights(CheckpointError):
    """A tensor holds NaN or infinity, which no trained model has."""


def printable(name: object) -> str:
    """Return a name from an untrusted file as short ASCII text, safe for terminals and logs."""
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:80]}… ({len(text)} characters)"


def listed(names: Iterable[object]) -> str:
    """Return up to ten names and the number of the others, for a message."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + more
