"""Kernels that XLA compiled for plain graphs: collected from TensorFlow, and restored to it.

TensorFlow can keep kernels in a folder, as files whose content it trusts. The folder is therefore
this process's own: it holds only kernels that TensorFlow wrote in this process, and kernels that
were read from a file with checksums. TensorFlow reads text and binary files, but logs an error for
each binary one at every start, so they are restored as text.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from kdiffusion.files import replacing
from kdiffusion.runtime import cache_folder, processor

_VARIABLE = "TF_XLA_FLAGS"

# Bytes. The kernels of an image take some 3 MB; a full disk would fail the run.
_SPACE = 2**28

# `XlaSerializedCacheEntry` of tensorflow/compiler/jit/xla_compilation_cache.proto, as text.
_ENTRY = (
    'key {{ signature_fingerprint: {} cluster_fingerprint: {} device_type: "{}" prefix: "{}" }} '
    'executable: "{}"'
)
_KEY, _EXECUTABLE = 1, 3  # numbers of its fields
_OCTAL = [f"\\{byte:03o}" for byte in range(256)]


@functools.cache
def kernel_folder() -> Path | None:
    """Return the folder where TensorFlow reads and writes kernels; it is removed at exit.

    TensorFlow reads its name with the first operation. If an operation ran before, the folder stays
    empty.

    Returns:
        Path of a folder. `None` on JAX, and if kernels are not kept: this is switched off, the
        user's own flags name a folder, there is no space, or the processor is not known.
    """
    known = keras.backend.backend() == "tensorflow" and processor.flags()
    if not known or cache_folder.program_folder() is None:
        return None
    before = os.environ.get(_VARIABLE, "")
    try:
        if "persistent_cache" in before or shutil.disk_usage(tempfile.gettempdir()).free < _SPACE:
            return None
        path = Path(tempfile.mkdtemp(prefix="kdiffusion-"))  # nobody else may read or write it
    except OSError:
        return None
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    _announce(path, before)
    return path


def _announce(path, before):
    """Pass the folder to TensorFlow, whose flags from `before` stay."""
    import tensorflow as tf

    flags = {
        "tf_xla_persistent_cache_directory": path,
        "tf_xla_persistent_cache_device_types": "CPU",
        # The name of a file is a digest of its program, so the file need not hold the program.
        "tf_xla_disable_strict_signature_checks": "true",
    }
    os.environ[_VARIABLE] = " ".join([before, *(f"--{k}={v}" for k, v in flags.items())]).strip()
    tf.identity(0)  # flags are read with the first operation
    if before:
        os.environ[_VARIABLE] = before
    else:
        del os.environ[_VARIABLE]


def kernel_names() -> set[str]:
    """Return the names of the kernels in the folder."""
    path = kernel_folder()
    return set() if path is None else {entry.name for entry in path.glob("*.pb")}


def collect(names: set[str]) -> dict[str, str]:
    """Read kernels that TensorFlow has compiled, as text for `restore`.

    Args:
        names: names of kernels in the folder.

    Returns:
        Dictionary of names and texts. Kernels that cannot be read are left out.
    """
    path, kernels = kernel_folder(), {}
    if path is not None:
        for name in names:
            with contextlib.suppress(OSError, LookupError, ValueError):
                kernels[name] = _as_text((path / name).read_bytes())
    return kernels


def restore(kernels: Mapping[str, str]) -> None:
    """Write kernels of another process where TensorFlow finds them.

    Args:
        kernels: dictionary of names and texts, a result of `collect`.
    """
    path = kernel_folder()
    if path is None:
        return
    for name, text in kernels.items():
        with replacing(path / name) as partial:
            partial.write_text(text, encoding="ascii")


def _as_text(entry):
    fields = _fields(entry)
    key = _fields(fields[_KEY])
    if sorted(key) != [1, 2, 3, 4]:
        raise ValueError(f"A kernel's key must have the fields 1 to 4. Received: {sorted(key)}")
    values = (x.decode("ascii") if isinstance(x, bytes) else x for _, x in sorted(key.items()))
    return _ENTRY.format(*values, "".join(map(_OCTAL.__getitem__, fields[_EXECUTABLE])))


def _fields(message):
    """Return the fields of a protocol buffer by number: integers, and bytes of any length."""
    fields: dict[int, Any] = {}
    at = 0
    while at < len(message):
        tag, at = _integer(message, at)
        value, at = _integer(message, at)
        if tag & 7 == 2:
            value, at = message[at : at + value], at + value
        fields[tag >> 3] = value
    return fields


def _integer(message, at):
    """Read an integer of seven bits in each byte, the lowest first, up to a byte below 128."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
