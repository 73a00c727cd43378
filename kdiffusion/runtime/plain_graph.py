"""Plain TensorFlow graphs: traced once, kept between runs, and without Python's stack frames.

TensorFlow stores for each operation the Python frames in which it was made, some 60 in a Keras
model: a fifth of a gigabyte for SD 1.5. A graph that is read from its bytes has none, so every
graph is converted to bytes and read again. A graph whose identity is known is also written to the
cache of programs.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import threading
from collections.abc import Callable

import keras

from kdiffusion.runtime import graph_files, kernel_files, tracing
from kdiffusion.runtime.graph_files import Graph


class PlainGraph:
    """A function of nested tensors and variables, with one graph for each set of their shapes.

    Args:
        function: pure function.
        identity: function that returns a text that identifies what `function` computes, or `None`.
            With a text, graphs are kept for other processes.
    """

    def __init__(self, function: Callable, identity: Callable[[], str | None] = lambda: None):
        self._function = function
        self._identity = identity
        self._loaded: dict[tuple, Callable] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments):
        leaves, key = _flat(arguments)
        with self._lock:
            if key not in self._loaded:
                packed = keras.tree.pack_sequence_as(arguments, leaves)
                self._loaded[key] = self._load(packed, self._path(key))
        return self._loaded[key](*leaves)

    def prepare(self, *arguments) -> None:
        """Begin to load the graph for such arguments in another thread, if it is kept.

        TensorFlow needs a second or two for the graph of a U-Net, most of it without Python's lock.
        A call waits until it is loaded.

        Args:
            arguments: as for a call; the values of tensors do not matter.
        """
        leaves, key = _flat(arguments)
        path = None if key in self._loaded else self._path(key)
        if path is not None and path.is_file():
            threading.Thread(target=self._load_ahead, args=(path, leaves, key)).start()

    def __len__(self):
        """Return the number of loaded graphs."""
        return len(self._loaded)

    def _path(self, key):
        identity = self._identity()
        return None if identity is None else graph_files.path_of(f"{identity}\n{key}")

    def _load(self, arguments, path):
        # The graph is traced if anything is wrong with its file.
        with contextlib.suppress(Exception):
            if path:
                graph, kernels = graph_files.read(path)
                return _kept(path, graph, loaded(graph), kernels)
        graph = traced(self._function, arguments)
        return _kept(path, graph, loaded(graph)) if path else loaded(graph)

    def _load_ahead(self, path, leaves, key):
        # If this fails, the call loads or traces the graph.
        with self._lock, contextlib.suppress(Exception):
            if key not in self._loaded:
                graph, kernels = graph_files.read(path)
                run = loaded(graph)
                run.instantiate(*leaves)
                self._loaded[key] = _kept(path, graph, run, kernels)


def _flat(arguments):
    """Return the tensors and variables of nested arguments, and the key of their graph."""
    import tensorflow as tf

    paths, values = zip(*keras.tree.flatten_with_path(arguments))
    leaves = [x if isinstance(x, tf.Variable) else tf.convert_to_tensor(x) for x in values]
    return leaves, (paths, tuple((isinstance(x, tf.Variable), x.dtype, x.shape) for x in leaves))


def traced(function: Callable, arguments: tuple) -> Graph:
    """Trace a function of tensors.

    TensorFlow's optimizer of graphs, Grappler, is switched off here and in `loaded`: its passes
    over a U-Net take longer than two steps of the U-Net, and make them no faster.

    Args:
        function: pure function.
        arguments: its arguments, of nested tensors and `tf.Variable`s.

    Returns:
        `Graph`.
    """
    import tensorflow as tf

    flag, options = "disable_meta_optimizer", tf.config.optimizer
    main = tf.function(function, autograph=False)

    def call(*arguments):
        # A call inside a graph keeps the options that are set when it is traced.
        before = options.get_experimental_options()
        options.set_experimental_options({flag: True})
        token = tracing.layer_functions.set({})
        try:
            return main(*arguments)
        finally:
            tracing.layer_functions.reset(token)
            options.set_experimental_options({flag: before.get(flag, False)})

    concrete = tf.function(call, autograph=False).get_concrete_function(*arguments)
    definition = _with_single_calls_inlined(concrete.graph.as_graph_def())
    definition = _with_names_of_its_own(definition)
    (name,) = (node.attr["f"].func.name for node in definition.node if "f" in node.attr)
    del definition.node[:]
    structure = concrete.structured_outputs
    return Graph(
        definition,
        name,
        [tensor.dtype.as_datatype_enum for tensor in concrete.outputs],
        keras.tree.pack_sequence_as(structure, range(len(concrete.outputs))),
        concrete.captured_inputs,
    )


def _with_single_calls_inlined(definition):
    """Inline functions that are called once, because their callers are then ready sooner."""
    functions = definition.library.function
    nodes = (node for function in functions for node in function.node_def)
    calls = collections.Counter(node.attr["f"].func.name for node in nodes if "f" in node.attr)
    for function in functions:
        # XLA compiles whole functions, so these stay.
        if calls[function.signature.name] == 1 and "_XlaMustCompile" not in function.attr:
            function.attr.pop("_noinline", None)
    return definition


def _with_names_of_its_own(definition):
    """Rename the functions of a graph, so that no graph of any process has the same names."""
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


def _kept(path, graph, run, kernels=None):
    """Make a function like `run`, whose first call writes the graph and new kernels to its file.

    Kernels are compiled by then. `kernels` are those in the file, or `None` if there is no file.
    """
    unwritten = [graph]

    def call(*leaves):
        before = kernel_files.kernel_names() if unwritten else set()
        results = run(*leaves)
        for graph in unwritten:
            new = kernel_files.collect(kernel_files.kernel_names() - before)
            if new or kernels is None:
                graph_files.write(path, graph, {**(kernels or {}), **new})
        unwritten.clear()
        return results

    return call


def loaded(graph: Graph) -> Loaded:
    """Load the function of a graph into TensorFlow.

    Args:
        graph: `Graph`.

    Returns:
        `Loaded`, a function of the leaves of the arguments that the graph was traced with.
    """
    import tensorflow as tf

    def imported():
        tf.graph_util.import_graph_def(graph.definition, name="")

    # `tf.function` would not pass the functions of a graph to the runtime.
    tf.compat.v1.wrap_function(imported, [])
    return Loaded(graph.main, graph.dtypes, graph.structure, graph.captured)


class Loaded:
    """A function that TensorFlow has loaded, by its name.

    Args:
        main, dtypes, structure, captured: see `Graph`.
    """

    def __init__(self, main, dtypes, structure, captured):
        import tensorflow as tf

        config = tf.compat.v1.ConfigProto()
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        self._settings = {"Tout": dtypes, "f": main, "config_proto": config.SerializeToString()}
        self._structure = structure
        self._captured = captured

    def __call__(self, *leaves):
        import tensorflow as tf

        inputs = self._inputs(leaves)
        results = tf.raw_ops.StatefulPartitionedCall(args=inputs, **self._settings)
        return keras.tree.map_structure(lambda number: results[number], self._structure)

    def instantiate(self, *leaves) -> None:
        """Let TensorFlow prepare the function for its first call.

        This is a call that is cancelled beforehand. TensorFlow notices it only when it would begin
        to compute, and keeps the prepared function for calls with the same attributes.

        Args:
            leaves: see `loaded`; their values do not matter.
        """
        import tensorflow as tf
        from tensorflow.python.eager import cancellation, context, execute

        inputs = self._inputs(leaves)
        attributes = {
            "Tin": [x.dtype.as_datatype_enum for x in inputs],
            **self._settings,
            "config": "",
            "executor_type": "",
        }
        cancelled = cancellation.CancellationManager()
        cancelled.start_cancel()
        with contextlib.suppress(tf.errors.CancelledError):
            execute.execute_with_cancellation(
                "StatefulPartitionedCall",
                len(self._settings["Tout"]),
                inputs,
                tuple(itertools.chain.from_iterable(attributes.items())),
                context.context(),
                cancelled,
            )

    def _inputs(self, leaves):
        import tensorflow as tf

        values = (x.handle if isinstance(x, tf.Variable) else x for x in leaves)
        return [*values, *self._captured]
