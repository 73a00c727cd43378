"""Errors between here and the Hugging Face hub, in words, and when to ask again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before another try, where the hub names none
LONGEST_WAIT = 300.0  # seconds that a hub may ask for; its limits are counted over five minutes

_MESSAGES = {
    "address": "is no address on the hub: {error}. Write 'hf://organisation/repository'.",
    "gated": "is gated. Accept its terms in a browser at {endpoint}/{repository}, then pass your "
    "token: run `hf auth login`, or set HF_TOKEN.",
    "refused": "may not be read ({error}). If it is private or gated, pass a token that may read "
    "it: run `hf auth login`, or set HF_TOKEN.",
    "repository": "does not exist, or is private. Check the name; for a private one pass a token: "
    "run `hf auth login`, or set HF_TOKEN.",
    "revision": "has no such revision. Check the part behind the '@': a branch, tag or commit.",
    "file": "has lost a file while it was being fetched ({error}). Try again.",
    "busy": "has had too many requests from here (429){asked}. Try again later; with a token (run "
    "`hf auth login`, or set HF_TOKEN) more are allowed.",
    "server": "cannot be had now: the hub fails ({error}). Try again later.",
    "answer": "cannot be fetched: {endpoint} does not answer as a hub does ({error}). Is it the "
    "login page of a network or proxy? Check HF_ENDPOINT.",
    "space": "does not fit on the disk of {cache} ({error}). Make room there, or set HF_HOME to a "
    "folder on another disk.",
    "folder": "cannot be kept in {cache} ({error}). Set HF_HOME to a folder that may be written.",
    "network": "cannot be fetched: {endpoint} cannot be reached, or stopped answering ({error}). "
    "Check the network, proxy and HF_ENDPOINT. What was fetched is kept: try again and it goes on.",
}
_STATUS = {401: "refused", 403: "refused", 404: "repository", 408: "server", 429: "busy"}
_SYSTEM = {
    errno.ENOSPC: "space",
    errno.EDQUOT: "space",
    errno.EFBIG: "space",
    errno.EACCES: "folder",
    errno.EPERM: "folder",
    errno.EROFS: "folder",
}
PASSING = ("busy", "server", "network")


class DownloadError(ValueError):
    """A model could not be fetched; the message says why, and what to do."""


class Unreachable(DownloadError):
    """The hub cannot be reached, fails, or has too much to do: later it may be otherwise."""


class Address(NamedTuple):
    """The address of a model, and the cache."""

    name: str
    revision: str
    cache: Path

    @property
    def folder(self) -> Path:
        """Return the folder that caches the model."""
        return self.cache / f"models--{self.name.replace('/', '--')}"


def patiently(asked_for: Address, ask: Callable[[], T], waits: tuple[float, ...] = WAITS) -> T:
    """Ask again after a while, if it may help; raise a DownloadError if not."""
    for wait in (*waits, None):
        try:
            return ask()
        except DownloadError:
            raise
        except Exception as error:  # which ones there are differs with huggingface_hub's version
            asked = _seconds_asked(error)
            too_long = asked is not None and asked > LONGEST_WAIT
            if wait is None or too_long or kind_of(error) not in PASSING:
                raise explained(asked_for, error) from error
        time.sleep(wait if asked is None else asked)
    raise AssertionError("the last try returns or raises")


def explained(asked_for: Address, error: Exception) -> DownloadError:
    """Return an error in words: what was asked for, what came, and what to do."""
    from huggingface_hub import constants

    kind = kind_of(error)
    asked = _seconds_asked(error)
    first = next(iter(str(error).strip().splitlines()), "")[:200]
    text = _MESSAGES[kind].format(
        error=f"{type(error).__name__}: {first}",
        endpoint=constants.ENDPOINT,
        repository=asked_for.name,
        cache=asked_for.cache,
        asked=f", and asks to wait {asked:,.0f} seconds" if asked else "",
    )
    at = "" if asked_for.revision == constants.DEFAULT_REVISION else f"@{asked_for.revision}"
    error_class = Unreachable if kind in PASSING else DownloadError
    return error_class(f"'hf://{asked_for.name}{at}' {text}")


def kind_of(error: Exception) -> str:
    """Return the name of the message that an error calls for."""
    from huggingface_hub import errors

    kinds: tuple[tuple[type[Exception], str], ...] = (
        (errors.HFValidationError, "address"),
        (errors.GatedRepoError, "gated"),  # before its base class, the next but two
        (errors.RevisionNotFoundError, "revision"),
        (errors.EntryNotFoundError, "file"),
        (errors.RepositoryNotFoundError, "repository"),
    )
    for error_class, kind in kinds:
        if isinstance(error, error_class):
            return kind
    status = status_of(error)
    if status is not None:
        return _STATUS.get(status, "server" if status >= 500 else "answer")
    if isinstance(error, OSError):
        return _SYSTEM.get(error.errno or 0, "network")
    is_nonsense = isinstance(error, (ValueError, KeyError, TypeError, AttributeError))
    return "answer" if is_nonsense else "network"


def status_of(error: Exception) -> int | None:
    """Return the status of the hub's answer that an error comes from, if there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _seconds_asked(error: Exception) -> float | None:
    """Return the seconds that the hub asks to wait.

    Source: https://www.rfc-editor.org/rfc/rfc9110#field.retry-after
    """
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else None
