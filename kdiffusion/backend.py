"""The few things that TensorFlow and JAX do differently.

Beside it only `training.gradients` and `training.augmentation` name them.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import ml_dtypes
import numpy as np

from kdiffusion import compile_cache, processor

# Bytes; what XLA asks for, and a multiple of what Eigen and oneDNN do.
_ALIGNMENT = 64

# Elements of a tensor. A call of a compiled kernel costs some 100 microseconds and its compilation
# 50 milliseconds, which a few passes over fewer elements are not worth.
_WORTH_FUSING = 2**17

# Functions of layers in the plain graph that is being traced, if one is.
_traces: contextvars.ContextVar[dict | None] = contextvars.ContextVar("traces", default=None)


def name() -> str:
    """The Keras backend in use.

    Returns:
        `"tensorflow"` or `"jax"`.

    Raises:
        ValueError: If Keras runs on any other backend.
    """
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax"):
        raise ValueError(
            "kdiffusion runs on Keras's TensorFlow and JAX backends. "
            f"Received: backend {backend!r}. Set the environment variable KERAS_BACKEND to "
            "'tensorflow' or 'jax' before Keras is imported."
        )
    return backend


def on_accelerator() -> bool:
    """Whether computations run on a GPU or TPU."""
    if name() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


def has_flash_attention() -> bool:
    """Whether Keras has a kernel of flash attention here: under JAX on an NVIDIA GPU.

    TensorFlow has none. On a TPU Keras 3.15 takes a causal one, which is another attention.
    """
    if name() != "jax":
        return False
    import jax

    return jax.default_backend() == "gpu"


def has_bfloat16_softmax() -> bool:
    """Whether the softmax of bfloat16 goes through float32 by itself: TensorFlow's and oneDNN's.

    On processors without bfloat16 TensorFlow takes another, which rounds in between.
    """
    if name() != "tensorflow":
        return False
    return on_accelerator() or processor.has_bfloat16()


def check_kernels(compute_dtype: str) -> None:
    """Refuse a compute dtype that the backend has no kernels for, warn of kernels that are slow.

    Args:
        compute_dtype: str, such as `"float32"`.

    Raises:
        ValueError: For float16 on JAX's CPU.
    """
    if name() == "tensorflow" and not on_accelerator():
        if compute_dtype == "bfloat16":
            processor.warn_without_bfloat16()
        processor.warn_without_onednn()
    if compute_dtype == "float16" and name() == "jax" and not on_accelerator():
        raise ValueError(
            "JAX has no float16 kernels for attention and convolution on the CPU. Received: a "
            "dtype policy that computes in 'float16'. Use 'float32' or 'bfloat16', or the "
            "TensorFlow backend."
        )


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
        return name() == "jax" or on_accelerator()
    if not isinstance(jit_compile, bool):
        raise ValueError(
            f"`jit_compile` must be True, False or 'auto'. Received: jit_compile={jit_compile!r}"
        )
    return jit_compile


def compile_function(function: Callable, jit_compile: bool) -> Callable:
    """Compile a function of nested tensors; it is traced once for each set of shapes.

    Args:
        function: pure function of dictionaries, lists or tuples of tensors.
        jit_compile: bool, whether to use XLA; `False` means a plain TensorFlow graph. JAX has
            nothing but XLA and uses it always.

    Returns:
        The compiled function.
    """
    if name() == "jax":
        import jax

        _keep_programs()
        return jax.jit(function)
    import tensorflow as tf

    if not jit_compile and not on_accelerator():
        return _as_it_is(function)
    return tf.function(function, jit_compile=jit_compile, autograph=False)


def _as_it_is(function):
    """A TensorFlow graph that goes past TensorFlow's optimizer of graphs, Grappler.

    Its passes over a U-Net take longer than two of the U-Net's steps, which are no faster for them.
    """
    import tensorflow as tf

    flag, options = "disable_meta_optimizer", tf.config.optimizer
    inner = tf.function(function, autograph=False, experimental_attributes={"_noinline": True})

    def call(*arguments):
        # A call inside a graph keeps the options of the moment at which it is traced.
        before = options.get_experimental_options()
        options.set_experimental_options({flag: True})
        token = _traces.set({})
        try:
            return inner(*arguments)
        finally:
            _traces.reset(token)
            options.set_experimental_options({flag: before.get(flag, False)})

    return tf.function(call, autograph=False)


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
        traces = _traces.get()
        if traces is None or layer._remat_mode is not None:
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


def fuse(function: Callable) -> Callable:
    """A function of tensors that XLA compiles as a whole also inside a plain TensorFlow graph.

    Where XLA compiles everything around it, in eager calls, and where the first tensor is small or
    of unknown shape, it is the function itself.

    Args:
        function: pure function of tensors and numbers, at the top level of a module.
    """
    return _fused(function) if name() == "tensorflow" else function


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


def _keep_programs() -> None:
    """Let JAX keep its compiled programs between runs, unless its user has decided that."""
    import jax

    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None and settings.jax_enable_compilation_cache:
        folder = compile_cache.folder()
        if folder is not None:
            settings.update("jax_compilation_cache_dir", str(folder))


def value_and_gradient(function: Callable[[Any], Any], tensor: Any) -> tuple[Any, Any]:
    """The value of a function and its gradient, inside or outside a compiled function.

    Args:
        function: pure function of a tensor to a scalar; it may read variables.
        tensor: floating-point tensor.

    Returns:
        The scalar, and a tensor like `tensor`.
    """
    if name() == "jax":
        import jax

        return jax.value_and_grad(function)(tensor)
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensor)
        value = function(tensor)
    return value, tape.gradient(value, tensor)


def checkpoint(function: Callable, variables: Sequence[keras.Variable]) -> Callable:
    """A function whose gradients compute it once more, so that nothing inside it is kept.

    Args:
        function: pure function of tensors, the first of floating point; it may read variables.
        variables: those that it reads.
    """
    if name() != "jax":
        return keras.remat(function)
    import jax

    def pure(weights, arguments, options):
        with keras.StatelessScope(state_mapping=list(zip(variables, weights))):
            return function(*arguments, **options)

    def forward(*inputs):
        return pure(*inputs), inputs

    def backward(inputs, gradient):
        weights, (first, *others), options = inputs
        # XLA drops the barriers of `jax.checkpoint` on a CPU, so it would compute all of it at
        # once and early. This addition of zero makes it wait for the gradient.
        zero = (0.0 * jax.tree.leaves(gradient)[0].ravel()[0]).astype(first.dtype)
        return jax.vjp(pure, weights, (first + zero, *others), options)[1](gradient)

    checkpointed = jax.custom_vjp(pure)
    checkpointed.defvjp(forward, backward)
    return lambda *arguments, **options: checkpointed(
        [variable.value for variable in variables], arguments, options
    )


def after(tensor: Any, other: Any) -> Any:
    """The tensor, which nothing is computed from before another is there.

    A plain TensorFlow graph begins with all that follows from the weights alone, and holds it until
    it is needed. XLA orders its operations with an eye on memory.
    """
    if name() != "tensorflow":
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
    if name() != "tensorflow":
        return keras.ops.map(function, elements)
    import tensorflow as tf

    like = tf.TensorSpec(shape, dtype)
    return tf.map_fn(function, elements, fn_output_signature=like, parallel_iterations=1)


def with_gradient_of(function: Callable, computed: Callable) -> Callable:
    """A function that is computed in one way and differentiated in another.

    Args:
        function: pure function of tensors whose gradients are taken.
        computed: another with the same values.

    Returns:
        Function like these; under JAX `computed`, which is differentiated as it is.
    """
    if name() != "tensorflow":
        return computed
    import tensorflow as tf

    @tf.custom_gradient
    def call(*tensors):
        def gradient(upstream):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = function(*tensors)
            return tape.gradient(value, tensors, upstream)

        return computed(*tensors), gradient

    # A variable that is read inside would count as one that the function owns.
    return lambda *arguments: call(*map(tf.convert_to_tensor, arguments))


def weights_of(model: keras.Model) -> list[Any]:
    """All variables of a model, as arguments for a compiled function: JAX's by their values.

    Weights are passed, not captured: a compiled function that captured a model would keep the
    values (JAX) or the variables (TensorFlow) that it was traced with.
    """
    return [variable.value for variable in model.variables]


def with_weights(model: keras.Model, weights: Sequence[Any]) -> contextlib.AbstractContextManager:
    """A scope, inside a compiled function, in which the model computes with such arguments.

    They may be tensors too.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        # Read by the program itself: read by Python, hundreds of variables take 20 ms a call.
        weights = [tf.convert_to_tensor(value) for value in weights]
    return keras.StatelessScope(state_mapping=list(zip(model.variables, weights)))


def empty(shape: Sequence[int], dtype: str) -> Any:
    """A tensor whose memory nobody has written to, hence free to make."""
    return from_numpy(aligned_array(shape, dtype))


def aligned_array(shape: Sequence[int], dtype: str) -> np.ndarray:
    """An unwritten array that starts where both backends can use its memory as it is.

    Args:
        shape: sequence of int.
        dtype: str, any floating or integer dtype of Keras, bfloat16 included.
    """
    element = np.dtype(getattr(ml_dtypes, dtype, dtype))
    size = math.prod(shape) * element.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(element).reshape(shape)


def from_numpy(array: np.ndarray) -> Any:
    """A tensor that takes over the memory of an array that nobody will write to any more.

    Args:
        array: contiguous array, made by `aligned_array`; any other is copied.
    """
    if name() == "jax":
        import jax

        # Not by DLPack, whose arrays are committed to their device: a compiled function is
        # compiled once more when one of its arguments is.
        return jax.device_put(array, may_alias=True)
    import tensorflow as tf

    if array.size == 0:
        return tf.convert_to_tensor(array)
    if array.dtype == ml_dtypes.bfloat16:
        # NumPy exports no bfloat16.
        return tf.bitcast(from_numpy(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
