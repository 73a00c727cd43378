"""Plain TensorFlow graphs, and the kernels that XLA compiled for them, in files between runs.

A file's name is a digest of all that the graph follows from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import types
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras

from kdiffusion.files import replacing
from kdiffusion.runtime import cache_folder, kernel_files, processor

# Packages whose code the versions in a graph's name tell of, as Python's own.
_OURS = ("kdiffusion", "keras", "tensorflow", "weights_conversion")


class Graph(NamedTuple):
    """A traced function.

    Args:
        definition: `tf.compat.v1.GraphDef` of functions.
        main: str, name of the one that the others are called by.
        dtypes: numbers of the dtypes of its outputs.
        structure: outputs by number, as the function returns them: nested lists, dictionaries.
        captured: tensors that the function reads from around it, its last inputs.
    """

    definition: Any
    main: str
    dtypes: Sequence[int]
    structure: Any
    captured: Sequence[Any] = ()


def identity_of(function: Callable, model: keras.Model) -> str | None:
    """A text that tells all of what a function computes of a model, besides the weights.

    Args:
        function: function of the model and tensors.
        model: the model.

    Returns:
        The same text for the same computation also in other processes. `None` if there is code in
        it that is neither this library's nor Keras's, such as a layer of somebody's own or a
        function in place of one of these.
    """
    layers = model._flatten_layers()
    modules = [module for name, module in [*sys.modules.items()] if name.startswith("kdiffusion.")]
    classes = {base for layer in layers for base in type(layer).__mro__}
    named = _is_ours(function.__module__) and function.__qualname__.isidentifier()
    as_written = all(map(_is_as_written, (keras.ops, *modules, *classes)))
    if not (named and as_written and all(map(_is_known, layers))):
        return None
    parts = [f"{function.__module__}.{function.__qualname__}"]
    with contextlib.suppress(TypeError):  # JSON's, of a setting that has no text
        return "\n".join([*parts, *map(_settings, layers)])
    return None


def _is_known(layer):
    own = _is_ours(type(layer).__module__) and not isinstance(layer, keras.layers.Lambda)
    return own and "call" not in vars(layer)


def _is_as_written(namespace):
    """Whether nobody has put a function of their own into a module or a class."""
    functions = (x for x in vars(namespace).values() if isinstance(x, types.FunctionType))
    return all(_is_ours(function.__module__) for function in functions)


def _is_ours(module):
    root = str(module).partition(".")[0]  # a function that was made at run time may have none
    return root in _OURS or root in sys.stdlib_module_names


def _settings(layer):
    config = layer.get_config() | {"name": None, "remat": layer._remat_mode is not None}
    # What weights began with has no part in what is computed, and is drawn anew each time.
    config = {k: v for k, v in config.items() if not k.endswith("initializer")}
    return f"{type(layer).__module__}.{type(layer).__qualname__} {json.dumps(config)}"


def path_of(text: str) -> Path | None:
    """Where the graph that a text tells all of is kept.

    Args:
        text: see `identity_of`, and the shapes of the inputs.

    Returns:
        Path of a file, which need not be there; `None` if no graphs are kept.
    """
    folder, surroundings = cache_folder.program_folder(), _surroundings()
    if folder is None or surroundings is None:
        return None
    digest = hashlib.sha256(f"{surroundings}\n{text}".encode()).hexdigest()
    return folder / f"{digest}.graph"


@functools.cache
def _surroundings() -> str | None:
    """What else a graph and its kernels depend on: the code, if it can be read, and the machine."""
    import tensorflow as tf

    root = Path(__file__).parents[1]
    code = hashlib.sha256()
    try:
        for path in sorted(root.rglob("*.py")):
            code.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
        Path(__file__).read_bytes()  # none were found in an archive
    except OSError:
        return None
    settings = (keras.config.floatx(), keras.config.image_data_format())
    # Another build of the same version may compile otherwise.
    installed = os.path.getmtime(tf.__file__)
    versions = (tf.version.VERSION, installed, keras.version(), sys.version)
    machine = (sorted(processor.flags()), os.environ.get("XLA_FLAGS"))
    return repr((code.hexdigest(), versions, settings, machine))


def read(path: Path) -> tuple[Graph, dict[str, str]]:
    """Read a graph, whose kernels are given to TensorFlow.

    Args:
        path: see `path_of`.

    Returns:
        `Graph`, and its kernels as `write` was given them.

    Raises:
        Exception: If the file is not there, or damaged.
    """
    import tensorflow as tf

    with zipfile.ZipFile(path) as file:
        signature = json.loads(file.read("signature.json"))
        kernels = json.loads(file.read("kernels.json"))
        definition = tf.compat.v1.GraphDef.FromString(file.read("graph.pb"))
    if signature["main"] not in {f.signature.name for f in definition.library.function}:
        raise ValueError(f"{path} lacks its main function.")
    kernel_files.restore(kernels)
    return Graph(definition, **signature), kernels


def write(path: Path, graph: Graph, kernels: dict[str, str]) -> None:
    """Keep a graph, if a file can tell all of it; a full disk does not fail a run.

    Args:
        path: see `path_of`.
        graph: `Graph`.
        kernels: see `kernel_files.collect`.
    """
    signature = {name: getattr(graph, name) for name in ("main", "dtypes", "structure")}
    if graph.captured or json.loads(json.dumps(signature)) != signature:
        return  # outputs in a tuple, say, which would come back as a list
    with contextlib.suppress(OSError), replacing(path) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("signature.json", json.dumps(signature))
            file.writestr("kernels.json", json.dumps(kernels))
            file.writestr("graph.pb", graph.definition.SerializeToString())
