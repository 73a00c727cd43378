"""From a configuration to what `Loop` takes: the trainer, its optimizer and its data."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.models.architectures import TextEncoderArchitecture
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.pipelines.base import Pipeline
from kdiffusion.pipelines.latent_diffusion import LatentDiffusion, PixelDiffusion
from kdiffusion.pipelines.open_model import open_model
from kdiffusion.pipelines.stable_diffusion import StableDiffusion
from kdiffusion.records import fields
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.training.config.schema import (
    AutoencoderConfiguration,
    CLIPConfiguration,
    Configuration,
    DiffusionConfiguration,
    OptimizerSettings,
)
from kdiffusion.training.data.batches import Data
from kdiffusion.training.data.cache import cached
from kdiffusion.training.data.folders import ImageFolder
from kdiffusion.training.trainers import clip_initialization
from kdiffusion.training.trainers.autoencoder import AutoencoderTrainer
from kdiffusion.training.trainers.base import Trainer
from kdiffusion.training.trainers.clip import CLIPTrainer, exclude_from_decay
from kdiffusion.training.trainers.diffusion import DiffusionTrainer
from kdiffusion.training.trainers.discriminator import Discriminator
from kdiffusion.training.trainers.perceptual import Perceptual
from kdiffusion.weights import variables
from kdiffusion.weights.sources import CheckpointSource, Source, open_source
from weights_conversion import autoencoder_config, diffusion_model_config

Progress = Callable[[int, int], Any]


class Run(NamedTuple):
    """What `Loop` takes, besides its settings.

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


def make_run(configuration: Configuration, progress: Progress | None = None) -> Run:
    """Make what a configuration asks for; may download.

    Args:
        configuration: `DiffusionConfiguration`, `AutoencoderConfiguration` or `CLIPConfiguration`.
        progress: is told how far the caching of latents and text states is, see `cached`.

    Returns:
        A `Run`.

    Raises:
        ValueError: If something does not fit together; the message says what.

    Example:

    ```python
    values = {"preset": "stable-diffusion-v1-5", "data": {"folder": "flowers", "cache": "cache"}}
    run = make_run(resolve("diffusion", values))
    settings = run.configuration.loop
    Loop(run.trainer, run.optimizer, run.data, "run", settings).run(run.configuration.steps)
    ```
    """
    # Of new weights, which Keras draws by the process's own generator.
    keras.utils.set_random_seed(configuration.seed)
    match configuration:
        case DiffusionConfiguration():
            return _diffusion(configuration, progress)
        case AutoencoderConfiguration():
            return _autoencoder(configuration)
        case CLIPConfiguration():
            return _clip(configuration)
    raise ValueError(f"There is no recipe for a {type(configuration).__name__}.")


