"""The few things that TensorFlow and JAX do differently.

Outside this folder, only the training loop and keras-cv's augmentation name TensorFlow or JAX.
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

# Bytes. XLA requires this alignment; Eigen and oneDNN require divisors of it.
_ALIGNMENT = 64

# Bytes. At 512x512 the decoder holds a map of 256 channels and two of 128 at a time; everything
# else together needs less than the first region.
_REGIONS = (2**25, 2**27, 2**27, 2**28)


def name() -> str:
    """Return the name of the Keras backend in use.

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
    """Return whether computations run on a GPU or TPU."""
    if name() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


@functools.cache
def reserve_memory() -> None:
    """Reserve large regions of TensorFlow's allocator on the CPU, whose memory is not touched.

    By itself the allocator doubles its regions from 2 MiB on. A large map does not fit into the
    rest that smaller maps leave of a region, and takes the next one: by chance, an image of 512x512
    took up to 0.25 GB more.
    """
    if name() == "tensorflow" and not on_accelerator():
        import tensorflow as tf

        # They exist at the same time, so each becomes a region.
        _ = [tf.raw_ops.Empty(shape=(size,), dtype=tf.uint8) for size in _REGIONS]


def has_flash_attention() -> bool:
    """Return whether Keras has a kernel of flash attention: under JAX on an NVIDIA GPU.

    TensorFlow has none. On a TPU Keras 3.15 uses a causal one, which is another attention.
    """
    if name() != "jax":
        return False
    import jax

    return jax.default_backend() == "gpu"


def prefers_float32(dtype: Any) -> bool:
    """Return whether large tensors should be cast to float32, which is faster and more exact.

    They should be if they are bfloat16 in TensorFlow on a processor without bfloat16 arithmetic:
    oneDNN's kernels emulate it or are left out, and others cast piece by piece and round in
    between. XLA casts by itself.

    Args:
        dtype: dtype of the tensors.
    """
    if name() != "tensorflow" or on_accelerator() or processor.has_bfloat16():
        return False
    return keras.backend.standardize_dtype(dtype) == "bfloat16"


def check_kernels(compute_dtype: str) -> None:
    """Check that the backend has kernels for a compute dtype; warn if they are slow.

    Args:
        compute_dtype: str, such as `"float32"`.

    Raises:
        ValueError: If it is float16 on JAX's CPU.
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
    """Compute the value of a function and its gradient, inside or outside a compiled function.

    Args:
        function: pure function of a tensor to a scalar; it may read variables.
        tensor: floating-point tensor.

    Returns:
        The scalar, and the gradient, a tensor like `tensor`.
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
    """Make a function whose gradients compute it once more, so that no value inside it is kept.

    Args:
        function: pure function of tensors, the first of floating point; it may read variables.
        variables: the variables that it reads.

    Returns:
        Function with the same arguments and results.
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
        # XLA drops the barriers of `jax.checkpoint` on a CPU, so it would compute the function
        # early and all at once. This addition of zero makes it wait for the gradient.
        zero = (0.0 * jax.tree.leaves(gradient)[0].ravel()[0]).astype(first.dtype)
        return jax.vjp(pure, weights, (first + zero, *others), options)[1](gradient)

    checkpointed = jax.custom_vjp(pure)
    checkpointed.defvjp(forward, backward)
    return lambda *arguments, **options: checkpointed(
        [variable.value for variable in variables], arguments, options
    )


def with_gradient_of(function: Callable, computed: Callable) -> Callable:
    """Make a function that is computed in one way and differentiated in another.

    Args:
        function: pure function of tensors, which gives the gradients.
        computed: another function with the same values, which gives the values.

    Returns:
        Function like these; under JAX `computed` itself.
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

    # TensorFlow takes a variable that is read inside for one that the function owns.
    return lambda *arguments: call(*map(tf.convert_to_tensor, arguments))


def weights_of(model: keras.Model) -> list[Any]:
    """Return all variables of a model as arguments for a compiled function, JAX's by value.

    Weights are passed because a compiled function that captures a model keeps the values (JAX) or
    the variables (TensorFlow) that it was traced with.
    """
    return [variable.value for variable in model.variables]


def with_weights(model: keras.Model, weights: Sequence[Any]) -> contextlib.AbstractContextManager:
    """Open a scope, inside a compiled function, in which a model computes with given weights.

    Args:
        model: the model.
        weights: see `weights_of`; they may also be tensors.

    Returns:
        Context manager.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        # The program reads them: Python takes 20 ms a call to read hundreds of variables.
        weights = [tf.convert_to_tensor(value) for value in weights]
    return keras.StatelessScope(state_mapping=list(zip(model.variables, weights)))


def empty(shape: Sequence[int], dtype: str) -> Any:
    """Make a tensor of unwritten memory, which costs nothing."""
    return from_numpy(aligned_array(shape, dtype))


def aligned_array(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Make an unwritten array whose memory both backends can use without a copy.

    Args:
        shape: sequence of int.
        dtype: str, any floating or integer dtype of Keras, bfloat16 included.

    Returns:
        Array that starts at a multiple of 64 bytes.
    """
    element = np.dtype(getattr(ml_dtypes, dtype, dtype))
    size = math.prod(shape) * element.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(element).reshape(shape)


def from_numpy(array: np.ndarray) -> Any:
    """Make a tensor that takes over the memory of an array.

    Args:
        array: contiguous array of `aligned_array`, which is not written to any more; other arrays
            are copied.

    Returns:
        Tensor.
    """
    if name() == "jax":
        import jax

        # Arrays of DLPack are committed to their device, and a compiled function is compiled once
        # more if one of its arguments is.
        return jax.device_put(array, may_alias=True)
    import tensorflow as tf

    if array.size == 0:
        return tf.convert_to_tensor(array)
    if array.dtype == ml_dtypes.bfloat16:
        # NumPy does not export bfloat16.
        return tf.bitcast(from_numpy(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
