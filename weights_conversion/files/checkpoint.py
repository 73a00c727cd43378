"""A checkpoint: a lazy, read-only mapping from tensor names to arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class TensorInfo(NamedTuple):
    """The shape and dtype of a tensor, known before its bytes are read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Mapping[str, np.ndarray]):
    """Tensors by name, each read from its file at each access.

    Nothing is kept: two accesses read twice and return two independent arrays.

    Args:
        path: the file or folder, for messages.
        infos: shape and dtype of each tensor, by name.
        load: function that reads the tensor of a name.
        metadata: the file's free-text metadata.
        notes: sentences about anything unusual in the file.

    Example:

    >>> checkpoint = open_safetensors("vae/diffusion_pytorch_model.safetensors")
    >>> checkpoint.info("encoder.conv_in.weight").shape
    (128, 3, 3, 3)
    >>> checkpoint["encoder.conv_in.weight"].dtype
    dtype('float32')
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        load: Callable[[str], np.ndarray],
        metadata: Mapping[str, str] | None = None,
        notes: Iterable[str] = (),
    ):
        self.path = path
        self.metadata = dict(metadata or {})
        self.notes = tuple(notes)
        self._infos = dict(infos)
        self._load = load

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._infos:
            raise KeyError(name)
        return self._load(name)

    def __contains__(self, name: object) -> bool:
        return name in self._infos  # the method of Mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(info.nbytes for info in self._infos.values())

    def info(self, name: str) -> TensorInfo:
        """Return the shape and dtype of a tensor without reading it."""
        return self._infos[name]

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Return a checkpoint of some of the tensors under new names.

        Args:
            names: mapping from each new name to the name in this checkpoint.
        """
        return Checkpoint(
            self.path,
            {new: self._infos[name] for new, name in names.items()},
            lambda new: self._load(names[new]),
            self.metadata,
            self.notes,
        )


def in_memory(tensors: Mapping[str, np.ndarray], path: Path = Path("memory")) -> Checkpoint:
    """Return arrays as a checkpoint; return a checkpoint as it is."""
    if isinstance(tensors, Checkpoint):
        return tensors
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    return Checkpoint(path, infos, tensors.__getitem__)