def make_optimizer(settings: OptimizerSettings, steps: int) -> keras.Optimizer:
    """Make the optimizer that a configuration asks for.

    Args:
        settings: `OptimizerSettings`.
        steps: int, of the whole run.

    Raises:
        ValueError: If there is no such optimizer, or it does not take an argument.
    """
    classes: dict[str, Any] = {
        name.lower(): value
        for name, value in vars(keras.optimizers).items()
        if inspect.isclass(value) and issubclass(value, keras.Optimizer)
    }
    del classes["optimizer"]
    if settings.name.lower() not in classes:
        raise ValueError(
            f"optimizer.name must be one of {', '.join(sorted(classes))}. "
            f"Received: {settings.name!r}"
        )
    try:
        return classes[settings.name.lower()](_learning_rate(settings, steps), **settings.settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.settings: {error}") from error


def _learning_rate(settings, steps):
    """The learning rate of each step, as a number where it is always the same."""
    if settings.decay == "constant" and not settings.warmup_steps:
        return settings.learning_rate
    return keras.optimizers.schedules.CosineDecay(
        0.0 if settings.warmup_steps else settings.learning_rate,
        decay_steps=max(steps - settings.warmup_steps, 1),
        # Of the highest, at the end: a cosine between equal numbers is constant.
        alpha=1.0 if settings.decay == "constant" else 0.0,
        warmup_target=settings.learning_rate if settings.warmup_steps else None,
        warmup_steps=settings.warmup_steps,
    )


def _diffusion(configuration, progress):
    settings = configuration.data
    folder = _folder(settings)
    model = _diffusion_model(configuration)
    configuration = _decided(configuration, model)
    architecture = model.diffusion_model.architecture
    diffusion_model_config(fields(architecture))  # now, not after weeks of training
    texts = architecture.context_width is not None
    if texts:
        _needs(folder, "caption", "draws from texts")
    if architecture.num_classes is not None:
        _check_labels(folder, architecture.num_classes)
    tokenizer = model.tokenizer if isinstance(model, StableDiffusion) else None
    data = _data(configuration, folder, model.img_height, model.img_width, tokenizer)
    trained = configuration.train_text_encoder
    empty: dict[str, Any] = {}
    kept: tuple[str, ...] = ()
    if settings.cache is not None:
        parts = _cacheable(model, texts and not trained)
        data = cached(data, settings.cache, progress=progress, **parts)
        names = {"image_encoder": "latents", "text_encoder": "context"}
        kept = tuple(names[part] for part in parts)
        if data.empty_context is not None:
            empty = {"empty": {"context": data.empty_context}}
    trainer = DiffusionTrainer.from_model(
        model,
        cached=kept,
        gradient_checkpointing=configuration.gradient_checkpointing,
        objective=configuration.objective,
        train_text_encoder=trained,
        draw=_draw(model, configuration, folder),
        **empty,
    )
    optimizer = make_optimizer(configuration.optimizer, configuration.steps)
    return Run(trainer, optimizer, data, configuration)


def _diffusion_model(configuration) -> Pipeline:
    size = configuration.data.height, configuration.data.width
    if configuration.preset is not None:
        return open_model(configuration.preset, *size, dtype=configuration.dtype)
    parts = configuration.model
    if None in size:
        raise ValueError("A new model needs `data.height` and `data.width`, in pixels.")
    models: dict[str, Any] = {
        "diffusion_model": DiffusionModel(
            parts.diffusion_model, dtype=configuration.dtype, name="diffusion_model"
        )
    }
    if parts.autoencoder is not None:
        source = _source(parts.autoencoder)
        for kind in ("image_encoder", "image_decoder"):
            models[kind] = source.model(kind, configuration.dtype)
    if parts.text_encoder is None:
        model_class = PixelDiffusion if parts.autoencoder is None else LatentDiffusion
        return model_class.from_parts(models, parts.schedule, size)
    models["text_encoder"], tokenizer = _text_encoder(parts, configuration)
    return StableDiffusion.from_parts(models, parts.schedule, size, tokenizer=tokenizer)


def _text_encoder(parts, configuration):
    """A text encoder, new or from another model, and its tokenizer."""
    if isinstance(parts.text_encoder, TextEncoderArchitecture):
        encoder = TextEncoder(parts.text_encoder, dtype=configuration.dtype, name="text_encoder")
        clip_initialization.initialize(encoder, configuration.seed)
        return encoder, _tokenizer(parts.tokenizer, parts.text_encoder)
    source = _source(parts.text_encoder)
    encoder = source.model("text_encoder", configuration.dtype)
    return variables.without_projection(encoder), source.tokenizer()


def _tokenizer(name, architecture):
    if name == "byte_level":
        return SimpleTokenizer.byte_level(max_length=architecture.max_length)
    if name == "clip":
        return SimpleTokenizer.default(max_length=architecture.max_length)
    return _source(name).tokenizer()


def _source(name) -> Source:
    """Where parts come from; unlike a whole model's folder it need not hold all of them."""
    if os.path.isdir(name):
        return CheckpointSource(name, size=(1, 1))
    return open_source(name)


def _decided(configuration, model):
    """The configuration with what follows from the model."""
    objective, parts = configuration.objective, configuration.model
    architecture = model.diffusion_model.architecture
    if architecture.context_width is None and architecture.num_classes is None:
        objective = dataclasses.replace(objective, caption_dropout=0.0)
    new = parts is not None and isinstance(parts.text_encoder, TextEncoderArchitecture)
    return dataclasses.replace(
        configuration,
        objective=objective,
        train_text_encoder=configuration.train_text_encoder or new,
    )


def _cacheable(model, texts):
    """The encoders whose results the cache keeps."""
    parts = {}
    if not isinstance(model, PixelDiffusion):
        parts["image_encoder"] = model.image_encoder
    if texts:
        parts["text_encoder"] = model.text_encoder
    if not parts:
        raise ValueError(
            "A model of pixels without a fixed text encoder has nothing to cache. "
            "Leave out `data.cache`."
        )
    return parts


def _draw(model, configuration, folder) -> Callable[[int], np.ndarray]:
    """A function that draws pictures for the grids."""
    samples = configuration.samples
    settings = {
        "num_steps": samples.num_steps,
        "unconditional_guidance_scale": samples.guidance_scale,
        "seed": samples.seed,
        "verbose": 0,
    }
    if isinstance(model, StableDiffusion):
        captions = dict.fromkeys(row["caption"] for row in folder.rows)
        prompts = samples.prompts or tuple(captions)[:64]
        return lambda count: model.text_to_image(_cycle(prompts, count), **settings)
    num_classes = model.diffusion_model.architecture.num_classes
    if num_classes is None:
        settings["unconditional_guidance_scale"] = 1.0
        return lambda count: model.generate_image(batch_size=count, **settings)
    return lambda count: model.generate_image(_cycle(range(num_classes), count), **settings)


def _cycle(values: Sequence[Any], count: int) -> list[Any]:
    return [values[number % len(values)] for number in range(count)]


def _autoencoder(configuration):
    architecture, dtype = configuration.model, configuration.dtype
    if configuration.preset is not None:
        source = _source(configuration.preset)
        halves = [source.model(kind, dtype) for kind in ("image_encoder", "image_decoder")]
    else:
        halves = [
            ImageEncoder(architecture, dtype=dtype, name="image_encoder"),
            ImageDecoder(architecture, dtype=dtype, name="image_decoder"),
        ]
    autoencoder_config(fields(halves[0].architecture), 8)
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
    data = _data(configuration, _folder(configuration.data))
    optimizer = make_optimizer(configuration.optimizer, configuration.steps)
    return Run(trainer, optimizer, data, configuration)


def _clip(configuration):
    folder = _folder(configuration.data)
    _needs(folder, "caption", "compares pictures with texts")
    if configuration.preset is not None:
        trainer = CLIPTrainer.from_folder(configuration.preset, configuration.dtype)
        if trainer.tokenizer is None:
            raise ValueError(f"{configuration.preset!r} holds no tokenizer.")
    else:
        parts, dtype = configuration.model, configuration.dtype
        tower = ImageTower(parts.image_tower, dtype=dtype, name="image_tower")
        encoder = TextEncoder(parts.text_encoder, dtype=dtype, name="text_encoder")
        for network in (tower, encoder):
            clip_initialization.initialize(network, configuration.seed)
        tokenizer = _tokenizer(parts.tokenizer, parts.text_encoder)
        trainer = CLIPTrainer(tower, encoder, tokenizer=tokenizer)
    side = trainer.image_tower.architecture.image_size
    data = _data(configuration, folder, side, side, trainer.tokenizer)
    optimizer = make_optimizer(configuration.optimizer, configuration.steps)
    return Run(trainer, exclude_from_decay(optimizer, trainer), data, configuration)


def _folder(settings) -> ImageFolder:
    if settings.folder is None:
        raise ValueError("`data.folder` is missing: give the folder of the pictures.")
    return ImageFolder(settings.folder)


def _needs(folder, column, reason):
    if column not in folder.rows[0]:
        raise ValueError(
            f"The model {reason}, and {str(folder.path)!r} has no {column}s. Add them in its "
            "metadata.jsonl."
        )


def _check_labels(folder, num_classes):
    _needs(folder, "label", "draws classes")
    highest = max(row["label"] for row in folder.rows)
    if highest >= num_classes:
        raise ValueError(
            f"The model knows the classes 0 to {num_classes - 1}, and {str(folder.path)!r} has a "
            f"label {highest}. Give a new model num_classes={highest + 1}."
        )


def _data(configuration, folder, height=None, width=None, tokenizer=None) -> Data:
    settings = configuration.data
    height, width = settings.height or height, settings.width or width
    if height is None or width is None:
        raise ValueError("`data.height` and `data.width` are missing: give them in pixels.")
    preprocessing = Preprocessing(height, width, settings.crop, settings.crop_share, settings.flip)
    return Data(
        folder,
        preprocessing,
        tokenizer,
        augmentation=[_layer(values) for values in settings.augmentation],
        seed=configuration.seed,
        shuffle=settings.shuffle,
        workers=settings.workers,
    )


def _layer(values):
    """A layer of keras-cv from its name and arguments."""
    from keras_cv import layers

    # Layers tell ranges by tuples, and JSON has lists alone.
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    name = arguments.pop("layer", None)
    classes: dict[Any, Any] = {
        key: value
        for key, value in vars(layers).items()
        if inspect.isclass(value) and issubclass(value, keras.layers.Layer)
    }
    if str(name) not in classes:
        raise ValueError(
            "data.augmentation: each item needs `layer`, the name of a layer in keras_cv.layers "
            f"such as 'RandomContrast'. Received: {name!r}"
        )
    try:
        return classes[name](**arguments, dtype="float32")
    except (TypeError, ValueError) as error:
        raise ValueError(f"data.augmentation, {name}: {error}") from error
