"""Checkpoints of a run: written whole or not at all, and verified before they are used.

A checkpoint is a folder `step-00001000` of safetensors files and a manifest with their SHA-256.
It is written under another name, forced to the disk file by file, the manifest last, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np
from keras import ops

from kdiffusion.files import file_sha256, json_sha256
from weights_conversion import (
    Checkpoint,
    CheckpointError,
    CheckpointMismatch,
    CorruptCheckpoint,
    TensorInfo,
    check_space,
    listed,
    open_safetensors,
    staged,
    write_safetensors,
)

MANIFEST = "manifest.json"
LOCK = ".lock"

_NAME = re.compile(r"step-(\d{8,})")
_STAGES = ".step-*.partial"  # made by `staged`, left behind by a killed process
_DAMAGED = "damaged-"
_SPARE = 1 << 20  # bytes for headers and the manifest

# These are the variables of each file, by name.
Variables = Mapping[str, Mapping[str, keras.Variable]]


class Saved(NamedTuple):
    """A checkpoint that has been verified.

    Args:
        path: its folder.
        step: int, how many steps were done.
        notes: dictionary that was saved with it.
    """

    path: Path
    step: int
    notes: dict[str, Any]


def save(folder: Path, step: int, variables: Variables, notes: Mapping[str, Any]) -> Path:
    """Write a checkpoint and force it to the disk.

    Args:
        folder: the run's folder.
        step: int, how many steps are done.
        variables: what to save.
        notes: further values that JSON holds.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: If it exists already or too little space is free.
        OSError: If it cannot be written; nothing of it is left then.
    """
    path = folder / f"step-{step:08d}"
    every = [variable for file in variables.values() for variable in file.values()]
    check_space(path, _SPARE + sum(_info(variable).nbytes for variable in every))
    with staged(path) as stage:
        files = {}
        for name, file in variables.items():
            target = stage / f"{name}.safetensors"
            write_safetensors(target, _lazily(target, file))
            files[target.name] = {"bytes": target.stat().st_size, "sha256": file_sha256(target)}
        manifest = {"step": step, "files": files, "notes": dict(notes)}
        text = json.dumps({**manifest, "sha256": json_sha256(manifest)}, indent=1)
        with open(stage / MANIFEST, "w", encoding="utf-8") as output:
            output.write(text)
            output.flush()
            os.fsync(output.fileno())
        _sync(stage)
    _sync(folder)
    return path


def newest(folder: Path) -> Saved | None:
    """Find the newest checkpoint that verifies, and set newer ones aside with a warning.

    Args:
        folder: the run's folder.

    Returns:
        `Saved`, or `None` if there are no checkpoints.

    Raises:
        CorruptCheckpoint: If there are some, and none verifies.
    """
    damaged: list[tuple[Path, str]] = []
    found = None
    for path in reversed(_paths(folder)):
        try:
            found = verify(path)
            break
        except (CheckpointError, OSError) as error:
            damaged.append((path, str(error)))
    if damaged and found is None:
        raise CorruptCheckpoint(
            f"None of the {len(damaged)} checkpoints in {folder} is whole. The newest: "
            f"{damaged[0][1]} Move them away to begin anew."
        )
    for path, reason in damaged:
        aside = path.with_name(_DAMAGED + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        warnings.warn(
            f"Checkpoint {path.name} is damaged and was renamed to {aside.name}; the one before it "
            f"is used. {reason}",
            stacklevel=2,
        )
    return found


def peek(folder: Path) -> Saved | None:
    """Read the manifest of the newest checkpoint whose manifest is whole; its files stay unread.

    Args:
        folder: the run's folder, which need not exist.

    Returns:
        `Saved`, or `None` if there is no such checkpoint.
    """
    for path in reversed(_paths(folder)):
        with contextlib.suppress(CorruptCheckpoint):
            return _manifest(path)[0]
    return None


def verify(path: Path) -> Saved:
    """Read a checkpoint's manifest and compare all its files with it.

    Raises:
        CorruptCheckpoint: If something is missing or is not what was written.
    """
    saved, files = _manifest(path)
    for name, written in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != written["bytes"]:
            raise CorruptCheckpoint(
                f"{file} {'is missing' if size is None else f'has {size:,} bytes'}; "
                f"{written['bytes']:,} were written."
            )
        if file_sha256(file) != written["sha256"]:
            raise CorruptCheckpoint(f"{file} is not as it was written: its SHA-256 differs.")
    return saved


def _manifest(path):
    """Return what a checkpoint's manifest says of the run and of its files."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        expected = manifest.pop("sha256")
        files, step, notes = manifest["files"], manifest["step"], manifest["notes"]
        intact = json_sha256(manifest) == expected and path.name == f"step-{step:08d}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path / MANIFEST} cannot be read: {error}.") from error
    if not intact:
        raise CorruptCheckpoint(f"{path / MANIFEST} is not as it was written.")
    return Saved(path, step, notes), files


