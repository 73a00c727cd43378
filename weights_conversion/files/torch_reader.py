"""A reader of PyTorch's files, `.ckpt`, `.pt`, `.pth` and `.bin`, without PyTorch.

Since PyTorch 1.6 they are zip archives of a pickle and one member for each storage; before, they
were five pickles and then the storages. `pickle_reader` interprets the pickles, and there is no
unsafe way. The bytes of a tensor are read at each access, so optimizer states are never read.

Sources: `torch/serialization.py` and `torch/_utils.py` of pytorch/pytorch.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weights_conversion.files import zip_reader
from weights_conversion.files.checkpoint import Checkpoint, TensorInfo
from weights_conversion.files.errors import (
    CheckpointLimit,
    CorruptCheckpoint,
    UnsafeCheckpoint,
    printable,
)
from weights_conversion.files.limits import Limits
from weights_conversion.files.pickle_reader import load_pickle
from weights_conversion.files.pickle_values import Placeholder, Storage, Tensor
from weights_conversion.files.regular import first_bytes, identity, open_file, reopen

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_NESTS = ("state_dict", "model", "params_ema", "params", "module")
_COUNTERS = ("global_step", "epoch")
_CHUNK = 1 << 22
_OTHER_MEMBERS = ("byteorder", "version", ".format_version", ".storage_alignment")


class _Bytes(NamedTuple):
    """The place of a storage's bytes in the file.

    Args:
        begin: position of the member's bytes, or of the storage's in a file without members.
        size: number of bytes.
        member: the zip member that holds them, with its CRC.
    """

    begin: int
    size: int
    member: zip_reader.Member | None = None


class _Contents(NamedTuple):
    """The object in a file, and the places of the storages that it names."""

    root: Any
    find: Callable[[Storage], _Bytes]
    big_endian: bool
    notes: tuple[str, ...] = ()


def open_torch(path: str | os.PathLike, *, limits: Limits = Limits()) -> Checkpoint:
    """Open a file that `torch.save` wrote: read its pickle, and no tensor yet.

    Args:
        path: a `.ckpt`, `.pt`, `.pth` or `.bin` file.
        limits: limits of the file.

    Returns:
        `Checkpoint` of the file's state dict, found under "state_dict", "model" or another usual
        name, or at the top. Its metadata holds `global_step` and `epoch` if the file does.

    Raises:
        UnsafeCheckpoint: If the file calls code, is made to mislead, or is another container.
        CorruptCheckpoint: If it breaks the format's rules.
        CheckpointLimit: If it asks for more than any model needs.
        CheckpointError: If the path is not a readable file.
    """
    path = Path(path)
    with open_file(path) as file:
        seen = identity(file)
        start = first_bytes(path, file)
        open_contents = _open_zip if start.startswith(zip_reader.MAGIC) else _open_legacy
        contents = open_contents(path, file, seen.size, limits)
    tensors = dict(_state_dict(path, contents.root, limits))
    places: dict[str, _Bytes] = {}
    with reopen(path, seen) as file:
        for name, tensor in tensors.items():
            key = tensor.storage.key
            if key not in places:
                places[key] = _place(path, file, contents, tensor.storage, limits)
            _check_size(path, name, tensor, places[key], limits)
    infos = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    verified: set[str] = set()

    def load(name: str) -> np.ndarray:
        tensor = tensors[name]
        place = places[tensor.storage.key]
        with reopen(path, seen) as file:
            flat = _read(path, file, tensor, place, verified)
        return _as_array(flat, tensor, contents.big_endian)

    return Checkpoint(path, infos, load, _counters(contents.root), contents.notes)


# ── the two containers ──


def _open_zip(path: Path, file: BufferedReader, size: int, limits: Limits) -> _Contents:
    members = zip_reader.read_members(path, file, size, limits)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    top = pickles[0].removesuffix("data.pkl") if pickles else ""
    if any(name.startswith(f"{top}code/") or name == f"{top}constants.pkl" for name in members):
        raise UnsafeCheckpoint(
            f"{path} is a TorchScript archive, an unsupported container: it holds a program. "
            "Take the model's state dict or its safetensors file."
        )
    if not pickles:
        raise CorruptCheckpoint(
            f"{path} is a zip archive without data.pkl, so PyTorch did not write it. "
            f"It holds {len(members):,} members."
        )
    if len(pickles) > 1:
        raise UnsafeCheckpoint(
            f"{path} holds {len(pickles)} pickles named data.pkl. Do not trust it; "
            "download it from its source."
        )
    content = _small(path, file, members[pickles[0]], limits.pickle_bytes, limits)
    root, _ = load_pickle(path, content, 0, limits)
    order = members.get(f"{top}byteorder")
    big_endian = order is not None and _small(path, file, order, 64, limits).strip() == b"big"

    def find(storage: Storage) -> _Bytes:
        member = members.get(f"{top}data/{storage.key}")
        if member is None:
            raise CorruptCheckpoint(
                f"{path} has no member for storage {printable(storage.key)}. Download it again."
            )
        return _Bytes(-1, member.size, member)

    known = tuple(f"{top}{name}" for name in ("data/", ".data/", "data.pkl", *_OTHER_MEMBERS))
    strangers = [printable(name) for name in members if not name.startswith(known)]
    notes = tuple(f"ignored the archive's member {name}" for name in strangers[:10])
    return _Contents(root, find, big_endian, notes)


def _small(
    path: Path, file: BufferedReader, member: zip_reader.Member, most: int, limits: Limits
) -> bytes:
    if member.size > most:
        raise CheckpointLimit(
            f"{path}: member {printable(member.name)} has {member.size:,} bytes, more than the "
            f"{most:,} allowed."
        )
    begin = zip_reader.locate(path, file, member, limits)
    return b"".join(zip_reader.chunks(path, file, member, begin))


def _open_legacy(path: Path, file: BufferedReader, size: int, limits: Limits) -> _Contents:
    file.seek(0)
    content = file.read(min(size, limits.pickle_bytes))
    magic, position = load_pickle(path, content, 0, limits)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise CorruptCheckpoint(
            f"{path} is a plain pickle of a {type(magic).__name__}, not a file that PyTorch wrote. "
            "Save its tensors with safetensors."
        )
    parts = []
    for _ in range(4):
        part, position = load_pickle(path, content, position, limits)
        parts.append(part)
    protocol, system, root, keys = parts
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or not isinstance(keys, list):
        raise CorruptCheckpoint(f"{path} has not the five parts of an old PyTorch file.")
    big_endian = system.get("little_endian") is False
    places = _legacy_places(path, file, position, (keys, dict(_storages(root)), big_endian))

    def find(storage: Storage) -> _Bytes:
        if storage.key not in places:
            raise CorruptCheckpoint(
                f"{path} has no storage {printable(storage.key)}. Download it again."
            )
        return places[storage.key]

    return _Contents(root, find, big_endian)


def _legacy_places(
    path: Path,
    file: BufferedReader,
    position: int,
    contents: tuple[list[Any], Mapping[str, Storage], bool],
) -> dict[str, _Bytes]:
    """Find the storages behind the pickles; each follows its number of elements."""
    keys, storages, big_endian = contents
    size = os.fstat(file.fileno()).st_size
    places: dict[str, _Bytes] = {}
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        file.seek(position)
        count = int.from_bytes(file.read(8), "big" if big_endian else "little")
        if storage is None or count != storage.numel or key in places:
            raise CorruptCheckpoint(
                f"{path}: storage {printable(key)} is not the one that its pickle names. "
                "Download the file again."
            )
        places[key] = _Bytes(position + 8, storage.numel * storage.dtype.itemsize)
        position += 8 + places[key].size
        if position > size:
            raise CorruptCheckpoint(
                f"{path} is truncated: {size:,} bytes, at least {position:,} needed. "
                "Download it again."
            )
    return places


def _storages(root: Any) -> Iterator[tuple[str, Storage]]:
    """Yield every storage of an object, with its key."""
    seen, waiting = set(), [root]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item.storage.key, item.storage
        elif isinstance(item, Storage):
            yield item.key, item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
        elif isinstance(item, Placeholder) and id(item) not in seen:
            seen.add(id(item))
            waiting += [item.arguments, item.state]


# ── the state dict ──


def _state_dict(path: Path, root: Any, limits: Limits) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state dict by name; the names of inner dictionaries are prefixes."""
    found = _unnested(root)
    if not isinstance(found, dict):
        raise CorruptCheckpoint(
            f"{path} holds a {type(found).__name__}, not a state dict: tensors by name."
        )
    count = 0
    for name, value in found.items():
        inner = (
            {name: value}
            if not isinstance(value, dict)
            else {f"{name}.{key}": tensor for key, tensor in value.items() if isinstance(key, str)}
        )
        for full_name, tensor in inner.items():
            if isinstance(tensor, Tensor) and isinstance(name, str):
                count += 1
                if count > limits.tensors:
                    raise CheckpointLimit(
                        f"{path} lists more than the {limits.tensors:,} tensors allowed. "
                        "Pass other limits if you trust it."
                    )
                yield full_name, tensor


