"""How functions become compiled programs, of XLA or as plain TensorFlow graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from kdiffusion.runtime import backend, cache_folder, plain_graph

# Elements of a tensor. A call of a compiled kernel costs some 100 microseconds and its compilation
# 50 milliseconds, which a few passes over fewer elements are not worth.
_WORTH_FUSING = 2**17

# Elements of a feature map up to which equal layers are one function, see `trace_once`: 64 MiB.
_SHARED_ELEMENTS = 2**24


def use_jit(jit_compile: bool | str) -> bool:
    """Resolve the compile policy `"auto"`.

    Args:
        jit_compile: `True`, `False` or `"auto"`. Automatic means XLA everywhere but on TensorFlow's
            CPU, where a graph with the kernels of oneDNN is faster for every dtype, and ready
            sooner; what XLA is better at is compiled by it there too, see `fuse`.

    Returns:
        Whether to compile the whole network with XLA.
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
        jit_compile: bool, whether to use XLA; `False` means a plain TensorFlow graph. JAX has
            nothing but XLA and uses it always.
        identity: see `graphs.PlainGraph`; what XLA compiles does without.

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


def trace_once(call: Callable) -> Callable:
    """The `call` of a layer that a network repeats: a plain graph has it once for equal layers.

    TensorFlow takes a millisecond or two for an operation of a graph until it first runs, and a
    U-Net has thousands. The equal layers become calls of one function, with their own weights.

    Args:
        call: method `(layer, *tensors) -> tensor` of a layer that its `get_config` tells all of; a
            tensor may be `None`.
    """

    @functools.wraps(call)
    def shared(layer, *tensors):
        traces = plain_graph.shared.get()
        if traces is None or layer._remat_mode is not None or _is_large(tensors[0]):
            return call(layer, *tensors)
        import tensorflow as tf

        weights = [tf.convert_to_tensor(variable.value) for variable in layer.variables]
        config = layer.get_config() | {"name": None, "kernel_initializer": None}
        shapes = [None if x is None else (x.shape, x.dtype) for x in (*weights, *tensors)]
        key = (type(layer), repr((config, shapes)))
        if key not in traces:

            def compute(weights, *tensors):
                with keras.StatelessScope(state_mapping=list(zip(layer.variables, weights))):
                    return call(layer, *tensors)

            traces[key] = tf.function(
                compute, autograph=False, experimental_attributes={"_noinline": True}
            )
        return traces[key](weights, *tensors)

    return shared


def _is_large(x):
    # A function holds its arguments to its end, also those that it needs no more.
    return x.shape.is_fully_defined() and x.shape.num_elements() > _SHARED_ELEMENTS


def fuse(function: Callable) -> Callable:
    """A function of tensors that XLA compiles as a whole also inside a plain TensorFlow graph.

    Where XLA compiles everything around it, in eager calls, and where the first tensor is small or
    of unknown shape, it is the function itself.

    Args:
        function: pure function of tensors and numbers, at the top level of a module.
    """
    return _fused(function) if backend.name() == "tensorflow" else function


@functools.cache
def _fused(function):
    import tensorflow as tf

    compiled = tf.function(function, jit_compile=True, autograph=False)

    def call(x, *others):
        x = tf.convert_to_tensor(x)  # of a Keras variable, which no compiled function takes
        large = x.shape.is_fully_defined() and x.shape.num_elements() >= _WORTH_FUSING
        fused = large and not tf.executing_eagerly()
        return compiled(x, *others) if fused else function(x, *others)

    return call


def after(tensor: Any, other: Any) -> Any:
    """The tensor, which nothing is computed from before another is there.

    A plain TensorFlow graph begins with all that follows from the weights alone, and holds it until
    it is needed. XLA orders its operations with an eye on memory.
    """
    if backend.name() != "tensorflow":
        return tensor
    import tensorflow as tf

    with tf.control_dependencies([other]):
        return tf.identity(tensor)


def map_in_turn(function: Callable, elements: Any, shape: Sequence[int], dtype: str) -> Any:
    """Apply a function along the first axis of a tensor, one element after the other.

    Keras's `ops.map` computes ten elements at a time in a TensorFlow graph, and holds as many.

    Args:
        function: pure function of a tensor to a tensor.
        elements: tensor of n elements.
        shape: shape of a result.
        dtype: dtype of a result.

    Returns:
        Tensor of n results.
    """
    if backend.name() != "tensorflow":
        return keras.ops.map(function, elements)
    import tensorflow as tf

    like = tf.TensorSpec(shape, dtype)
    return tf.map_fn(function, elements, fn_output_signature=like, parallel_iterations=1)


def stack_in_turn(
    function: Callable, count: int, shape: Sequence[int], dtype: str, first: Any
) -> Any:
    """Compute n tensors one after the other, each into its place among all of them.

    Unlike with `map_in_turn` there is nothing to be stacked in the end, which takes as much memory
    again; in TensorFlow it has no gradient.

    Args:
        function: pure function of an int32 scalar, the number of a tensor.
        count: int, n.
        shape: shape of one.
        dtype: dtype of one.
        first: tensor that the function needs, before which no memory is taken.

    Returns:
        Tensor (n, *shape).
    """
    if backend.name() != "tensorflow":
        return keras.ops.map(function, keras.ops.arange(count))
    import tensorflow as tf

    def fill(i, tensors):
        # `tf.tensor_scatter_nd_update` copies all of them each time.
        return i + 1, tf.raw_ops.InplaceUpdate(x=tensors, i=i[None], v=function(i)[None])

    with tf.control_dependencies([first]):
        empty = tf.raw_ops.Empty(shape=(count, *shape), dtype=dtype)
    state = (tf.constant(0), empty)
    return tf.while_loop(lambda i, _: i < count, fill, state, parallel_iterations=1)[1]


def _keep_programs() -> None:
    """Let JAX keep its compiled programs between runs, unless its user has decided that."""
    import jax

    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None and settings.jax_enable_compilation_cache:
        folder = cache_folder.folder()
        if folder is not None:
            settings.update("jax_compilation_cache_dir", str(folder))
