"""Prepare the process for a model: folder of kernels, memory of TensorFlow, compute dtype."""

from __future__ import annotations

from kdiffusion.runtime import backend, kernel_files


def prepare(compute_dtype: str) -> None:
    """Prepare the backend for models that compute in a dtype.

    Call it before TensorFlow computes anything: TensorFlow reads the folder of kernels from
    `TF_XLA_FLAGS` at its first operation.

    Args:
        compute_dtype: str, such as `"float32"`.

    Raises:
        ValueError: If the backend is neither TensorFlow nor JAX, or has no kernels for the dtype.
    """
    kernel_files.kernel_folder()
    backend.reserve_memory()
    backend.check_kernels(compute_dtype)
