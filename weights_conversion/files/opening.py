"""Open a checkpoint file of any format; its content decides, never its name."""

from __future__ import annotations

import os
from pathlib import Path

from weights_conversion.files import zip_reader
from weights_conversion.files.checkpoint import Checkpoint
from weights_conversion.files.errors import CheckpointError
from weights_conversion.files.limits import Limits
from weights_conversion.files.regular import first_bytes, open_file
from weights_conversion.files.safetensors_reader import open_safetensors
from weights_conversion.files.torch_reader import open_torch


def open_checkpoint(path: str | os.PathLike, *, limits: Limits = Limits()) -> Checkpoint:
    """Open a checkpoint file of safetensors' or PyTorch's format.

    A pickle called `model.safetensors` is read as a pickle, by a reader that runs nothing, and a
    safetensors file called `model.ckpt` as safetensors.

    Args:
        path: the file.
        limits: limits of the file.

    Returns:
        `Checkpoint`, which reads each tensor at each access.

    Raises:
        CheckpointError: If the file cannot be used; its subclasses say why.

    Example:

    >>> checkpoint = open_checkpoint("v1-5-pruned-emaonly.ckpt")
    >>> checkpoint.info("first_stage_model.decoder.conv_in.weight").shape
    (512, 4, 3, 3)
    """
    path = Path(path)
    return (open_torch if is_torch(path) else open_safetensors)(path, limits=limits)


def is_torch(path: Path) -> bool:
    """Return whether the first bytes of a file are those of PyTorch's formats.

    Raises:
        CheckpointError: If the path is not a readable file, or evidently no checkpoint.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder. Open it with `DiffusersFolder` if it is in diffusers' layout, "
            "or name a file in it."
        )
    with open_file(path) as file:
        start = first_bytes(path, file)
    # A safetensors header of 128 or 640 bytes starts like a pickle, but zeros follow.
    is_pickle = start[:1] == b"\x80" and start[1:2] <= b"\x05" and start[3:8] != bytes(5)
    return is_pickle or start.startswith(zip_reader.MAGIC) or _is_old_pickle(start)


def _is_old_pickle(start: bytes) -> bool:
    """Return whether these may be the first opcodes of a pickle of protocol 0 or 1."""
    return start[:1] in (b"(", b"c", b"}", b"]") and start[3:8] != bytes(5)
