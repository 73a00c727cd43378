"""The content of checkpoints' pickles, as plain records; no function that a file names is called.

A pickle is a program whose instructions name Python functions to call. Here each name is looked up
in the tables below and nowhere else. It becomes one of four things: a function of this module that
makes a record; an inert placeholder, because training frameworks leave their objects in
checkpoints; a name that is only mentioned; or, if it is called and is in no table, an
`UnsafeCheckpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_MAX_RANK = 32
_MAX_ELEMENTS = 2**62


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a module, which is only mentioned."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of numbers in the file, not read yet.

    Args:
        key: its name in the file.
        dtype: dtype of its numbers; bytes if the storage is untyped.
        numel: number of its numbers.
        first: place where a view of it begins, in numbers; above 0 only in files before 2018.
    """

    key: str
    dtype: np.dtype
    numel: int
    first: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides count numbers of its dtype."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @property
    def span(self) -> int:
        """Return the count of numbers from the first to the last that the tensor uses."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))


@dataclass(slots=True, eq=False)
class Placeholder:
    """An object that is not made: its class or function, its arguments and its state."""

    origin: Global
    arguments: Any = ()
    state: Any = None


class Unusable(ValueError):
    """No record can be made of these arguments; the interpreter adds file and place."""


DTYPES = {  # torch's names of dtypes
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("bool"),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
}
_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}


# A call of these functions becomes a placeholder that keeps the arguments.
_INERT = {
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.range",
    "builtins.slice",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.device",
}
# Training frameworks leave objects of these packages in checkpoints; they are never needed.
_INERT_PACKAGES = {
    "argparse",
    "datetime",
    "enum",
    "ldm",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "sgm",
    "torchmetrics",
    "transformers",
    "typing",
}


def call(function: Any, arguments: Any, spend: Callable[[int], None]) -> Any:
    """Make the record that stands for a call.

    Args:
        function: the function that the file names.
        arguments: its arguments.
        spend: function that takes a number of copied items from the file's budget.

    Returns:
        The record, or `None` if the function must not be called.

    Raises:
        Unusable: If the function does not take these arguments.
    """
    if not isinstance(function, Global):
        return None
    name = str(function).replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
    if name in _FUNCTIONS:
        if not isinstance(arguments, tuple):
            raise Unusable(f"{name} is called with something else than arguments")
        return _FUNCTIONS[name](arguments, spend)
    if name in _INERT or is_inert(function):
        return Placeholder(function, arguments)
    return None


def is_inert(name: Global) -> bool:
    """Return whether a name is in a package whose objects become placeholders."""
    return name.module.split(".")[0] in _INERT_PACKAGES


def storage(key: Any) -> Storage:
    """Make the record of a persistent id.

    Args:
        key: ("storage", class, name, location, numel). In files before PyTorch 1.6 `None` or the
            (name, offset, numel) of a view follows.

    Raises:
        Unusable: If the key is of another form.
    """
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage":
        raise Unusable("a persistent id is not a storage's")
    _, kind, name, _, numel, *view = key
    dtype = _STORAGES.get(str(kind)) if isinstance(kind, Global) else None
    if dtype is None:
        raise Unusable("a storage is of an unknown kind")
    if not isinstance(name, str) or not _is_natural(numel):
        raise Unusable("a storage has no name or no size")
    first = 0
    if view and view[0] is not None:
        if not isinstance(view[0], tuple) or len(view[0]) != 3 or not _is_natural(view[0][1]):
            raise Unusable("a storage is a view, but does not tell of what")
        first = view[0][1]
    return Storage(name, DTYPES[dtype], numel, first)


def _tensor(arguments: tuple, spend: Callable[[int], None]) -> Tensor:
    if len(arguments) < 4:
        raise Unusable("a tensor needs a storage, an offset, a shape and strides")
    source, offset, shape, strides, *_ = arguments
    return _view(source, offset, shape, strides)


def _tensor_of_dtype(arguments: tuple, spend: Callable[[int], None]) -> Tensor:
    if len(arguments) < 7:
        raise Unusable("a tensor needs a storage, an offset, a shape, strides and a dtype")
    name = arguments[6]
    is_dtype = isinstance(name, Global) and name.module == "torch" and name.name in DTYPES
    if not is_dtype:
        raise Unusable("a tensor is of an unknown dtype")
    source, offset, shape, strides, *_ = arguments
    return _view(source, offset, shape, strides, DTYPES[name.name])


def _view(source: Any, offset: Any, shape: Any, strides: Any, dtype=None) -> Tensor:
    if not isinstance(source, Storage) or not _is_natural(offset):
        raise Unusable("a tensor has no storage or no offset")
    if not _is_naturals(shape) or not _is_naturals(strides) or len(shape) != len(strides):
        raise Unusable("a tensor's shape and strides are not natural numbers, one of each")
    dtype = dtype or source.dtype
    if len(shape) > _MAX_RANK or math.prod(filter(None, shape)) > _MAX_ELEMENTS:
        raise Unusable("a tensor has a shape that no array can have")
    # Strides of axes of size 1 may be any number.
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides))
    tensor = Tensor(source, offset + source.first, shape, strides, dtype)
    end = (tensor.offset + tensor.span) * dtype.itemsize
    if end > source.numel * source.dtype.itemsize:
        raise Unusable(
            f"a tensor uses {end:,} bytes of a storage of "
            f"{source.numel * source.dtype.itemsize:,}"
        )
    return tensor


def _first(arguments: tuple, spend: Callable[[int], None]) -> Any:
    if not arguments or not isinstance(arguments[0], Tensor):
        raise Unusable("a parameter holds no tensor")
    return arguments[0]


def _subclass(arguments: tuple, spend: Callable[[int], None]) -> Any:
    """Rebuild a tensor of a subclass from (function, class, the function's arguments, state)."""
    if len(arguments) != 4:
        raise Unusable("a tensor of a subclass needs a function, a class, arguments and a state")
    tensor = call(arguments[0], arguments[2], spend)
    if not isinstance(tensor, Tensor):
        raise Unusable("a tensor of a subclass is rebuilt by something that makes no tensors")
    return tensor


def _dictionary(arguments: tuple, spend: Callable[[int], None]) -> dict:
    pairs = _only(arguments)
    if isinstance(pairs, dict):
        spend(len(pairs))
        return dict(pairs)
    result: dict = {}
    if not isinstance(pairs, (list, tuple)):
        raise Unusable("a dictionary is made of something else than pairs")
    spend(len(pairs))
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Unusable("a dictionary is made of something else than pairs")
        result[dictionary_key(pair[0])] = pair[1]
    return result


def _only(arguments: tuple) -> Any:
    if len(arguments) > 1:
        raise Unusable(f"a container is made of {len(arguments):,} arguments")
    return arguments[0] if arguments else ()


def _default_dictionary(arguments: tuple, spend: Callable[[int], None]) -> dict:
    return _dictionary(arguments[1:2], spend)


def _list(arguments: tuple, spend: Callable[[int], None]) -> list:
    items = _only(arguments)
    if not isinstance(items, (list, tuple)):
        raise Unusable("a list is made of something else than items")
    spend(len(items))
    return list(items)


def _tuple(arguments: tuple, spend: Callable[[int], None]) -> tuple:
    return tuple(_list(arguments, spend))


def dictionary_key(value: Any) -> Any:
    """Return a key that hashes in constant time: the value, or else a placeholder of it.

    Raises:
        Unusable: If no value of its type can be a key.
    """
    if isinstance(value, (list, dict)):
        raise Unusable(f"a {type(value).__name__} cannot be a dictionary's key")
    if isinstance(value, int) and abs(value) < 2**60 or value is None:
        return value
    if isinstance(value, (str, bytes, Global)):
        return value
    return Placeholder(Global("builtins", type(value).__name__), value)


_FUNCTIONS: dict[str, Callable[[tuple, Callable[[int], None]], Any]] = {
    "builtins.dict": _dictionary,
    "builtins.frozenset": _list,
    "builtins.list": _list,
    "builtins.set": _list,  # a set would hash its items, and hashing nested tuples is recursive
    "builtins.tuple": _tuple,
    "collections.Counter": _dictionary,
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _default_dictionary,
    "torch.Size": _tuple,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch.nn.parameter.Parameter": _first,
}


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_ELEMENTS


def _is_naturals(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_natural, value))
