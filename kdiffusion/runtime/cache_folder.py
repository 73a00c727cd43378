"""The folder where compiled programs are kept for the next start."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from pathlib import Path

VARIABLE = "KDIFFUSION_COMPILE_CACHE"

# Seconds after which an unused program is removed: programs of old versions would stay forever.
_MAX_AGE = 30 * 24 * 3600


def program_folder() -> Path | None:
    """Return the folder of compiled programs, after removing those that are long unused.

    The environment variable `KDIFFUSION_COMPILE_CACHE` names it; `off` means none. Otherwise it is
    `kdiffusion/programs` in the user's cache folder (XDG Base Directory Specification). It is made
    if it is missing. Its programs are run, so a folder that others may write to is not used.

    Returns:
        An absolute path. `None` if programs are not kept: this is switched off, or the folder
        cannot be made or written to, or is not the user's own.
    """
    named = os.environ.get(VARIABLE, "")
    if named.lower() == "off":
        return None
    try:
        path = Path(named).expanduser().absolute() if named else _default()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(path):
            return None
        # Permissions do not show full disks and file systems that are mounted for reading only.
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"written")
        _remove_old(path)
    except (OSError, RuntimeError):  # `expanduser` raises the latter for an unknown home
        return None
    return path


def _default():
    # The specification calls a relative path invalid.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "kdiffusion/programs"


def _is_private(path):
    if not hasattr(os, "getuid"):
        return True
    status = path.stat()
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.getuid() and not others_write


def _remove_old(path):
    for entry in os.scandir(path):
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            used = max(status.st_atime, status.st_mtime)
            if stat.S_ISREG(status.st_mode) and time.time() - used > _MAX_AGE:
                os.unlink(entry)