def _unnested(root: Any) -> Any:
    for _ in range(8):  # some files hold "state_dict" within "state_dict"
        if not isinstance(root, dict) or any(isinstance(v, Tensor) for v in root.values()):
            break
        inner = [root[name] for name in _NESTS if isinstance(root.get(name), dict)]
        if not inner:
            break
        root = inner[0]
    return root


def _counters(root: Any) -> Mapping[str, str]:
    if not isinstance(root, dict):
        return {}
    return {name: str(root[name]) for name in _COUNTERS if type(root.get(name)) is int}


def _place(
    path: Path, file: BufferedReader, contents: _Contents, storage: Storage, limits: Limits
) -> _Bytes:
    place = contents.find(storage)
    if place.member is None:
        return place
    return place._replace(begin=zip_reader.locate(path, file, place.member, limits))


def _check_size(path: Path, name: str, tensor: Tensor, place: _Bytes, limits: Limits) -> None:
    needed = tensor.storage.numel * tensor.storage.dtype.itemsize
    if needed > place.size:
        raise CorruptCheckpoint(
            f"{path}: the storage of tensor {printable(name)} should have {needed:,} bytes and has "
            f"{place.size:,}. Download the file again."
        )
    size = TensorInfo(tensor.shape, tensor.dtype).nbytes
    if size > max(needed, limits.expanded_bytes):
        raise CheckpointLimit(
            f"{path}: tensor {printable(name)} would grow from {needed:,} to {size:,} bytes, "
            "because it repeats its storage. Do not trust it."
        )


