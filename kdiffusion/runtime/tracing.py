"""Tools for traced functions: fused kernels, shared traces and the order of computations."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from kdiffusion.runtime import backend

# Elements of a tensor. A call of a compiled kernel costs some 100 microseconds and its compilation
# 50 milliseconds, which a few passes over fewer elements are not worth.
_WORTH_FUSING = 2**17

# Elements of a feature map up to which equal layers share a function, see `trace_once`: 64 MiB.
_SHARED_ELEMENTS = 2**24

# Functions of the layers of the plain graph that is being traced; `None` outside of one.
layer_functions: contextvars.ContextVar[dict | None] = contextvars.ContextVar(
    "layer_functions", default=None
)


def trace_once(call: Callable) -> Callable:
    """Decorate the `call` of a layer so that a plain graph holds it once for all equal layers.

    TensorFlow takes a millisecond or two for an operation of a graph until it first runs, and a
    U-Net has thousands. The equal layers become calls of one function, with their own weights.

    Args:
        call: method `(layer, *tensors) -> tensor` of a layer whose `get_config` is complete; a
            tensor may be `None`.

    Returns:
        Method with the same arguments and result.
    """

    @functools.wraps(call)
    def shared(layer, *tensors):
        traces = layer_functions.get()
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
    # A function holds its arguments to its end, even those that it needs no more.
    return x.shape.is_fully_defined() and x.shape.num_elements() > _SHARED_ELEMENTS


def fuse(function: Callable) -> Callable:
    """Let XLA compile a function of tensors as a whole, also inside a plain TensorFlow graph.

    The function itself is called where XLA compiles everything around it, in eager calls, and
    where the first tensor is small or of unknown shape.

    Args:
        function: pure function of tensors and numbers, at the top level of a module.

    Returns:
        Function with the same arguments and results.
    """
    return _fused(function) if backend.name() == "tensorflow" else function


@functools.cache
def _fused(function):
    import tensorflow as tf

    compiled = tf.function(function, jit_compile=True, autograph=False)

    def call(x, *others):
        x = tf.convert_to_tensor(x)  # compiled functions do not take Keras variables
        large = x.shape.is_fully_defined() and x.shape.num_elements() >= _WORTH_FUSING
        fused = large and not tf.executing_eagerly()
        return compiled(x, *others) if fused else function(x, *others)

    return call


def after_computing(tensor: Any, other: Any) -> Any:
    """Return `tensor`, used only after `other` is computed (a control dependency).

    A plain TensorFlow graph begins with everything that follows from the weights alone, and holds
    it until it is needed. XLA orders its operations with an eye on memory, so JAX's `tensor` is
    returned as it is.

    Args:
        tensor: tensor or variable, such as weights.
        other: tensor that is computed first.

    Returns:
        The values of `tensor`.
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
        Tensor (n, *shape).
    """
    if backend.name() != "tensorflow":
        return keras.ops.map(function, elements)
    import tensorflow as tf

    like = tf.TensorSpec(shape, dtype)
    return tf.map_fn(function, elements, fn_output_signature=like, parallel_iterations=1)


def stack_in_turn(
    function: Callable, count: int, shape: Sequence[int], dtype: str, first: Any
) -> Any:
    """Compute n tensors one after the other, each into its place in their stack.

    `map_in_turn` stacks its results in the end, which takes as much memory again. This function
    does not; in TensorFlow it has no gradient.

    Args:
        function: pure function of an int32 scalar, the number of a tensor.
        count: int, n.
        shape: shape of one tensor.
        dtype: dtype of one tensor.
        first: tensor that the function needs; memory for the stack is taken after it is computed.

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
