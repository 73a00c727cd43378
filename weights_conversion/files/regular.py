"""Files as the readers see them: regular, unchanged while they are read, and often misnamed."""

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
_STRANGERS = (  # first bytes of files that are often found under a checkpoint's name
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
_START = 264  # bytes that tell all of these


class Identity(NamedTuple):
    """What changes when a file is replaced, shortened or rewritten."""

    device: int
    inode: int
    size: int
    modified_ns: int


def open_file(path: Path) -> BufferedReader:
    """Opens a regular file for reading; for a pipe or a device it would wait for ever.

    Raises:
        CheckpointError: the path is not a readable file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening, which waits for a pipe's end
            raise CheckpointError(f"{path} is not a file. Expected a checkpoint file.")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or error  # a NUL in the name is a ValueError
        raise CheckpointError(
            f"{os.fspath(path)!r} cannot be read: {reason}. Expected a checkpoint file."
        ) from error


def identity(file: BufferedReader) -> Identity:
    """What tells an open file from one that was put in its place or changed."""
    status = os.fstat(file.fileno())
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def reopen(path: Path, expected: Identity) -> BufferedReader:
    """Opens a file that was looked at before.

    Raises:
        CorruptCheckpoint: it is another file now, or has another size or time.
    """
    file = open_file(path)
    if identity(file) != expected:
        file.close()
        raise CorruptCheckpoint(
            f"{path} changed while it was being read. Open it again when it is complete."
        )
    return file


def first_bytes(path: Path, file: BufferedReader) -> bytes:
    """Returns a file's first bytes, once they are not those of something else entirely.

    Raises:
        CorruptCheckpoint: they are a web page's, a Git LFS pointer's, or another format's.
        UnsafeCheckpoint: they are those of an archive that is not opened here.
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
