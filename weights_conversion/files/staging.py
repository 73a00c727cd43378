"""Write a folder or a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from weights_conversion.files.errors import CheckpointError

# The shell waits for a line. If its input ends without one, the other process was killed.
_REMOVE_UNLESS_TOLD = 'read -r line || rm -rf -- "$0"'


@contextlib.contextmanager
def staged(path: str | os.PathLike) -> Iterator[Path]:
    """Give a folder to write into, which becomes `path` at the end, or nothing on an error.

    Args:
        path: the folder to make; it must not exist, or be empty.

    Raises:
        CheckpointError: If it exists and is not empty.

    Example:

    >>> with staged("my-model") as folder:
    ...     write_component(folder, "unet", config, tensors)
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already. Choose another path or remove it first.")
    stage = _beside(path)
    stage.mkdir()
    try:
        yield stage
        if path.exists():
            path.rmdir()  # Windows does not replace folders, even empty ones
        stage.rename(path)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


@contextlib.contextmanager
def staged_file(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Give the path of a file to write, which becomes `path` at the end, or nothing on an error.

    Args:
        path: the file to make.
        overwrite: whether it may exist and is replaced then.

    Raises:
        CheckpointError: If it exists and `overwrite` is false.
    """
    path = Path(path).absolute()
    if not overwrite and (path.exists() or path.is_symlink()):
        raise CheckpointError(f"{path} exists already. Choose another path or remove it first.")
    stage = _beside(path)
    try:
        yield stage
        stage.replace(path)
    finally:
        stage.unlink(missing_ok=True)


@contextlib.contextmanager
def removed_if_killed(path: Path) -> Iterator[None]:
    """Start a shell that removes a path if this process is killed within the scope."""
    if os.name != "posix":
        yield
        return
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE_UNLESS_TOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C and signals to the process group must not reach it
    )
    try:
        yield
    finally:
        guard.communicate(b"done\n")


def check_space(path: Path, needed: int) -> None:
    """Check that the disk has space for a file or folder.

    Args:
        path: the path to be made.
        needed: bytes.

    Raises:
        CheckpointError: If less is free.
    """
    place = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{path} needs {needed:,} bytes, and {free:,} are free there. Make room, or choose "
            "another place or a smaller dtype."
        )


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
