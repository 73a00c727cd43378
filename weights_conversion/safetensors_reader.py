"""A reader of safetensors files that checks the whole header before it allocates anything.

The format is one page: https://github.com/huggingface/safetensors#format. The file is read with
plain reads, never mapped: a mapped file that shrinks under its reader kills the process.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from weights_conversion.checkpoint import Checkpoint, TensorInfo
from weights_conversion.errors import (
    CheckpointError,
    CheckpointLimit,
    CorruptCheckpoint,
    printable,
)

MAX_HEADER_BYTES = 25_000_000  # SD 1.5 needs 172 kB, trainers' metadata a few MB more
MAX_TENSORS = 50_000  # a full SDXL file has 2,515
_MAX_RANK = 32  # of NumPy 1; model weights have at most 5
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

_STRANGERS = (  # first bytes of files that are often found under this name
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!doctype html", "a web page, not a model; download it again, signed in if it is gated"),
    (b"<html", "a web page, not a model; download it again, signed in if it is gated"),
    (b"pk\x03\x04", "a zip archive, such as a PyTorch .ckpt file; give it that suffix"),
)


class _Tensor(NamedTuple):
    info: TensorInfo
    begin: int  # bytes from the start of the file


class _Identity(NamedTuple):
    """What changes when a file is replaced, shortened or rewritten."""

    device: int
    inode: int
    size: int
    modified_ns: int


def open_safetensors(path: str | os.PathLike) -> Checkpoint:
    """Opens a safetensors file: reads and checks its header, and no tensor yet.

    Args:
        path: a `.safetensors` file.

    Returns:
        A `Checkpoint` that reads each tensor when it is asked for.

    Raises:
        CorruptCheckpoint: the file breaks the format's rules or is another kind of file.
        CheckpointLimit: the header is longer, or lists more tensors, than any model needs.
        CheckpointError: the path is not a readable file.
    """
    path = Path(path)
    with _open(path) as file:
        identity = _identity(file)
        header, data_begin = _read_header(path, file, identity.size)
    metadata = _metadata(path, header.pop("__metadata__", {}))
    tensors = _tensors(path, header, data_begin, identity.size)

    def load(name: str) -> np.ndarray:
        return _load(path, identity, name, tensors[name])

    return Checkpoint(path, {name: t.info for name, t in tensors.items()}, load, metadata)


def _open(path: Path) -> BufferedReader:
    try:
        # Asked before opening, because opening a pipe would wait for its other end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a file. Expected a .safetensors file.")
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Expected a .safetensors file."
        ) from error


def _identity(file: BufferedReader) -> _Identity:
    status = os.fstat(file.fileno())
    return _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _read_header(path: Path, file: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    start = file.read(64)
    for magic, meaning in _STRANGERS:
        if start.lstrip().lower().startswith(magic):
            raise CorruptCheckpoint(f"{path} looks like {meaning}.")
    if len(start) < 8:
        raise CorruptCheckpoint(
            f"{path} has {size} bytes, fewer than a safetensors header. Download it again."
        )
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointLimit(
            f"{path} declares a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} "
            "that any model needs. It is probably not a safetensors file."
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
    except (ValueError, RecursionError) as error:  # also JSON's and UTF-8's own errors
        raise CorruptCheckpoint(
            f"{path} has a safetensors header that cannot be parsed: {str(error)[:200]}."
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {printable(counts.most_common(1)[0][0])} stands there twice")
    return entries


def _natural(digits: str) -> int:
    if digits.startswith("-"):  # -0 too, which the safetensors library refuses
        raise ValueError(f"{printable(digits)} is negative")
    return int(digits)


def _no_constant(word: str):
    raise ValueError(f"{word} is not JSON")


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptCheckpoint(f"{path} has a __metadata__ entry that is not all text.")
    return metadata


def _tensors(path: Path, header: dict[str, Any], begin: int, size: int) -> dict[str, _Tensor]:
    """Checks every entry, and that together they tile the rest of the file without a hole."""
    if len(header) > MAX_TENSORS:
        raise CheckpointLimit(
            f"{path} lists {len(header):,} tensors, more than the {MAX_TENSORS:,} allowed."
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
    if begin + position > size:
        raise CorruptCheckpoint(
            f"{path} is truncated: {size:,} of {begin + position:,} bytes. Download it again."
        )
    if begin + position < size:
        raise CorruptCheckpoint(
            f"{path} has {size - begin - position:,} bytes behind its last tensor. If you trust "
            "it, cut them off by saving its tensors anew with safetensors."
        )
    return {name: _Tensor(info, begin + first) for name, (info, first, _) in entries.items()}


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
    # The product of the non-zero sizes also has to fit: NumPy counts [2**31, 2**31, 0] that way.
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
    # type(), because True and 4.0 equal integers in Python but not in the format
    return isinstance(value, list) and all(type(item) is int for item in value)


def _load(path: Path, identity: _Identity, name: str, tensor: _Tensor) -> np.ndarray:
    array = np.empty(tensor.info.shape, tensor.info.dtype)
    with _open(path) as file:
        if _identity(file) != identity:
            raise CorruptCheckpoint(
                f"{path} changed while it was being read. Open it again when it is complete."
            )
        file.seek(tensor.begin)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise CorruptCheckpoint(f"{path} ended within tensor {printable(name)}.")
    return array