def restore(saved: Saved, variables: Variables) -> None:
    """Give variables their saved values, all of them or none.

    Args:
        saved: `Saved`.
        variables: see `save`.

    Raises:
        CheckpointMismatch: If there are other variables in the checkpoint.
    """
    opened = {name: open_safetensors(saved.path / f"{name}.safetensors") for name in variables}
    for name, file in variables.items():
        expected = {key: _info(variable) for key, variable in file.items()}
        received = {key: opened[name].info(key) for key in opened[name]}
        wrong = {k for k in {*expected, *received} if not _fits(expected.get(k), received.get(k))}
        if wrong:
            raise CheckpointMismatch(
                f"{opened[name].path} does not fit the model: {len(wrong)} variables are missing, "
                f"unknown or of another shape or dtype, among them {listed(sorted(wrong))}."
            )
    for name, file in variables.items():
        for key, variable in file.items():
            variable.assign(opened[name][key])


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder within a scope, so that no other process trains in it; make it if need be.

    Raises:
        ValueError: If another process trains in it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "wb")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error}. Choose another one.") from error
    with file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"Another process trains in {folder}. Wait for its end, or choose another one."
                ) from error
        yield


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest.

    Args:
        folder: the run's folder.
        keep: int, how many to keep.
    """
    for path in _paths(folder)[:-keep]:
        # It is renamed first, so that no half-removed folder has a checkpoint's name.
        aside = path.with_name(f".{path.name}.old.partial")
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove partial checkpoints of killed processes."""
    for path in folder.glob(_STAGES):
        shutil.rmtree(path, ignore_errors=True)


def named(trainer: keras.Model, variables: Iterable[keras.Variable]) -> dict[str, keras.Variable]:
    """Name a trainer's variables by the network's name and the variable's path in it.

    Args:
        trainer: the model.
        variables: which of its variables.

    Returns:
        Dictionary in the order of `variables`.
    """
    owners = {id(v): layer.name for layer in reversed(trainer.layers) for v in layer.variables}
    pairs = []
    for variable in variables:
        owner = owners.get(id(variable), trainer.name)
        pairs.append((f"{owner}/{variable.path.removeprefix(f'{owner}/')}", variable))
    return dict(distinct(pairs))


def slots(optimizers: Mapping[str, keras.Optimizer]) -> dict[str, keras.Variable]:
    """Name the variables of optimizers by the group's name and the variable's path."""
    pairs = [
        # The optimizer's own name is left out, because it counts the optimizers of a process.
        (f"{group}/{variable.path.partition('/')[2] or variable.path}", variable)
        for group, optimizer in optimizers.items()
        for variable in optimizer.variables
    ]
    return dict(distinct(pairs))


def distinct(pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield pairs of name and value, with repeated names numbered from the second on."""
    seen: dict[str, int] = {}
    for name, value in pairs:
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), value


def fingerprint(variables: Mapping[str, keras.Variable]) -> str:
    """Compute the SHA-256 of the names and values of variables."""
    digest = hashlib.sha256()
    for name, variable in variables.items():
        digest.update(f"{name} {_info(variable)}".encode())
        array = np.ascontiguousarray(ops.convert_to_numpy(variable.value))
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _paths(folder):
    """Return the run's checkpoints, the newest last."""
    paths = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.partition("-")[2]))


def _lazily(path, variables):
    """Return variables as a checkpoint whose tensors leave the device when they are written."""
    infos = {name: _info(variable) for name, variable in variables.items()}
    return Checkpoint(path, infos, lambda name: ops.convert_to_numpy(variables[name].value))


def _info(variable):
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return TensorInfo(tuple(variable.shape), np.dtype(getattr(ml_dtypes, dtype, dtype)))


def _fits(expected, received):
    """Tell if a saved tensor can be a variable's value."""
    if expected is None or received is None or expected.shape != received.shape:
        return False
    # Keras counts steps in 64 bits on TensorFlow and in 32 on JAX.
    integers = expected.dtype.kind == received.dtype.kind == "i"
    return integers or expected.dtype == received.dtype


def _sync(folder):
    """Force a folder's list of names to the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
