"""Build what `Loop` takes of a configuration: the trainer, its optimizer and its data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from kdiffusion.models.architectures import TextEncoderArchitecture
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.pipelines.open_model import class_of, open_model
from kdiffusion.records import fields
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.training.config import checks
from kdiffusion.training.config.new_model import NewModel, open_tokenizer
from kdiffusion.training.config.optimizers import make_optimizer
from kdiffusion.training.config.schema import (
    AutoencoderConfiguration,
    CLIPConfiguration,
    Configuration,
    DiffusionConfiguration,
)
from kdiffusion.training.data.batches import Data
from kdiffusion.training.data.cache import cached
from kdiffusion.training.data.folders import ImageFolder
from kdiffusion.training.loop.checks import check_optimizer
from kdiffusion.training.loop.identity import check_known, optimizer_fields, settings_fields
from kdiffusion.training.trainers import clip_initialization
from kdiffusion.training.trainers.autoencoder import AutoencoderTrainer
from kdiffusion.training.trainers.base import Trainer
from kdiffusion.training.trainers.clip import (
    CLIPTrainer,
    check_tokenizer,
    exclude_from_decay,
)
from kdiffusion.training.trainers.diffusion import DiffusionTrainer
from kdiffusion.training.trainers.discriminator import Discriminator
from kdiffusion.training.trainers.perceptual import Perceptual
from kdiffusion.weights import clip_folder
from kdiffusion.weights.find import open_source

Progress = Callable[[int, int], Any]

_TRAINERS: dict[type[Configuration], type[Trainer]] = {
    AutoencoderConfiguration: AutoencoderTrainer,
    CLIPConfiguration: CLIPTrainer,
    DiffusionConfiguration: DiffusionTrainer,
}


class Job(NamedTuple):
    """The arguments of `Loop` besides its settings.

    Args:
        trainer: `Trainer`.
        optimizer: keras optimizer.
        data: `Data`.
        configuration: `Configuration` with everything decided that was left open.
    """

    trainer: Trainer
    optimizer: keras.Optimizer
    data: Data
    configuration: Configuration


class Materials(NamedTuple):
    """The parts of a job that need no model.

    Args:
        optimizer: keras optimizer.
        images: `ImageFolder`.
        augmentation: list of layers.
    """

    optimizer: keras.Optimizer
    images: ImageFolder
    augmentation: Sequence[keras.layers.Layer]


def make_job(
    configuration: Configuration,
    progress: Progress | None = None,
    folder: str | os.PathLike | None = None,
) -> Job:
    """Make the job that a configuration asks for; may download.

    All of the configuration is checked first: what needs no model before one is opened, and what
    its architecture tells before a network is made or anything is cached.

    Args:
        configuration: `DiffusionConfiguration`, `AutoencoderConfiguration` or `CLIPConfiguration`.
        progress: called with how many latents and text states are cached and how many there are,
            see `cached`.
        folder: path of the run's folder, which must be this run's or new; `None` leaves that to
            `Loop`.

    Returns:
        A `Job`.

    Raises:
        ValueError: If something does not fit together; the message says what.

    Example:

    ```python
    values = {"preset": "stable-diffusion-v1-5", "data": {"folder": "flowers", "cache": "cache"}}
    job = make_job(resolve("diffusion", values))
    settings = job.configuration.loop
    Loop(job.trainer, job.optimizer, job.data, "run", settings).run(job.configuration.steps)
    ```
    """
    path = None if folder is None else Path(folder)
    materials = _materials(configuration, path)
    match configuration:
        case DiffusionConfiguration():
            return _diffusion(configuration, materials, path, progress)
        case AutoencoderConfiguration():
            return _autoencoder(configuration, materials)
        case CLIPConfiguration():
            return _clip(configuration, materials)
    raise ValueError(f"There is no trainer for a {type(configuration).__name__}.")


def _materials(configuration, folder) -> Materials:
    """Check all that needs no model, and make what that takes."""
    optimizer = make_optimizer(configuration.optimizer, configuration.steps)
    check_optimizer(optimizer)
    checks.check_files(configuration)
    if folder is not None:
        checks.check_writable(folder, "the run's folder")
        checks.check_free(folder)
        check_known(folder, known_identity(configuration, optimizer))
    images = checks.image_folder(configuration.data)
    return Materials(optimizer, images, checks.augmentation_layers(configuration.data))


def known_identity(configuration: Configuration, optimizer: keras.Optimizer) -> dict[str, Any]:
    """Return what is known of a run's `identity` before its model is opened.

    Args:
        configuration: `Configuration`.
        optimizer: its keras optimizer.
    """
    groups = ["model"]
    if isinstance(configuration, AutoencoderConfiguration):
        groups = ["autoencoder", *(["discriminator"] if configuration.discriminator else [])]
    return {
        "trainer": {"class": _TRAINERS[type(configuration)].__name__},
        "optimizers": dict.fromkeys(groups, optimizer_fields(optimizer)),
        "settings": settings_fields(configuration.loop),
    }


def _diffusion(configuration, materials, folder, progress):
    model = _pipeline(configuration)
    configuration = _decided(configuration, model)
    checks.check_diffusion(configuration, model, materials.images)
    if folder is not None:
        check_known(folder, {"trainer": _known_trainer(configuration, model)})
    tokenizer = model.tokenizer if "text_encoder" in model.components() else None
    size = model.img_height, model.img_width
    data = _data(configuration, materials, size, tokenizer)
    of_cache: dict[str, Any] = {}
    if configuration.data.cache is not None:
        data, of_cache = _cached(configuration, model, data, progress)
    trainer = DiffusionTrainer.from_model(
        model,
        gradient_checkpointing=configuration.gradient_checkpointing,
        objective=configuration.objective,
        train_text_encoder=configuration.train_text_encoder,
        draw=_generate(model, configuration, materials.images),
        **of_cache,
    )
    return Job(trainer, materials.optimizer, data, configuration)


def _pipeline(configuration) -> Any:
    """Open the model, or make the plan of a new one; no network is loaded or made yet."""
    size = configuration.data.height, configuration.data.width
    if configuration.preset is not None:
        return open_model(configuration.preset, *size, dtype=configuration.dtype)
    if None in size:
        raise ValueError("A new model needs `data.height` and `data.width`, in pixels.")
    source = NewModel(configuration.model, size, configuration.seed)
    return class_of(source).from_source(source, *size, dtype=configuration.dtype)


def _decided(configuration, model):
    """Return the configuration with what follows from the model."""
    objective, parts = configuration.objective, configuration.model
    if not model.architecture("diffusion_model").inputs:
        objective = dataclasses.replace(objective, caption_dropout=0.0)
    new = parts is not None and isinstance(parts.text_encoder, TextEncoderArchitecture)
    return dataclasses.replace(
        configuration,
        objective=objective,
        train_text_encoder=configuration.train_text_encoder or new,
    )


def _known_trainer(configuration, model):
    """Return what is known of a trainer's `configuration` before there is a network."""
    return {
        "architecture": fields(model.architecture("diffusion_model")),
        "schedule": fields(model.schedule),
        "objective": fields(configuration.objective),
        "train_text_encoder": configuration.train_text_encoder,
    }


