"""Where a model's parts come from: a folder, a file, the hub, or random numbers from a seed."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from kdiffusion import backend, hub
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.presets import (
    PRESETS,
    AutoencoderArchitecture,
    DiffusionArchitecture,
    TextEncoderArchitecture,
    fields,
)
from kdiffusion.sampling.levels import Spacing
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.tokenizer import SimpleTokenizer

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


class Source(Protocol):
    """Something that the parts of a latent diffusion model can be loaded from.

    Attributes:
        name: str, for people.
        height, width: int, the size that the model draws by default, in pixels.
    """

    name: str
    height: int
    width: int

    def has(self, kind: str) -> bool:
        """Whether there is one of `MODELS`."""

    def architecture(self, kind: str) -> Any:
        """The architecture record of one of `MODELS`."""

    def model(self, kind: str, dtype: Any) -> ArchitectureModel:
        """One of `MODELS`, with its weights."""

    def tokenizer(self) -> SimpleTokenizer:
        """The tokenizer."""

    def schedule(self) -> Schedule:
        """The schedule that the network was trained with."""

    def sampling(self) -> tuple[str, Spacing]:
        """The default sampler's name and the default spacing."""


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
            `architecture` with the same variables; those that are not given stay.

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
    assign(new, ((v.path, keras.ops.convert_to_numpy(v.value)) for v in model.variables))
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
    new = TextEncoder(
        architecture,
        initialize=False,
        dtype=text_encoder.dtype_policy,
        name=text_encoder.name,
        gradient_checkpointing=text_encoder.gradient_checkpointing,
    )
    arrays = arrays_of(text_encoder)
    assign(new, ((variable.path, arrays[variable.path]) for variable in new.variables))
    return new


