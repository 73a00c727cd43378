"""The weights of the networks: given to a model, taken from one, given to another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.runtime import backend

# The class of each kind of network, see `weights_conversion.KINDS`.
MODELS: dict[str, type[ArchitectureModel]] = {
    "text_encoder": TextEncoder,
    "image_encoder": ImageEncoder,
    "image_decoder": ImageDecoder,
    "diffusion_model": DiffusionModel,
    "image_tower": ImageTower,
}

_BLOCK = 256  # numbers along a side of what is transposed at once


def kind_of(model: ArchitectureModel) -> str:
    """Return the kind of a network, its name in `MODELS`.

    Raises:
        ValueError: If it is none of these.
    """
    for kind, model_class in MODELS.items():
        if isinstance(model, model_class):
            return kind
    raise ValueError(
        f"The networks of a model are of the kinds {', '.join(MODELS)}. "
        f"Received: {type(model).__name__}"
    )


def assign(model: keras.Model, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Give every variable of a new model its value, by path.

    Args:
        model: Keras model.
        arrays: pairs of variable path (without the model's name) and array.

    Raises:
        ValueError: If a variable got no value, or a value has no variable.
    """
    variables = {variable.path: variable for variable in model.variables}
    for path, array in arrays:
        if path not in variables:
            raise ValueError(f"{model.name} has no variable {path!r}.")
        variable = variables.pop(path)
        value = backend.aligned_array(array.shape, keras.backend.standardize_dtype(variable.dtype))
        _fill(value, array)
        variable.assign(backend.from_numpy(value))
    if variables:
        raise ValueError(
            f"{len(variables)} variables of {model.name} got no value, among them "
            f"{sorted(variables)[:10]}."
        )


def _fill(target: np.ndarray, array: np.ndarray) -> None:
    """Copy an array, most likely a transposed view of a file's tensor, into a contiguous one.

    Block by block, so that what is read and what is written stay in the processor's cache: twice
    as fast as in one go, and five times where the dtype changes too.
    """
    array = array.astype(target.dtype, copy=False)  # in the order of the file
    if target.ndim < 2 or array.flags.c_contiguous:
        np.copyto(target, array)
        return
    height, width = target.shape[-2:]
    columns = max(16, _BLOCK // math.prod(target.shape[:-2]))
    for row in range(0, height, _BLOCK):
        for column in range(0, width, columns):
            block = ..., slice(row, row + _BLOCK), slice(column, column + columns)
            np.copyto(target[block], array[block])


def arrays_of(model: keras.Model) -> dict[str, np.ndarray]:
    """Return the values of all variables of a model, by path."""
    return {
        variable.path: keras.ops.convert_to_numpy(variable.value) for variable in model.variables
    }


def rebuilt(model: ArchitectureModel, **options: Any) -> Any:
    """Make a model of the same weights that computes in another way.

    Args:
        model: one of `MODELS`.
        options: keyword arguments of its class, such as `dtype` or `gradient_checkpointing`, or an
            `architecture` that has no other variables; those that are not given stay.

    Returns:
        A new model; the old one keeps its weights.
    """
    options = {
        "architecture": model.architecture,
        "dtype": model.dtype_policy,
        "gradient_checkpointing": model.gradient_checkpointing,
        **options,
    }
    new = type(model)(initialize=False, name=model.name, **options)
    values = {variable.path: variable.value for variable in model.variables}
    assign(new, ((v.path, keras.ops.convert_to_numpy(values[v.path])) for v in new.variables))
    return new


def without_projection(text_encoder: TextEncoder) -> TextEncoder:
    """Make a text encoder as Stable Diffusion has it from one that CLIP was trained with.

    diffusers' pipelines for Stable Diffusion take the first output of their text encoder, which is
    the projected vector where there is one.

    Args:
        text_encoder: `TextEncoder`.

    Returns:
        A new `TextEncoder` of the same weights but the projection's.
    """
    architecture = dataclasses.replace(text_encoder.architecture, projection_width=None)
    return rebuilt(text_encoder, architecture=architecture)
