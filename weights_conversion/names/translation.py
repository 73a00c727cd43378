"""Translation of tensors from one dialect of names to the other, one when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from weights_conversion.files.checkpoint import Checkpoint, TensorInfo
from weights_conversion.names import layouts
from weights_conversion.names.mapping import by_tensor, check_finite, locate, stored
from weights_conversion.names.table import Row


def translate(
    rows: Iterable[Row],
    checkpoint: Checkpoint,
    source: str,
    target: str,
    *,
    dtype: np.dtype | None = None,
) -> Checkpoint:
    """Return a model's tensors as the other dialect stores them, read when they are asked for.

    All names, shapes and dtypes are checked before this returns, as in `mapping.read`.

    Args:
        rows: the model's name table.
        checkpoint: the file's tensors.
        source: the file's dialect, "compvis" or "diffusers".
        target: the dialect of the result; it may be the same.
        dtype: of the result; None for the file's.

    Raises:
        CheckpointMismatch: tensors are missing, unexpected, or of a wrong shape or dtype.
        NonFiniteWeights: when a tensor is read that holds NaN or infinity, or would in this dtype.
    """
    rows = tuple(rows)
    places = locate(rows, checkpoint, source)
    groups = by_tensor(rows, target)
    infos = {}
    for name, (row, *_) in groups.items():
        shape = layouts.stored_shapes(stored(row, target).layout, row.shape)[0]
        own = checkpoint.info(places[row.kdiffusion].name).dtype
        infos[name] = TensorInfo(shape, own if dtype is None else np.dtype(dtype))

    def load(name: str) -> np.ndarray:
        parts = []
        for row in groups[name]:
            place = places[row.kdiffusion]
            tensor = checkpoint[place.name]
            check_finite(tensor, place.name, checkpoint.path)
            variable = layouts.to_keras(place.layout, tensor)
            parts.append(layouts.to_torch(stored(row, target).layout, variable))
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return _cast(joined, infos[name].dtype, name, checkpoint)

    return Checkpoint(checkpoint.path, infos, load, checkpoint.metadata, checkpoint.notes)


def _cast(array: np.ndarray, dtype: np.dtype, name: str, checkpoint: Checkpoint) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # reported by name below
        result = array.astype(dtype)
    check_finite(result, name, f"{checkpoint.path} in {dtype.name}")
    return result


def merge(checkpoints: Iterable[Checkpoint]) -> Checkpoint:
    """Return the tensors of several checkpoints, whose names all differ, as those of one."""
    parts = list(checkpoints)
    owners = {name: part for part in parts for name in part}
    infos = {name: part.info(name) for name, part in owners.items()}
    return Checkpoint(parts[0].path, infos, lambda name: owners[name][name], parts[0].metadata)