class CheckpointSource:
    """A folder in diffusers' layout, or a single file in CompVis names.

    Args:
        path: path of the folder or file.
        size: (height, width) in pixels, or `None` for what the checkpoint was made for.
        name: for people; `None` for the path's last part.
        settings: keyword arguments of `weights_conversion.open_model`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: tuple[int, int] | None = None,
        name: str | None = None,
        **settings,
    ):
        from weights_conversion import open_model

        self.checkpoint: Any = open_model(path, **settings)
        self.name = name or Path(path).resolve().name
        self.height, self.width = size or self._trained_size()

    def has(self, kind):
        return self.checkpoint.has(kind)

    def architecture(self, kind):
        return MODELS[kind].architecture_class(**self.checkpoint.fields(kind))

    def model(self, kind, dtype):
        from weights_conversion import read

        model = MODELS[kind](self.architecture(kind), initialize=False, dtype=dtype, name=kind)
        arrays = read(
            self.checkpoint.rows(kind),
            self.checkpoint.tensors(kind),
            self.checkpoint.dialect,
            beside=self.checkpoint.beside(kind),
        )
        assign(model, arrays)
        return model

    def tokenizer(self):
        folder = self.checkpoint.path / "tokenizer"
        if folder.is_dir():
            return SimpleTokenizer.from_folder(folder)
        return SimpleTokenizer.default(pad_id=getattr(self.checkpoint, "pad_id", None))

    def schedule(self):
        return Schedule(**self.checkpoint.schedule)

    def sampling(self):
        settings = dict(self.checkpoint.sampling)
        sampler = settings.pop("sampler")
        # Stable Diffusion was trained for an offset of 1, and diffusers' pipeline insists on it
        # whatever the file says: early files were written with 0.
        settings["steps_offset"] = 1
        return sampler, Spacing(
            timesteps=settings.pop("timestep_spacing"),
            sigmas=settings.pop("sigma_spacing"),
            **settings,
        )

    def _trained_size(self) -> tuple[int, int]:
        cells = self.checkpoint.sample_size
        sides = (cells, cells) if isinstance(cells, int) else tuple(cells)
        downsampling = 1
        if self.checkpoint.has("image_decoder"):
            downsampling = self.architecture("image_decoder").downsampling
        return sides[0] * downsampling, sides[1] * downsampling


class PartsSource:
    """Parts that are in memory already.

    Args:
        models: dictionary of networks, by their names in `MODELS`.
        schedule: `Schedule`.
        size: default (height, width) of a picture in pixels.
        tokenizer: `SimpleTokenizer`, or `None` if there is none.
        sampling: the default sampler's name and the default spacing, or `None` for ddim.
    """

    name = "parts in memory"

    def __init__(self, models, schedule, size, tokenizer=None, sampling=None):
        self.height, self.width = size
        self._models = dict(models)
        self._schedule = schedule
        self._tokenizer = tokenizer
        # Where the schedule ends in pure noise, drawing has to start there.
        spacing = Spacing("trailing" if schedule.rescale_zero_terminal_snr else "leading")
        self._sampling = sampling or ("ddim", spacing)

    def has(self, kind):
        return kind in self._models

    def architecture(self, kind):
        return self.model(kind, None).architecture

    def model(self, kind, dtype):
        if kind not in self._models:
            raise ValueError(
                f"This model was made of {sorted(self._models)} and has no {kind}. Give it to "
                "`from_parts` too."
            )
        return self._models[kind]

    def tokenizer(self):
        if self._tokenizer is None:
            raise ValueError("This model has no tokenizer. Give one to `from_parts`.")
        return self._tokenizer

    def schedule(self):
        return self._schedule

    def sampling(self):
        return self._sampling


class RandomSource:
    """A tiny latent diffusion model whose weights are random numbers from a fixed seed.

    It has learned nothing and draws coloured noise. It exists so that everything around the
    weights can be tried, tested and timed offline within seconds.
    """

    name = "random-tiny"
    height = 64
    width = 64

    _ARCHITECTURES = {
        "text_encoder": TextEncoderArchitecture(
            vocabulary_size=514, width=32, depth=2, num_heads=2, mlp_width=64, end_id=513
        ),
        "autoencoder": AutoencoderArchitecture(
            channels=(16, 16, 32, 32), layers_per_level=1, num_groups=8
        ),
        "diffusion_model": DiffusionArchitecture(
            channels=(16, 32),
            layers_per_level=1,
            depths=(1, 0),
            num_heads=(2, 2),
            context_width=32,
            num_groups=8,
        ),
    }

    def has(self, kind):
        return kind in MODELS

    def architecture(self, kind):
        return self._ARCHITECTURES.get(kind) or self._ARCHITECTURES["autoencoder"]

    def model(self, kind, dtype):
        model = MODELS[kind](self.architecture(kind), initialize=False, dtype=dtype, name=kind)
        assign(model, [(v.path, _random_weight(kind, v.path, v.shape)) for v in model.variables])
        return model

    def tokenizer(self):
        return SimpleTokenizer.byte_level()

    def schedule(self):
        return Schedule()

    def sampling(self):
        return "ddim", Spacing()


def _random_weight(kind, path, shape):
    leaf = path.split("/")[-1]
    if leaf == "gamma":
        return np.ones(shape, np.float32)
    if leaf in ("beta", "bias"):
        return np.zeros(shape, np.float32)
    generator = np.random.default_rng(zlib.crc32(f"{kind}/{path}".encode()))
    deviation = 1.0 if leaf.endswith("embedding") else np.prod(shape[:-1]) ** -0.5
    return (generator.standard_normal(tuple(shape)) * deviation).astype(np.float32)


def open_source(preset: str | os.PathLike, **settings) -> Source:
    """Find what a preset name, a folder, a file or a hub address stands for; may download.

    Args:
        preset: a name in `kdiffusion.presets.PRESETS`, `"random-tiny"`, the path of a folder in
            diffusers' layout or of a single file (`.safetensors`, `.ckpt`), or
            `"hf://organisation/repository[@revision]"`.
        settings: keyword arguments of `weights_conversion.open_single_file`, for single files.

    Returns:
        A `Source`.

    Raises:
        ValueError: If it is none of these; the message lists the known names.
    """
    text = os.fspath(preset)
    if text == RandomSource.name:
        return RandomSource()
    if text in PRESETS:
        record = PRESETS[text]
        path, variant = hub.fetch(record.repository, licence=record.licence)
        return CheckpointSource(path, (record.height, record.width), text, variant=variant)
    if text.startswith("hf://"):
        repository, _, revision = text.removeprefix("hf://").partition("@")
        path, variant = hub.fetch(repository, revision or None)
        return CheckpointSource(path, name=repository.split("/")[-1], variant=variant)
    if os.path.isdir(text):
        return CheckpointSource(text)
    if os.path.exists(text):
        return CheckpointSource(text, **settings)
    known = ", ".join(sorted([*PRESETS, RandomSource.name]))
    raise ValueError(
        f"`preset` must be a known name, a folder in diffusers' layout, a .safetensors or .ckpt "
        f"file, or an address 'hf://organisation/repository'. Received: preset={text!r}, which is "
        "no file or folder here. "
        f"Known names: {known}"
    )


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
    from weights_conversion import configs, folder, mapping, names, schedulers

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
    """The default sampler and spacing under the names of `weights_conversion.schedulers`."""
    values = fields(spacing)
    return {
        "sampler": sampler,
        "timestep_spacing": values.pop("timesteps"),
        "sigma_spacing": values.pop("sigmas"),
        **values,
    }
