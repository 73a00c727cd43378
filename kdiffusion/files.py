"""Files that are written whole or not at all, and SHA-256 digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give the path of a file to write, which replaces `path` at the end, or nothing on an error.

    The temporary file lies in the folder of `path`, which must exist. Its suffix is `.partial`, so
    no reader of that folder takes it for a file of its kind.

    Args:
        path: the file to make or to replace.

    Raises:
        OSError: If the file cannot be replaced.

    Example:

    >>> with replacing("config.json") as partial:
    ...     partial.write_text("{}")
    """
    path = Path(path)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: str | os.PathLike) -> str:
    """Compute the SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Compute the SHA-256 of a value's JSON, keys sorted, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
