"""The files that the command line writes: their names, and which of them were written."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdiffusion.files import replacing

if TYPE_CHECKING:
    import numpy as np

Identities = dict[Path, tuple[int, int] | None]


def picture_paths(output: Path | None, prompt: str, seed: int, count: int) -> list[Path]:
    """Return the paths of images.

    Args:
        output: path of a PNG file, or of a folder; `None` for the current folder.
        prompt: the prompt, for the name in a folder.
        seed: the seed, likewise.
        count: int, number of images; several get -0, -1 and so on.

    Returns:
        List of `count` paths.
    """
    if output is None or output.is_dir():
        words = re.findall(r"\w+", prompt[:200].lower())
        name = "-".join(words)[:40].strip("-_") or "picture"
        output = (output or Path()) / f"{name}-{seed}.png"
    check_suffix("--output", output, "a folder that exists or ")
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(count)]


def check_suffix(option: str, path: Path, besides: str = "") -> None:
    """Check that a path is the name of a PNG file."""
    if path.suffix.lower() != ".png":
        raise ValueError(
            f"{option} must be {besides}the name of a PNG file. "
            f"Received: {str(path)!r}; did you mean {str(path) + '.png'!r}?"
        )


def check_writable(paths: Sequence[Path], force: bool) -> None:
    """Check that files can be written, before the long work begins."""
    for folder in dict.fromkeys(path.parent for path in paths):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no folder {str(folder)!r} to write to; make it first"
            )
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"the folder {str(folder)!r} may not be written to")
    taken = [str(path) for path in paths if os.path.lexists(path)]
    if taken and not force:
        raise FileExistsError(f"{', '.join(taken)} exists already; overwrite with --force")
    for path in filter(Path.is_dir, paths):
        raise IsADirectoryError(f"{str(path)!r} is a folder, not a file to overwrite")


def identities(paths: Sequence[Path]) -> Identities:
    """Return the identity of each file, which differs from that of a file that replaces it."""
    return {path: _identity(path) for path in paths}


def account(before: Identities) -> str:
    """Say which files a stopped run has written.

    Args:
        before: `identities` of its files, at its start.
    """
    written = [str(path) for path, identity in before.items() if _identity(path) != identity]
    if not written:
        return "nothing was written"
    missing = [str(path) for path in before if str(path) not in written]
    return f"written: {', '.join(written)}; not written: {', '.join(missing) or 'none'}"


def replace_picture(path: Path, picture: np.ndarray) -> None:
    """Write a PNG file over another; a program that watches it never sees a part of one."""
    from PIL import Image

    with replacing(path) as partial:
        Image.fromarray(picture).save(partial, format="png", compress_level=1)


def _identity(path):
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
