"""Files that keep plain TensorFlow graphs, and the kernels that XLA compiled for them.

The name of a file is a digest of everything that determines the graph.
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

# The code of these packages, and Python's own, is known by the versions in a graph's digest.
_OURS = ("kdiffusion", "keras", "tensorflow", "weights_conversion")


class Graph(NamedTuple):
    """A traced function.

    Args:
        definition: `tf.compat.v1.GraphDef` of functions.
        main: str, name of the function that calls the others.
        dtypes: numbers of the dtypes of its outputs.
        structure: numbers of the outputs, nested in lists and dictionaries as the outputs are.
        captured: tensors that the function reads from outside; they are its last inputs.
    """

    definition: Any
    main: str
    dtypes: Sequence[int]
    structure: Any
    captured: Sequence[Any] = ()


def identity_of(function: Callable, model: keras.Model) -> str | None:
    """Return a text that identifies what a function computes of a model, apart from the weights.

    Args:
        function: function of the model and tensors.
        model: the model.

    Returns:
        A text, which is equal for equal computations in all processes. `None` if the computation
        uses other code than this library's and Keras's, such as a layer of the user's own or a
        function that replaces one of these.
    """
    layers = model._flatten_layers()
    modules = [module for name, module in [*sys.modules.items()] if name.startswith("kdiffusion.")]
    classes = {base for layer in layers for base in type(layer).__mro__}
    named = _is_ours(function.__module__) and function.__qualname__.isidentifier()
    as_written = all(map(_is_as_written, (keras.ops, *modules, *classes)))
    if not (named and as_written and all(map(_is_known, layers))):
        return None
    parts = [f"{function.__module__}.{function.__qualname__}"]
    with contextlib.suppress(TypeError):  # JSON raises it for a setting that it cannot hold
        return "\n".join([*parts, *map(_settings, layers)])
    return None


def _is_known(layer):
    own = _is_ours(type(layer).__module__) and not isinstance(layer, keras.layers.Lambda)
    return own and "call" not in vars(layer)


def _is_as_written(namespace):
    """Return whether no function of a module or a class was replaced by the user's own."""
    functions = (x for x in vars(namespace).values() if isinstance(x, types.FunctionType))
    return all(_is_ours(function.__module__) for function in functions)


def _is_ours(module):
    root = str(module).partition(".")[0]  # `None` for a function that was made at run time
    return root in _OURS or root in sys.stdlib_module_names


def _settings(layer):
    config = layer.get_config() | {"name": None, "remat": layer._remat_mode is not None}
    # Initializers do not change what is computed, and their seeds are random.
    config = {k: v for k, v in config.items() if not k.endswith("initializer")}
    return f"{type(layer).__module__}.{type(layer).__qualname__} {json.dumps(config)}"


def path_of(text: str) -> Path | None:
    """Return the file of the graph with this identity.

    Args:
        text: see `identity_of`, with the shapes of the inputs.

    Returns:
        Path of a file, which need not exist; `None` if no graphs are kept.
    """
    folder, surroundings = cache_folder.program_folder(), _surroundings()
    if folder is None or surroundings is None:
        return None
    digest = hashlib.sha256(f"{surroundings}\n{text}".encode()).hexdigest()
    return folder / f"{digest}.graph"


@functools.cache
def _surroundings() -> str | None:
    """Return what else a graph and its kernels depend on: the code and the machine.

    Returns:
        A text; `None` if the code cannot be read.
    """
    import tensorflow as tf

    root = Path(__file__).parents[1]
    code = hashlib.sha256()
    try:
        for path in sorted(root.rglob("*.py")):
            code.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
        Path(__file__).read_bytes()  # it fails in an archive, where no files were found
    except OSError:
        return None
    settings = (keras.config.floatx(), keras.config.image_data_format())
    # Another build of the same version may compile differently.
    installed = os.path.getmtime(tf.__file__)
    versions = (tf.version.VERSION, installed, keras.version(), sys.version)
    machine = (sorted(processor.flags()), os.environ.get("XLA_FLAGS"))
    return repr((code.hexdigest(), versions, settings, machine))


def read(path: Path) -> tuple[Graph, dict[str, str]]:
    """Read a graph and restore its kernels to TensorFlow.

    Args:
        path: see `path_of`.

    Returns:
        `Graph`, and the dictionary of its kernels.

    Raises:
        Exception: If the file is missing or damaged.
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
    """Write a graph, if a file can hold all of it; a full disk does not fail a run.

    Args:
        path: see `path_of`.
        graph: `Graph`.
        kernels: see `kernel_files.collect`.
    """
    signature = {name: getattr(graph, name) for name in ("main", "dtypes", "structure")}
    if graph.captured or json.loads(json.dumps(signature)) != signature:
        return  # JSON changes it: outputs in a tuple would become a list
    with contextlib.suppress(OSError), replacing(path) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("signature.json", json.dumps(signature))
            file.writestr("kernels.json", json.dumps(kernels))
            file.writestr("graph.pb", graph.definition.SerializeToString())
