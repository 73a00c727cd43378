"""A reader of safetensors files that checks the whole header before it allocates anything.

The format is one page: https://github.com/huggingface/safetensors#format. The file is read with
plain reads, never mapped: if a mapped file is shortened, reading it kills the process.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from weights_conversion.files.checkpoint import Checkpoint, TensorInfo
from weights_conversion.files.errors import (
    CheckpointLimit,
    CorruptCheckpoint,
    printable,
)
from weights_conversion.files.limits import Limits
from weights_conversion.files.regular import (
    Identity,
    first_bytes,
    identity,
    open_file,
    reopen,
)

_MAX_RANK = 32  # the limit of NumPy 1; model weights have at most 5
_MAX_BYTES = 2**62

DTYPES = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}


class _Tensor(NamedTuple):
    info: TensorInfo
    begin: int  # bytes from the start of the file


def open_safetensors(
    path: str | os.PathLike,
    *,
    limits: Limits = Limits(),
    ignore_trailing_bytes: bool = False,
) -> Checkpoint:
    """Open a safetensors file: read and check its header, and no tensor yet.

    Args:
        path: a `.safetensors` file.
        limits: limits of the file.
        ignore_trailing_bytes: whether bytes behind the last tensor are ignored, which a repair of
            such a file needs.

    Returns:
        `Checkpoint`, which reads each tensor at each access.

    Raises:
        CorruptCheckpoint: If the file breaks the format's rules or is another kind of file.
        CheckpointLimit: If the header is longer, or lists more tensors, than any model needs.
        CheckpointError: If the path is not a readable file.
    """
    path = Path(path)
    with open_file(path) as file:
        seen = identity(file)
        header, data_begin = _read_header(path, file, seen.size, limits)
    metadata = _metadata(path, header.pop("__metadata__", {}))
    tensors, end = _tensors(path, header, data_begin, limits)
    if end > seen.size:
        raise CorruptCheckpoint(
            f"{path} is truncated: {seen.size:,} of {end:,} bytes. Download it again."
        )
    if end < seen.size and not ignore_trailing_bytes:
        raise CorruptCheckpoint(
            f"{path} has {seen.size - end:,} bytes behind its last tensor. If you trust it, cut "
            "them off with `python -m weights_conversion repair`."
        )

    def load(name: str) -> np.ndarray:
        return _load(path, seen, name, tensors[name])

    return Checkpoint(path, {name: t.info for name, t in tensors.items()}, load, metadata)


def _read_header(
    path: Path, file: BufferedReader, size: int, limits: Limits
) -> tuple[dict[str, Any], int]:
    start = first_bytes(path, file)
    if start.startswith(b"PK\x03\x04"):
        raise CorruptCheckpoint(
            f"{path} is a zip archive, such as a PyTorch .ckpt file: use `open_checkpoint`."
        )
    if len(start) < 8:
        raise CorruptCheckpoint(
            f"{path} has {size} bytes, fewer than a safetensors header. Download it again."
        )
    length = int.from_bytes(start[:8], "little")
    if length > limits.header_bytes:
        raise CheckpointLimit(
            f"{path} declares a header of {length:,} bytes, more than the "
            f"{limits.header_bytes:,} that any model needs. It is probably not a safetensors file."
        )
    if 8 + length > size:
        raise CorruptCheckpoint(
            f"{path} is truncated or not a safetensors file: its header should have {length:,} "
            f"bytes, the file has {size:,}. Download it again."
        )
    file.seek(8)
    return _parse(path, file.read(length)), 8 + length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CorruptCheckpoint(
            f"{path} is not a safetensors file: its header does not start with '{{'."
        )
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:  # errors of JSON and UTF-8 are ValueErrors
        raise CorruptCheckpoint(
            f"{path} has a safetensors header that cannot be parsed: {str(error)[:200]}."
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {printable(twice)} stands there twice")
    return entries


def _natural(digits: str) -> int:
    if digits.startswith("-"):  # the safetensors library refuses -0 too
        raise ValueError(f"{printable(digits)} is negative")
    return int(digits)


def _no_constant(word: str):
    raise ValueError(f"{word} is not JSON")


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptCheckpoint(f"{path} has a __metadata__ entry that is not all text.")
    return metadata


def _tensors(
    path: Path, header: dict[str, Any], begin: int, limits: Limits
) -> tuple[dict[str, _Tensor], int]:
    """Check each entry, and that they tile the data without a hole; return them and its end."""
    if len(header) > limits.tensors:
        raise CheckpointLimit(
            f"{path} lists {len(header):,} tensors, more than the {limits.tensors:,} allowed. "
            "Pass other limits if you trust it."
        )
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    position = 0
    for name, (_, first, last) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if first != position:
            problem = "overlaps another tensor" if first < position else "follows a hole"
            raise CorruptCheckpoint(
                f"{path}: tensor {printable(name)} {problem}: it starts at byte {first:,} of the "
                f"data instead of {position:,}. Save the file anew with safetensors."
            )
        position = last
    tensors = {name: _Tensor(info, begin + first) for name, (info, first, _) in entries.items()}
    return tensors, begin + position


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    def corrupt(problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{path}: tensor {printable(name)} {problem}.")

    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise corrupt("has a name that is not Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise corrupt("must have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        known = ", ".join(DTYPES)
        raise corrupt(f"has the dtype {printable(entry['dtype'])}; known are {known}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2:
        raise corrupt(
            f"has shape {printable(shape)} and data_offsets {printable(offsets)}; "
            "both must be lists of natural numbers, the second of two"
        )
    # NumPy multiplies the non-zero sizes, so those of [2**31, 2**31, 0] have to fit, too.
    if len(shape) > _MAX_RANK or math.prod(filter(None, shape)) * dtype.itemsize > _MAX_BYTES:
        raise corrupt(f"has the shape {printable(shape)}, which no array can have")
    first, last = offsets
    info = TensorInfo(tuple(shape), dtype)
    if last - first != info.nbytes:
        raise corrupt(
            f"has {printable(shape)} values of {entry['dtype']}, {info.nbytes:,} bytes, "
            f"but its data_offsets span {last - first:,}"
        )
    return info, first, last


def _is_naturals(value: Any) -> bool:
    # True and 4.0 equal integers in Python, but are none in the format.
    return isinstance(value, list) and all(type(item) is int for item in value)


def _load(path: Path, seen: Identity, name: str, tensor: _Tensor) -> np.ndarray:
    array = np.empty(tensor.info.shape, tensor.info.dtype)
    with reopen(path, seen) as file:
        file.seek(tensor.begin)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise CorruptCheckpoint(f"{path} ended within tensor {printable(name)}.")
    return array
