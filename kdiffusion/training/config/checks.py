"""Refuse a configuration before anything is downloaded, made or cached.

What follows from values alone is refused by the records themselves. These functions look at files,
and then at the architectures of the parts, which a source knows without their weights.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import keras

from kdiffusion.images import check_size
from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    ImageTowerArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.pipelines.settings import Settings
from kdiffusion.training.config.schema import (
    AutoencoderConfiguration,
    CLIPConfiguration,
    Configuration,
    DiffusionConfiguration,
    check_autoencoder,
)
from kdiffusion.training.config.sections import DataSettings
from kdiffusion.training.data.folders import ImageFolder
from kdiffusion.training.loop import checkpoints
from kdiffusion.training.trainers.autoencoder import check_latent_scale
from kdiffusion.training.trainers.clip import check_tokenizer
from kdiffusion.training.trainers.diffusion import check_parts
from kdiffusion.training.trainers.diffusion_objective import check_schedule
from kdiffusion.training.trainers.perceptual import SMALLEST_SIDE
from kdiffusion.weights.find import check_preset

# These tokenizers are made here; any other name is that of a model.
_TOKENIZERS = ("byte_level", "clip")
# Augmentations are tried on images of this size, in pixels, where the size is the model's own.
_TRIED_SIDE = 64


def check_files(configuration: Configuration) -> None:
    """Refuse names of files and models that are not there, and a cache that cannot be written.

    Args:
        configuration: `Configuration`.

    Raises:
        ValueError: If a path or a name stands for nothing; the message has its key.
    """
    for key, name in _models(configuration).items():
        try:
            check_preset(name)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    if isinstance(configuration, CLIPConfiguration) and configuration.preset is not None:
        if not os.path.isdir(configuration.preset):
            raise ValueError(
                "preset: CLIP is fine-tuned from a folder, such as a run's `model` or one of "
                f"transformers' CLIPModel. Received: preset={configuration.preset!r}"
            )
    perceptual = getattr(configuration, "perceptual", None)
    for key, path in {} if perceptual is None else vars(perceptual).items():
        if not os.path.isfile(path):
            raise ValueError(
                f"perceptual.{key} must be a file. Received: {path!r}. Download it first, see "
                "`Perceptual.from_checkpoints`."
            )
    if configuration.data.cache is not None:
        check_writable(Path(configuration.data.cache), "data.cache")


def check_writable(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be made or written.

    Args:
        folder: path; it need not exist.
        name: str, for the message.

    Raises:
        ValueError: If a part of the path is a file, or may not be written.
    """
    absolute = folder.absolute()
    nearest = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "may not be written" if nearest.is_dir() else "is no folder"
        raise ValueError(
            f"{name} must be a folder that can be written. Received: {str(folder)!r}, and "
            f"{str(nearest)!r} {reason}. Choose another one."
        )


def check_free(folder: Path) -> None:
    """Refuse the folder of a run that another process trains in.

    Args:
        folder: path of the run's folder; it need not exist.

    Raises:
        ValueError: If another process holds its lock.
    """
    if (folder / checkpoints.LOCK).exists():
        with checkpoints.locked(folder):
            pass


def image_folder(settings: DataSettings) -> ImageFolder:
    """List the images of a configuration.

    Args:
        settings: `DataSettings`.

    Raises:
        ValueError: If there is no such folder, or its list is wrong; see `ImageFolder`.
    """
    if settings.folder is None:
        raise ValueError("`data.folder` is missing: give the folder of the images.")
    return ImageFolder(settings.folder)


def augmentation_layers(settings: DataSettings) -> list[keras.layers.Layer]:
    """Make the layers of keras-cv that a configuration names, and try them.

    Args:
        settings: `DataSettings`.

    Raises:
        ValueError: If there is no such layer, it does not take an argument, or it cannot serve;
            see `Augmentation`.
    """
    if not settings.augmentation:
        return []
    from kdiffusion.training.data.augmentation import Augmentation

    layers = [_layer(values) for values in settings.augmentation]
    try:
        Augmentation(layers, settings.height or _TRIED_SIDE, settings.width or _TRIED_SIDE)
    except ValueError as error:
        raise ValueError(f"data.augmentation: {error}") from error
    return layers