def _cached(configuration, model, data, progress):
    """Cache what fixed encoders return; return the data and what the trainer has to know of it."""
    encoders, values = {"image_encoder": model.image_encoder}, ["latents"]
    if "text_encoder" in model.components() and not configuration.train_text_encoder:
        encoders["text_encoder"] = model.text_encoder
        values.append("context")
    data = cached(data, configuration.data.cache, progress=progress, **encoders)
    of_cache: dict[str, Any] = {"cached": values}
    if data.empty_context is not None:
        of_cache["empty"] = {"context": data.empty_context}
    return data, of_cache


def _generate(model, configuration, images) -> Callable[[int], np.ndarray]:
    """Return a function that generates the images of the grids."""
    samples = configuration.samples
    settings = {
        "num_steps": samples.num_steps,
        "unconditional_guidance_scale": samples.guidance_scale,
        "seed": samples.seed,
        "verbose": 0,
    }
    if "text_encoder" in model.components():
        captions = dict.fromkeys(row["caption"] for row in images.rows)
        prompts = samples.prompts or tuple(captions)[:64]
        return lambda count: model.text_to_image(_cycle(prompts, count), **settings)
    num_classes = model.architecture("diffusion_model").num_classes
    if num_classes is None:
        settings["unconditional_guidance_scale"] = 1.0
        return lambda count: model.generate_image(batch_size=count, **settings)
    return lambda count: model.generate_image(_cycle(range(num_classes), count), **settings)


