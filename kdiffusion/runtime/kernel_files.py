"""Kernels that XLA compiled for plain graphs: taken from TensorFlow, and given back to it.

TensorFlow can keep them in a folder, as files that it trusts whatever is in them. So the folder is
this process's own: nothing is in it but what TensorFlow wrote just now, and what stood in a file
with checksums. TensorFlow reads files of text as well as those that it writes, which it complains
about at each start, so text is what they are given back as.
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

# Bytes. A picture's kernels take some 3 MB; a full disk would fail the run.
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
    """The folder where TensorFlow looks for kernels and puts them; it is gone with the process.

    TensorFlow has to be told of it before it does anything else. Where it is too late, nothing ever
    is in the folder.

    Returns:
        Path of a folder; `None` on JAX, and where nothing is kept: switched off, decided otherwise
        by the user's own flags, no space, or a processor that is not known.
    """
    known = keras.backend.backend() == "tensorflow" and processor.flags()
    if not known or cache_folder.program_folder() is None:
        return None
    before = os.environ.get(_VARIABLE, "")
    try:
        if "persistent_cache" in before or shutil.disk_usage(tempfile.gettempdir()).free < _SPACE:
            return None
        path = Path(tempfile.mkdtemp(prefix="kdiffusion-"))  # for its owner alone
    except OSError:
        return None
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    _tell_tensorflow(path, before)
    return path


def _tell_tensorflow(path, before):
    import tensorflow as tf

    flags = {
        "tf_xla_persistent_cache_directory": path,
        "tf_xla_persistent_cache_device_types": "CPU",
        # A file's name is a digest of the program; the program itself need not be in it.
        "tf_xla_disable_strict_signature_checks": "true",
    }
    os.environ[_VARIABLE] = " ".join([before, *(f"--{k}={v}" for k, v in flags.items())]).strip()
    tf.identity(0)  # flags are read with the first operation
    if before:
        os.environ[_VARIABLE] = before
    else:
        del os.environ[_VARIABLE]


def kernel_names() -> set[str]:
    """The names of the kernels that are there."""
    path = kernel_folder()
    return set() if path is None else {entry.name for entry in path.glob("*.pb")}


def collect(names: set[str]) -> dict[str, str]:
    """Kernels that TensorFlow has compiled, as text to be given back to it.

    Args:
        names: names of kernels that are there.

    Returns:
        Dictionary of names and texts; without kernels that are not of the form known here.
    """
    path, kernels = kernel_folder(), {}
    if path is not None:
        for name in names:
            with contextlib.suppress(OSError, LookupError, ValueError):
                kernels[name] = _as_text((path / name).read_bytes())
    return kernels


def restore(kernels: Mapping[str, str]) -> None:
    """Let TensorFlow find kernels that it compiled in another process.

    Args:
        kernels: dictionary of names and texts, which must be what `collect` returned.
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
    """The fields of a protocol buffer by number: integers, and whatever has a length."""
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
    """Seven bits in each byte, the lowest first, up to a byte below 128."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
