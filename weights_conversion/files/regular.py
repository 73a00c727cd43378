"""Regular files: opened safely, unchanged while they are read, and recognised if misnamed."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from weights_conversion.files.errors import (
    CheckpointError,
    CorruptCheckpoint,
    UnsafeCheckpoint,
)

_WEB_PAGE = "a web page, not a model; download it again, signed in if it is gated"
_STRANGERS = (  # first bytes of files that often bear the name of a checkpoint
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!doctype html", _WEB_PAGE),
    (b"<html", _WEB_PAGE),
    (b"\x89hdf", "an HDF5 file, which is not read here; save its weights as safetensors"),
    (b"gguf", "a GGUF file, which is not read here; take the model's safetensors file"),
)
_CONTAINERS = (  # place, bytes, name
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (0, b"Rar!", "RAR archive"),
    (0, b"\x1f\x8b", "gzip file"),
    (0, b"BZh", "bzip2 file"),
    (0, b"\xfd7zXZ", "xz file"),
    (257, b"ustar", "tar archive, as PyTorch wrote before 2017"),
)
_START = 264  # bytes that show all of these


class Identity(NamedTuple):
    """The properties of a file that change when it is replaced, shortened or rewritten."""

    device: int
    inode: int
    size: int
    modified_ns: int


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; opening a pipe or a device could wait for ever.

    Raises:
        CheckpointError: If the path is not a readable file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # `open` waits for the other end of a pipe
            raise CheckpointError(f"{path} is not a file. Expected a checkpoint file.")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or error  # a NUL in the name raises a ValueError
        raise CheckpointError(
            f"{os.fspath(path)!r} cannot be read: {reason}. Expected a checkpoint file."
        ) from error


def identity(file: BufferedReader) -> Identity:
    """Return the identity of an open file, to detect changes."""
    status = os.fstat(file.fileno())
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def reopen(path: Path, expected: Identity) -> BufferedReader:
    """Open a file again.

    Raises:
        CorruptCheckpoint: If it is another file now, or has another size or time.
    """
    file = open_file(path)
    if identity(file) != expected:
        file.close()
        raise CorruptCheckpoint(
            f"{path} changed while it was being read. Open it again when it is complete."
        )
    return file


def first_bytes(path: Path, file: BufferedReader) -> bytes:
    """Read the first bytes of a file, and check that it is no file of another kind.

    Raises:
        CorruptCheckpoint: If it is a web page, a Git LFS pointer, or of another format.
        UnsafeCheckpoint: If it is an archive that is not supported.
    """
    start = file.read(_START)
    for magic, meaning in _STRANGERS:
        if start.lstrip().lower().startswith(magic):
            raise CorruptCheckpoint(f"{path} looks like {meaning}.")
    for place, magic, name in _CONTAINERS:
        if start[place:].startswith(magic):
            raise UnsafeCheckpoint(
                f"{path} is a {name}: an unsupported container. Unpack it, or take the model's "
                "safetensors file."
            )
    return start