def check_diffusion(configuration: DiffusionConfiguration, model: Any, images: ImageFolder) -> None:
    """Refuse a diffusion model that cannot be trained as configured, or with these images.

    Args:
        configuration: `DiffusionConfiguration`.
        model: pipeline, whose networks need not be loaded.
        images: `ImageFolder`.

    Raises:
        ValueError: If something does not fit together.
    """
    network = model.architecture("diffusion_model")
    if "context" in network.inputs:
        check_column(images, "caption", "The model is prompted with texts")
    if "label" in network.inputs:
        _check_labels(images, network.num_classes)
    if configuration.data.cache is not None and model.components().keys() == {"diffusion_model"}:
        raise ValueError(
            "A model of pixels without a text encoder has nothing to cache. Leave out `data.cache`."
        )
    check_schedule(model.schedule)
    if configuration.loop.sample_every is not None:
        samples = Settings(num_steps=configuration.samples.num_steps)
        samples.tables(1, model.schedule, model.default_sampling)
    # From here on a new model opens the sources of its other parts.
    parts = {name: model.architecture(name) for name in model.components()}
    check_parts(
        network,
        parts.get("image_encoder"),
        parts.get("text_encoder"),
        configuration.objective,
        configuration.train_text_encoder,
    )
    model.latent_shape(None, None)
    if isinstance(getattr(configuration.model, "text_encoder", None), TextEncoderArchitecture):
        check_tokenizer(model.tokenizer, parts["text_encoder"])


def check_autoencoder_run(
    configuration: AutoencoderConfiguration, architecture: AutoencoderArchitecture
) -> None:
    """Refuse an autoencoder that cannot be trained as configured.

    Args:
        configuration: `AutoencoderConfiguration`.
        architecture: `AutoencoderArchitecture`, new or of the preset.

    Raises:
        ValueError: If something does not fit together.
    """
    check_autoencoder(architecture)
    check_latent_scale(configuration.latent_scale, architecture)
    height, width = configuration.data.height, configuration.data.width
    if height is None or width is None:
        raise ValueError("`data.height` and `data.width` are missing: give them in pixels.")
    check_size(height, width, architecture.downsampling)
    smallest = {"perceptual network": SMALLEST_SIDE if configuration.perceptual else 1}
    if configuration.discriminator is not None:
        smallest["discriminator"] = configuration.discriminator.smallest_side
    for name, side in smallest.items():
        if min(height, width) < side:
            raise ValueError(
                f"The {name} needs images of {side} x {side} pixels at least. Received: "
                f"data.height={height}, data.width={width}. Use larger ones, or leave it out."
            )


def check_clip_run(configuration: CLIPConfiguration, image_tower: ImageTowerArchitecture) -> None:
    """Refuse a CLIP that cannot be trained as configured.

    Args:
        configuration: `CLIPConfiguration`.
        image_tower: `ImageTowerArchitecture`, new or of the preset.

    Raises:
        ValueError: If something does not fit together.
    """
    side = image_tower.image_size
    for name in ("height", "width"):
        value = getattr(configuration.data, name)
        if value not in (None, side):
            raise ValueError(
                f"The image tower takes images of {side} x {side} pixels. Received: "
                f"data.{name}={value}. Leave it out."
            )


def check_column(images: ImageFolder, column: str, reason: str) -> None:
    """Refuse images without a caption or a label.

    Args:
        images: `ImageFolder`.
        column: `"caption"` or `"label"`.
        reason: str, what needs it, for the message.

    Raises:
        ValueError: If there are none.
    """
    if column not in images.rows[0]:
        raise ValueError(
            f"{reason}, and {str(images.path)!r} has no {column}s. Add them in its metadata.jsonl."
        )


def _check_labels(images, num_classes):
    check_column(images, "label", "The model knows classes")
    highest = max(row["label"] for row in images.rows)
    if highest >= num_classes:
        raise ValueError(
            f"The model knows the classes 0 to {num_classes - 1}, and {str(images.path)!r} has a "
            f"label {highest}. Give a new model num_classes={highest + 1}."
        )


def _models(configuration):
    """Return the models that a configuration names, by their keys."""
    named = {"preset": configuration.preset}
    for key in ("autoencoder", "text_encoder", "tokenizer"):
        named[f"model.{key}"] = getattr(configuration.model, key, None)
    return {
        key: name
        for key, name in named.items()
        if isinstance(name, str) and not (key == "model.tokenizer" and name in _TOKENIZERS)
    }


def _layer(values):
    """Make a layer of keras-cv of its name and arguments."""
    from keras_cv import layers

    # Layers take ranges as tuples, and JSON has lists alone.
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
