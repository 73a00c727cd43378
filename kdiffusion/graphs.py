"""Plain TensorFlow graphs: traced once, kept between runs, and rid of what Python knows of them.

TensorFlow remembers for each operation the Python frames it was made in, some 60 of a Keras model:
a fifth of a gigabyte for SD 1.5. A graph that was read from its bytes has none, so each graph is
read from its bytes, and a graph whose identity is known is written to the cache of programs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import json
import os
import sys
import tempfile
import threading
import types
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras

from kdiffusion import compile_cache, processor

# Packages whose code the versions in a graph's name tell of, as Python's own.
_OURS = ("kdiffusion", "keras", "tensorflow", "weights_conversion")

# Functions of layers in the graph that is being traced, if one is, see `compilation.trace_once`.
shared: contextvars.ContextVar[dict | None] = contextvars.ContextVar("shared", default=None)


class Graph(NamedTuple):
    """A traced function.

    Args:
        definition: `tf.compat.v1.GraphDef`.
        inputs: names of its input tensors, in the order of the arguments' leaves.
        outputs: names of its output tensors.
        structure: outputs by number, as the function returns them: nested lists, dictionaries.
        captured: tensors that the function reads from around it, its last inputs.
    """

    definition: Any
    inputs: Sequence[str]
    outputs: Sequence[str]
    structure: Any
    captured: Sequence[Any] = ()


class PlainGraph:
    """A function of nested tensors and variables, as one graph for each set of their shapes.

    Args:
        function: pure function.
        identity: function that gives a text that tells all that the other computes, so that its
            graphs may be kept for other processes; or gives `None`.
    """

    def __init__(self, function: Callable, identity: Callable[[], str | None] = lambda: None):
        self._function = function
        self._identity = identity
        self._loaded: dict[tuple, Callable] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments):
        import tensorflow as tf

        paths, values = zip(*keras.tree.flatten_with_path(arguments))
        leaves = [x if isinstance(x, tf.Variable) else tf.convert_to_tensor(x) for x in values]
        key = (paths, tuple((isinstance(x, tf.Variable), x.dtype, x.shape) for x in leaves))
        with self._lock:
            if key not in self._loaded:
                packed = keras.tree.pack_sequence_as(arguments, leaves)
                self._loaded[key] = self._load(packed, key)
        return self._loaded[key](*leaves)

    def __len__(self):
        """How many graphs there are by now."""
        return len(self._loaded)

    def _load(self, arguments, key):
        identity = self._identity()
        path = None if identity is None else _path(f"{identity}\n{key}")
        # Whatever is wrong with a file, the graph is traced instead.
        with contextlib.suppress(Exception):
            if path:
                return loaded(_read(path))
        graph = traced(self._function, arguments)
        if path and not graph.captured:
            _write(path, graph)
        return loaded(graph)


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


def traced(function: Callable, arguments: tuple) -> Graph:
    """Trace a function of tensors.

    The graph goes past TensorFlow's optimizer of graphs, Grappler: its passes over a U-Net take
    longer than two of the U-Net's steps, which are no faster for them.

    Args:
        function: pure function.
        arguments: its arguments, of nested tensors and `tf.Variable`s.

    Returns:
        `Graph`.
    """
    import tensorflow as tf

    flag, options = "disable_meta_optimizer", tf.config.optimizer
    inner = tf.function(function, autograph=False, experimental_attributes={"_noinline": True})

    def call(*arguments):
        # A call inside a graph keeps the options of the moment at which it is traced.
        before = options.get_experimental_options()
        options.set_experimental_options({flag: True})
        token = shared.set({})
        try:
            return inner(*arguments)
        finally:
            shared.reset(token)
            options.set_experimental_options({flag: before.get(flag, False)})

    concrete = tf.function(call, autograph=False).get_concrete_function(*arguments)
    structure = concrete.structured_outputs
    numbers = keras.tree.pack_sequence_as(structure, range(len(concrete.outputs)))
    return Graph(
        _with_names_of_its_own(concrete.graph.as_graph_def()),
        [tensor.name for tensor in concrete.inputs],
        [tensor.name for tensor in concrete.outputs],
        numbers,
        concrete.captured_inputs,
    )


def _with_names_of_its_own(definition):
    """Its functions bear names that no other graph's do, of this process or of another."""
    functions = definition.library.function
    digest = hashlib.sha256(definition.SerializeToString(deterministic=True)).hexdigest()[:16]
    names = {f.signature.name: f"kdiffusion_{digest}_{i}" for i, f in enumerate(functions)}
    for function in functions:
        function.signature.name = names[function.signature.name]
    for nodes in (definition.node, *(function.node_def for function in functions)):
        for node in nodes:
            for attribute in node.attr.values():
                for called in (attribute.func, *attribute.list.func):
                    if called.name in names:
                        called.name = names[called.name]
    return definition


def loaded(graph: Graph) -> Callable:
    """The function that a graph is of.

    Args:
        graph: `Graph`.

    Returns:
        Function of the leaves of the arguments that the graph was traced with.
    """
    import tensorflow as tf

    def imported():
        tf.graph_util.import_graph_def(graph.definition, name="")

    # Not `tf.function`, which does not tell the runtime of the functions that a graph brings along.
    everything = tf.compat.v1.wrap_function(imported, [])
    inputs, outputs = (
        [everything.graph.as_graph_element(name) for name in names]
        for names in (graph.inputs, graph.outputs)
    )
    run = everything.prune(inputs, outputs)

    def call(*leaves):
        values = [x.handle if isinstance(x, tf.Variable) else x for x in leaves]
        results = run(*values, *graph.captured)
        return keras.tree.map_structure(lambda number: results[number], graph.structure)

    return call


def _path(text: str) -> Path | None:
    """Where the graph that a text tells all of is kept, if graphs are kept."""
    folder, surroundings = compile_cache.folder(), _surroundings()
    if folder is None or surroundings is None:
        return None
    digest = hashlib.sha256(f"{surroundings}\n{text}".encode()).hexdigest()
    return folder / f"{digest}.graph"


@functools.cache
def _surroundings() -> str | None:
    """What else a graph depends on: the code, if it can be read, and what it asks the machine."""
    import tensorflow as tf

    root = Path(__file__).parent
    code = hashlib.sha256()
    try:
        for path in sorted(root.rglob("*.py")):
            code.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
        Path(__file__).read_bytes()  # none were found in an archive
    except OSError:
        return None
    settings = (keras.config.floatx(), keras.config.image_data_format())
    versions = (tf.version.VERSION, keras.version())
    return repr((code.hexdigest(), versions, sys.version, settings, processor.has_bfloat16()))


def _read(path: Path) -> Graph:
    import tensorflow as tf

    with zipfile.ZipFile(path) as file:
        signature = json.loads(file.read("signature.json"))
        definition = tf.compat.v1.GraphDef.FromString(file.read("graph.pb"))
    return Graph(definition, **signature)


def _write(path: Path, graph: Graph) -> None:
    signature = {name: getattr(graph, name) for name in ("inputs", "outputs", "structure")}
    if json.loads(json.dumps(signature)) != signature:
        return  # outputs in a tuple, say, which would come back as a list
    # A full disk must not fail a run.
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with open(handle, "wb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as file:
                file.writestr("signature.json", json.dumps(signature))
                file.writestr("graph.pb", graph.definition.SerializeToString())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