# ── the bytes of a tensor ──


def _read(
    path: Path, file: BufferedReader, tensor: Tensor, place: _Bytes, verified: set[str]
) -> np.ndarray:
    """Read the numbers from the first to the last that a tensor uses, as bytes."""
    first = tensor.offset * tensor.dtype.itemsize
    array = np.empty(tensor.span * tensor.dtype.itemsize, np.uint8)
    member, key = place.member, tensor.storage.key
    if member is not None and (member.method != 0 or array.nbytes < place.size):
        # The CRC covers all bytes, so all are read: once, or each time if they are deflated.
        if member.method != 0 or (member.crc and key not in verified):
            _copy_span(zip_reader.chunks(path, file, member, place.begin, _CHUNK), array, first)
            verified.add(key)
            return array
    file.seek(place.begin + first)
    crc = _read_into(path, file, array, check=member is not None and member.crc != 0)
    if member is not None and array.nbytes == place.size:
        zip_reader.check_crc(path, member, crc)
    return array


def _read_into(path: Path, file: BufferedReader, array: np.ndarray, check: bool) -> int:
    crc, view = 0, array.data
    for begin in range(0, len(view), _CHUNK):  # the CRC is computed while a chunk is in the cache
        chunk = view[begin : begin + _CHUNK]
        if file.readinto(chunk) != len(chunk):
            raise CorruptCheckpoint(f"{path} ended within a tensor. Download it again.")
        crc = zlib.crc32(chunk, crc) if check else 0
    return crc


def _copy_span(chunks: Iterator[bytes], array: np.ndarray, first: int) -> None:
    position = 0
    for chunk in chunks:
        begin, end = max(first, position), min(first + len(array), position + len(chunk))
        if begin < end:
            content = np.frombuffer(chunk, np.uint8)
            array[begin - first : end - first] = content[begin - position : end - position]
        position += len(chunk)


def _as_array(flat: np.ndarray, tensor: Tensor, big_endian: bool) -> np.ndarray:
    unit = tensor.dtype.itemsize
    if big_endian and unit > 1:
        part = unit // 2 if tensor.dtype.kind == "c" else unit
        flat = np.ascontiguousarray(flat.reshape(-1, part)[:, ::-1]).reshape(-1)
    if 0 in tensor.shape:
        return np.empty(tensor.shape, tensor.dtype)
    # NumPy makes no strided views of some types of ml_dtypes, so the items are raw bytes.
    items = flat.view(np.dtype((np.void, unit)))
    strides = tuple(stride * unit for stride in tensor.strides)
    view = np.lib.stride_tricks.as_strided(items, tensor.shape, strides)
    # A view of a whole, contiguous array stays one; other views are copied out of their storage.
    return np.ascontiguousarray(view).reshape(tensor.shape).view(tensor.dtype)
