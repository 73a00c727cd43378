"""The weights of the networks: given to a model, taken from one, written to a folder."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.records import fields
from kdiffusion.runtime import backend
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.text.tokenizer import SimpleTokenizer

MODELS: dict[str, type[ArchitectureModel]] = {
    "text_encoder": TextEncoder,
    "image_encoder": ImageEncoder,
    "image_decoder": ImageDecoder,
    "diffusion_model": DiffusionModel,
}

# The part of a diffusers folder that holds each model.
_COMPONENTS = {
    "text_encoder": "text_encoder",
    "image_encoder": "vae",
    "image_decoder": "vae",
    "diffusion_model": "unet",
}

_BLOCK = 256  # numbers along a side of what is transposed at once


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
    """The values of all variables of a model, by path."""
    return {
        variable.path: keras.ops.convert_to_numpy(variable.value) for variable in model.variables
    }


def rebuilt(model: ArchitectureModel, **options: Any) -> Any:
    """A model of the same weights that computes in another way.

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
    """A text encoder as Stable Diffusion has it, from one that CLIP was trained with.

    diffusers' pipelines for Stable Diffusion take the first output of their text encoder, which is
    the projected vector where there is one.

    Args:
        text_encoder: `TextEncoder`.

    Returns:
        A new `TextEncoder` of the same weights but the projection's.
    """
    architecture = dataclasses.replace(text_encoder.architecture, projection_width=None)
    return rebuilt(text_encoder, architecture=architecture)


def save(
    path: str | os.PathLike,
    models: dict[str, ArchitectureModel],
    schedule: Schedule,
    sampling: tuple[str, Spacing] = ("ddim", Spacing()),
    size: tuple[int, int] | None = None,
    tokenizer: SimpleTokenizer | None = None,
    pipeline: str | None = None,
) -> None:
    """Write a folder in diffusers' layout that diffusers and kdiffusion load.

    Args:
        path: path of the folder, made if it is missing.
        models: any of `MODELS`, both halves of the autoencoder or none.
        schedule: the schedule.
        sampling: the default sampler's name and the default spacing.
        size: (height, width) of a picture in pixels, recorded as the default.
        tokenizer: the tokenizer, if there is one.
        pipeline: name of the class that draws with all of it, for model_index.json; `None` if the
            folder holds only parts of a model.
    """
    from weights_conversion import configs, names
    from weights_conversion.configs import scheduler as schedulers
    from weights_conversion.models import folder
    from weights_conversion.names import mapping

    tensors: dict[str, dict[str, np.ndarray]] = {}
    records = {}
    for kind, component in _COMPONENTS.items():
        if kind not in models and any(_COMPONENTS[other] == component for other in models):
            raise ValueError(f"`models` must hold {kind} too, or no part of the {component}.")
    for kind, model in models.items():
        component = _COMPONENTS[kind]
        records[component] = values = fields(model.architecture)
        written = mapping.write(names.rows(kind, values), arrays_of(model), "diffusers")
        tensors.setdefault(component, {}).update(written)
    downsampling = 1
    if "image_decoder" in models:
        downsampling = models["image_decoder"].architecture.downsampling
    cells: int | list[int] | None = None
    if size is not None:
        height, width = (side // downsampling for side in size)
        cells = height if height == width else [height, width]
    make_config = {
        "text_encoder": configs.text_encoder_config,
        "unet": lambda values: configs.diffusion_model_config(values, cells),
        "vae": lambda values: configs.autoencoder_config(values, max(size or (512,))),
    }
    component_configs = {name: make_config[name](values) for name, values in records.items()}
    settings = {"schedule": fields(schedule), "sampling": _sampling_fields(*sampling)}
    scheduler = schedulers.scheduler_config(settings)
    with folder.staged(path) as stage:
        for component, config in component_configs.items():
            folder.write_component(stage, component, config, tensors[component])
        folder.write_scheduler(stage, scheduler)
        if tokenizer is not None:
            tokenizer.save(stage / "tokenizer")
        if pipeline is not None:
            folder.write_index(stage, pipeline)


def _sampling_fields(sampler, spacing):
    """The default sampler and spacing under the names of `weights_conversion.configs.scheduler`."""
    values = fields(spacing)
    return {
        "sampler": sampler,
        "timestep_spacing": values.pop("timesteps"),
        "sigma_spacing": values.pop("sigmas"),
        **values,
    }
