"""A writer of safetensors files that holds one tensor in memory at a time.

The library's own writer needs all tensors in memory. Shapes and dtypes are known before any tensor
is read, so this one writes the header first and then the tensors, one by one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from weights_conversion.files.checkpoint import Checkpoint
from weights_conversion.files.errors import CheckpointMismatch, printable
from weights_conversion.files.safetensors_reader import DTYPES

Progress = Callable[[int], None]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
_CHUNK = 1 << 24


def write_safetensors(
    path: Path,
    tensors: Checkpoint,
    names: Iterable[str] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write tensors of a checkpoint to a file, which is on the disk when this returns.

    Args:
        path: the file, replaced if it exists.
        tensors: the checkpoint, read tensor by tensor; arrays need not be contiguous.
        names: names of the tensors to write; `None` for all.
        metadata: free text for the header, beside the format's own mark.
        progress: function that is called with the bytes of each part after it is written.

    Raises:
        CheckpointMismatch: If the format lacks the dtype of a tensor.
    """
    chosen = list(tensors if names is None else names)
    # As in the library, larger items come first, so that everything is aligned.
    chosen.sort(key=lambda name: (-tensors.info(name).dtype.itemsize, name))
    with open(path, "wb") as file:
        file.write(_header(tensors, chosen, {"format": "pt", **(metadata or {})}))
        for name in chosen:
            content = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data
            for begin in range(0, len(content), _CHUNK):
                written = file.write(content[begin : begin + _CHUNK])
                if progress is not None:
                    progress(written)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Checkpoint, names: list[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name in names:
        info = tensors.info(name)
        if info.dtype not in _NAMES:
            raise CheckpointMismatch(
                f"Tensor {printable(name)} is of dtype {info.dtype.name}; safetensors files hold "
                f"{', '.join(dtype.name for dtype in _NAMES)}."
            )
        entries[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
