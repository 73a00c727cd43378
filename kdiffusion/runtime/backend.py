"""The few things that TensorFlow and JAX do differently.

Beside it only `compilation`, `graphs`, `training.gradients` and `training.augmentation` name them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import ml_dtypes
import numpy as np

from kdiffusion.runtime import processor

# Bytes; what XLA asks for, and a multiple of what Eigen and oneDNN do.
_ALIGNMENT = 64

# Bytes. At 512x512 the decoder has a map of 256 channels and two of 128 at a time, beside which
# less than the first is needed.
_REGIONS = (2**25, 2**27, 2**27, 2**28)


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


@functools.cache
def reserve_memory() -> None:
    """Let TensorFlow's allocator on the CPU begin with large regions, which are not touched.

    By itself it doubles them from 2 MiB on. A large map finds no place in what smaller ones leave
    of such regions, and takes the next: a picture of 512x512 took up to 0.25 GB more, by chance.
    """
    if name() == "tensorflow" and not on_accelerator():
        import tensorflow as tf

        # All at a time, so that each is a region.
        _ = [tf.raw_ops.Empty(shape=(size,), dtype=tf.uint8) for size in _REGIONS]


def has_flash_attention() -> bool:
    """Whether Keras has a kernel of flash attention here: under JAX on an NVIDIA GPU.

    TensorFlow has none. On a TPU Keras 3.15 takes a causal one, which is another attention.
    """
    if name() != "jax":
        return False
    import jax

    return jax.default_backend() == "gpu"


def prefers_float32(dtype: Any) -> bool:
    """Whether what is large is computed sooner, and more exactly, if it is cast to float32 first.

    So it is with bfloat16 in TensorFlow on a processor that has no arithmetic of it: oneDNN's
    kernels emulate it or are left out, and others cast piece by piece and round in between. XLA
    casts by itself.

    Args:
        dtype: of a tensor.
    """
    if name() != "tensorflow" or on_accelerator() or processor.has_bfloat16():
        return False
    return keras.backend.standardize_dtype(dtype) == "bfloat16"


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
