"""Compile functions: by XLA, or as plain TensorFlow graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from kdiffusion.runtime import backend, cache_folder, graph_files, plain_graph


def use_jit(jit_compile: bool | str) -> bool:
    """Resolve the compile policy `"auto"`.

    Args:
        jit_compile: `True`, `False` or `"auto"`. Automatic means XLA everywhere but on TensorFlow's
            CPU. There, a graph with the kernels of oneDNN is faster for every dtype and ready
            sooner, and `tracing.fuse` compiles with XLA the few parts where XLA is better.

    Returns:
        bool, whether to compile whole networks with XLA.

    Raises:
        ValueError: If it is none of these.
    """
    if jit_compile == "auto":
        return backend.name() == "jax" or backend.on_accelerator()
    if not isinstance(jit_compile, bool):
        raise ValueError(
            f"`jit_compile` must be True, False or 'auto'. Received: jit_compile={jit_compile!r}"
        )
    return jit_compile


def compile_function(
    function: Callable, jit_compile: bool, identity: Callable[[], str | None] = lambda: None
) -> Callable:
    """Compile a function of nested tensors; it is traced once for each set of shapes.

    Args:
        function: pure function of dictionaries, lists or tuples of tensors.
        jit_compile: bool, whether to use XLA; `False` means a plain TensorFlow graph. JAX always
            uses XLA.
        identity: see `plain_graph.PlainGraph`, the only one that uses it.

    Returns:
        The compiled function.
    """
    if backend.name() == "jax":
        import jax

        _keep_programs()
        return jax.jit(function)
    import tensorflow as tf

    if not jit_compile and not backend.on_accelerator():
        return plain_graph.PlainGraph(function, identity)
    return tf.function(function, jit_compile=jit_compile, autograph=False)


def _keep_programs() -> None:
    """Let JAX keep its compiled programs between runs, unless the user has configured it."""
    import jax

    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None and settings.jax_enable_compilation_cache:
        folder = cache_folder.program_folder()
        if folder is not None:
            settings.update("jax_compilation_cache_dir", str(folder))


class Program:
    """A compiled function of a model, its weights and further tensors.

    The weights are arguments, so changed weights, and another model of the same architecture, are
    seen by the next call without a new compilation.

    Args:
        function: pure function `(model, *tensors) -> tensors`.
        jit_compile: bool, whether to use XLA.
    """

    def __init__(self, function: Callable, jit_compile: bool):
        self._function = function
        self._jit_compile = jit_compile
        self._compiled: dict[Any, Callable] = {}
        self._model: Any = None

    def __call__(self, model: keras.Model, *tensors):
        return self._compiled_for(model)(backend.weights_of(model), *tensors)

    def prepare(self, model: keras.Model, *tensors) -> None:
        """Begin to make the program of such tensors ready, in a thread, where that saves time.

        Args:
            model: the model, whose weights may be unread.
            tensors: of the right shapes; their values do not matter.
        """
        compiled = self._compiled_for(model)
        if isinstance(compiled, plain_graph.PlainGraph):
            compiled.prepare(backend.weights_of(model), *tensors)

    def _compiled_for(self, model):
        self._model = model
        key = (type(model), getattr(model, "architecture", model), model.dtype_policy.name)
        if key not in self._compiled:
            self._compiled[key] = compile_function(
                self._traceable(), self._jit_compile, self._identity
            )
        return self._compiled[key]

    def _identity(self):
        return graph_files.identity_of(self._function, self._model)

    def _traceable(self):
        """Return a new function each time: JAX shares traces between equal functions."""

        def call(weights, *tensors):
            # The model is looked up when the function is traced: a closure would keep it alive.
            with backend.with_weights(self._model, weights):
                return self._function(self._model, *tensors)

        return call
