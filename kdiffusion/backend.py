"""The few things that TensorFlow and JAX do differently; the only room that names them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import ml_dtypes
import numpy as np

# Bytes; what XLA asks for, and a multiple of what Eigen and oneDNN do.
_ALIGNMENT = 64


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


def check_dtype(compute_dtype: str) -> None:
    """Refuse a compute dtype that the backend has no kernels for.

    Args:
        compute_dtype: str, such as `"float32"`.

    Raises:
        ValueError: For float16 on JAX's CPU.
    """
    if compute_dtype == "float16" and name() == "jax" and not on_accelerator():
        raise ValueError(
            "JAX has no float16 kernels for attention and convolution on the CPU. Received: a "
            "dtype policy that computes in 'float16'. Use 'float32' or 'bfloat16', or the "
            "TensorFlow backend."
        )


def use_jit(jit_compile: bool | str, compute_dtype: str) -> bool:
    """Resolve the compile policy `"auto"`.

    Args:
        jit_compile: `True`, `False` or `"auto"`. Automatic means XLA everywhere but for half
            types on TensorFlow's CPU, where XLA computes in float32 while oneDNN has kernels
            twice as fast.
        compute_dtype: str, the compute dtype of the network.

    Returns:
        Whether to compile with XLA.
    """
    if jit_compile == "auto":
        return name() == "jax" or on_accelerator() or compute_dtype == "float32"
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

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=jit_compile, autograph=False)


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


def weights_of(model: keras.Model) -> list[Any]:
    """The current values of all variables, as arguments for a compiled function.

    Weights are passed, not captured: a compiled function that captured a model would keep the
    values (JAX) or the variables (TensorFlow) that it was traced with.
    """
    if name() == "jax":
        return [variable.value for variable in model.variables]
    return [variable.value.read_value() for variable in model.variables]


def with_weights(model: keras.Model, weights: Sequence[Any]) -> contextlib.AbstractContextManager:
    """A scope in which the model computes with the given values of its variables."""
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
