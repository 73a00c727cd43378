"""Plain TensorFlow graphs: traced once, kept between runs, and rid of what Python knows of them.

TensorFlow remembers for each operation the Python frames it was made in, some 60 of a Keras model:
a fifth of a gigabyte for SD 1.5. A graph that was read from its bytes has none, so each graph is
read from its bytes, and a graph whose identity is known is written to the cache of programs.
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
        leaves, key = _flat(arguments)
        with self._lock:
            if key not in self._loaded:
                packed = keras.tree.pack_sequence_as(arguments, leaves)
                self._loaded[key] = self._load(packed, self._path(key))
        return self._loaded[key](*leaves)

    def prepare(self, *arguments) -> None:
        """Begin to load the graph for such arguments, if it is kept, in a thread of its own.

        TensorFlow needs a second or two for a U-Net's, most of it without Python's lock. A call
        waits until it is done.

        Args:
            arguments: tensors whose values do not matter, and the variables.
        """
        leaves, key = _flat(arguments)
        path = None if key in self._loaded else self._path(key)
        if path is not None and path.is_file():
            threading.Thread(target=self._load_ahead, args=(path, leaves, key)).start()

    def __len__(self):
        """How many graphs there are by now."""
        return len(self._loaded)

    def _path(self, key):
        identity = self._identity()
        return None if identity is None else graph_files.path_of(f"{identity}\n{key}")

    def _load(self, arguments, path):
        # Whatever is wrong with a file, the graph is traced instead.
        with contextlib.suppress(Exception):
            if path:
                graph, kernels = graph_files.read(path)
                return _kept(path, graph, loaded(graph), kernels)
        graph = traced(self._function, arguments)
        return _kept(path, graph, loaded(graph)) if path else loaded(graph)

    def _load_ahead(self, path, leaves, key):
        # What does not work here is done by the call.
        with self._lock, contextlib.suppress(Exception):
            if key not in self._loaded:
                graph, kernels = graph_files.read(path)
                run = loaded(graph)
                run.instantiate(*leaves)
                self._loaded[key] = _kept(path, graph, run, kernels)


def _flat(arguments):
    """The tensors and variables of nested arguments, and what a graph has to know of them."""
    import tensorflow as tf

    paths, values = zip(*keras.tree.flatten_with_path(arguments))
    leaves = [x if isinstance(x, tf.Variable) else tf.convert_to_tensor(x) for x in values]
    return leaves, (paths, tuple((isinstance(x, tf.Variable), x.dtype, x.shape) for x in leaves))


def traced(function: Callable, arguments: tuple) -> Graph:
    """Trace a function of tensors.

    The graph goes past TensorFlow's optimizer of graphs, Grappler, here and in `loaded`: its passes
    over a U-Net take longer than two of the U-Net's steps, which are no faster for them.

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
        # A call inside a graph keeps the options of the moment at which it is traced.
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
    """A function that is called once becomes a part of its caller, and is ready with it."""
    functions = definition.library.function
    nodes = (node for function in functions for node in function.node_def)
    calls = collections.Counter(node.attr["f"].func.name for node in nodes if "f" in node.attr)
    for function in functions:
        # XLA compiles functions, not parts of them.
        if calls[function.signature.name] == 1 and "_XlaMustCompile" not in function.attr:
            function.attr.pop("_noinline", None)
    return definition


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


def _kept(path, graph, run, kernels=None):
    """The function that a graph is of, `run`; its first call writes what the file lacks.

    Kernels are there by then. Without a file there are none yet: `None`.
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
    """The function that a graph is of, known to TensorFlow.

    Args:
        graph: `Graph`.

    Returns:
        Function of the leaves of the arguments that the graph was traced with.
    """
    import tensorflow as tf

    def imported():
        tf.graph_util.import_graph_def(graph.definition, name="")

    # Not `tf.function`, which does not tell the runtime of the functions that a graph brings along.
    tf.compat.v1.wrap_function(imported, [])
    return Loaded(graph.main, graph.dtypes, graph.structure, graph.captured)


class Loaded:
    """A function that TensorFlow knows by a name.

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
        """Let TensorFlow do what it does with a function before the function first runs.

        It is a call that was cancelled beforehand: TensorFlow notices that where it would begin to
        compute. The next call, of the same attributes, finds the function as it is needed.

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