def _cycle(values: Sequence[Any], count: int) -> list[Any]:
    return [values[number % len(values)] for number in range(count)]


def _autoencoder(configuration, materials):
    architecture, source, dtype = configuration.model, None, configuration.dtype
    if configuration.preset is not None:
        source = open_source(configuration.preset)
        architecture = source.architecture("image_encoder")
    checks.check_autoencoder_run(configuration, architecture)
    data = _data(configuration, materials)
    # Keras draws new weights from the process's own generators.
    keras.utils.set_random_seed(configuration.seed)
    if source is not None:
        halves = [source.model(kind, dtype) for kind in ("image_encoder", "image_decoder")]
    else:
        halves = [
            ImageEncoder(architecture, dtype=dtype, name="image_encoder"),
            ImageDecoder(architecture, dtype=dtype, name="image_decoder"),
        ]
    perceptual, files = None, configuration.perceptual
    if files is not None:
        perceptual = Perceptual.from_checkpoints(files.vgg16, files.linear)
    discriminator = None
    if configuration.discriminator is not None:
        discriminator = Discriminator(configuration.discriminator, name="discriminator")
    trainer = AutoencoderTrainer(
        *halves,
        perceptual=perceptual,
        discriminator=discriminator,
        objective=configuration.objective,
        latent_scale=configuration.latent_scale,
    )
    return Job(trainer, materials.optimizer, data, configuration)


def _clip(configuration, materials):
    checks.check_column(materials.images, "caption", "CLIP compares images with texts")
    parts, dtype = configuration.model, configuration.dtype
    if parts is None:
        text_encoder, image_tower = clip_folder.architectures(configuration.preset)
    else:
        text_encoder, image_tower = parts.text_encoder, parts.image_tower
    checks.check_clip_run(configuration, image_tower)
    tokenizer = _tokenizer_of_clip(configuration, text_encoder)
    check_tokenizer(tokenizer, text_encoder)
    data = _data(configuration, materials, (image_tower.image_size,) * 2, tokenizer)
    if parts is None:
        trainer = CLIPTrainer.from_folder(configuration.preset, dtype)
    else:
        tower = ImageTower(image_tower, dtype=dtype, name="image_tower")
        encoder = TextEncoder(text_encoder, dtype=dtype, name="text_encoder")
        for network in (tower, encoder):
            clip_initialization.initialize(network, configuration.seed)
        trainer = CLIPTrainer(tower, encoder, tokenizer=tokenizer)
    optimizer = exclude_from_decay(materials.optimizer, trainer)
    return Job(trainer, optimizer, data, configuration)


def _tokenizer_of_clip(configuration, text_encoder):
    """Open the tokenizer of a new CLIP, or read that of the preset."""
    if configuration.preset is None:
        return open_tokenizer(configuration.model.tokenizer, text_encoder)
    tokenizer = clip_folder.tokenizer_of(configuration.preset)
    if tokenizer is None:
        raise ValueError(
            f"{configuration.preset!r} holds no tokenizer. Put the one that it was trained with "
            "into its folder `tokenizer`."
        )
    return tokenizer


def _data(
    configuration: Configuration,
    materials: Materials,
    size: tuple[int | None, int | None] = (None, None),
    tokenizer: SimpleTokenizer | None = None,
) -> Data:
    """Return the data, of the configured size or else of the model's."""
    settings = configuration.data
    height, width = settings.height or size[0], settings.width or size[1]
    assert height is not None and width is not None
    return Data(
        materials.images,
        settings.preprocessing(height, width),
        tokenizer,
        augmentation=materials.augmentation,
        seed=configuration.seed,
        shuffle=settings.shuffle,
        workers=settings.workers,
    )
