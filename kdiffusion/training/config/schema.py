"""The configuration of a training run: its keys, its defaults, and what refuses it at once."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from kdiffusion.models.architectures import AutoencoderArchitecture
from kdiffusion.records import fields, record
from kdiffusion.training.config.sections import (
    CLIPParts,
    DataSettings,
    DiffusionParts,
    OptimizerSettings,
    PerceptualFiles,
    SampleSettings,
)
from kdiffusion.training.loop.checks import check_accumulation, check_compute_dtype
from kdiffusion.training.loop.settings import LoopSettings
from kdiffusion.training.trainers.autoencoder import (
    AutoencoderObjective,
    check_latent_scale,
)
from kdiffusion.training.trainers.clip import check_towers
from kdiffusion.training.trainers.diffusion import check_network
from kdiffusion.training.trainers.diffusion_objective import Objective, check_schedule
from kdiffusion.training.trainers.discriminator import DiscriminatorArchitecture
from weights_conversion import autoencoder_config, diffusion_model_config


@dataclass(frozen=True)
class Configuration:
    """The settings that all runs have in common.

    Args:
        data: `DataSettings`.
        optimizer: `OptimizerSettings`.
        loop: `LoopSettings`; its seed is `seed`.
        steps: int, how many steps to train.
        seed: int from 0 to 2**32 - 1, of new weights, the data's order and all random
            numbers.
        dtype: Keras dtype policy of the networks, such as `"mixed_bfloat16"`.
        preset: the model to fine-tune: a folder, or a name in `weights.presets.PRESETS`.
        model: the architecture of a new one, in place of `preset`.

    Raises:
        ValueError: If a value is out of range, or values do not fit each other.
    """

    data: DataSettings
    optimizer: OptimizerSettings
    loop: LoopSettings
    steps: int = 10_000
    seed: int = 0
    dtype: str = "float32"
    preset: str | None = None
    model: Any = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"`steps` must be 1 or more. Received: steps={self.steps}")
        if (self.preset is None) == (self.model is None):
            raise ValueError(
                "Give either `preset`, a model to fine-tune, or `model`, the architecture of a "
                f"new one. Received: {'both' if self.preset else 'neither'}"
            )
        object.__setattr__(self, "loop", dataclasses.replace(self.loop, seed=self.seed))
        _check_dtype(self.dtype)

    @property
    def fields(self) -> dict[str, Any]:
        """The settings as JSON holds them; `resolve` makes the same configuration of them."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        del values["loop"]["seed"]
        return values


@dataclass(frozen=True)
class DiffusionConfiguration(Configuration):
    """A run of `DiffusionTrainer`.

    Args:
        model: `DiffusionParts`, in place of `preset`.
        objective: `Objective`.
        train_text_encoder: bool, whether the text encoder learns too.
        gradient_checkpointing: bool, saves memory for time.
        samples: `SampleSettings`.
    """

    model: DiffusionParts | None = None
    objective: Objective = Objective()
    train_text_encoder: bool = False
    gradient_checkpointing: bool = False
    samples: SampleSettings = SampleSettings()

    def __post_init__(self):
        super().__post_init__()
        if self.data.cache is not None and (self.data.crop != "center" or self.data.augmentation):
            raise ValueError(
                "Latents are cached of one view of each image: use crop='center' and no "
                f"augmentation, or no `cache`. Received: data.crop={self.data.crop!r} and "
                f"{'some' if self.data.augmentation else 'no'} augmentation"
            )
        if self.model is None:
            return
        check_network(self.model.diffusion_model)
        check_schedule(self.model.schedule)
        diffusion_model_config(fields(self.model.diffusion_model))  # as it will be saved
        if self.train_text_encoder and self.model.text_encoder is None:
            raise ValueError(
                "`train_text_encoder` needs a model of texts. Received: a model without "
                "`text_encoder`. Leave it out."
            )


@dataclass(frozen=True)
class AutoencoderConfiguration(Configuration):
    """A run of `AutoencoderTrainer`.

    Args:
        model: `AutoencoderArchitecture`, in place of `preset`.
        objective: `AutoencoderObjective`.
        discriminator: `DiscriminatorArchitecture`, or `None` for none.
        perceptual: `PerceptualFiles`, or `None` for none.
        latent_scale: see `AutoencoderTrainer`.
    """

    model: AutoencoderArchitecture | None = None
    objective: AutoencoderObjective = AutoencoderObjective()
    discriminator: DiscriminatorArchitecture | None = None
    perceptual: PerceptualFiles | None = None
    latent_scale: str = "global"

    def __post_init__(self):
        super().__post_init__()
        separable = self.discriminator is None
        check_accumulation(self.loop.accumulation, separable, "AutoencoderTrainer")
        check_latent_scale(self.latent_scale, self.model)
        if self.model is not None:
            check_autoencoder(self.model)
        if self.discriminator is not None:
            check_image_channels("discriminator", self.discriminator.image_channels)


@dataclass(frozen=True)
class CLIPConfiguration(Configuration):
    """A run of `CLIPTrainer`.

    Args:
        model: `CLIPParts`, in place of `preset`.
    """

    model: CLIPParts | None = None

    def __post_init__(self):
        super().__post_init__()
        check_accumulation(self.loop.accumulation, False, "CLIPTrainer")
        if self.loop.batch_size < 2:
            raise ValueError(
                "A contrastive loss compares the samples of a batch. Received: "
                f"batch_size={self.loop.batch_size}. Use two or more."
            )
        if self.model is not None:
            check_towers(self.model.image_tower, self.model.text_encoder, None)
            check_image_channels("image_tower", self.model.image_tower.image_channels)


KINDS: dict[str, type[Configuration]] = {
    "autoencoder": AutoencoderConfiguration,
    "clip": CLIPConfiguration,
    "diffusion": DiffusionConfiguration,
}

# These differ from the defaults of the records: the autoencoder's are those of Rombach et al. 2022
# and its code, CLIP's those of Radford et al. 2021. A diffusion model averages its weights, because
# averages generate better images.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "autoencoder": {
        "optimizer": {
            "name": "adam",
            "learning_rate": 5e-5,
            "settings": {"beta_1": 0.5, "beta_2": 0.9},
        },
        "loop": {"batch_size": 8},
    },
    "clip": {
        "optimizer": {
            "learning_rate": 5e-4,
            "warmup_steps": 500,
            "settings": {"weight_decay": 0.2, "beta_2": 0.98, "epsilon": 1e-6},
        },
        "loop": {"batch_size": 64},
    },
    "diffusion": {
        "objective": {"caption_dropout": 0.1},
        "optimizer": {"settings": {"weight_decay": 0.01}},
        "loop": {"batch_size": 8, "clip_norm": 1.0, "ema_decay": 0.9999},
    },
}


def resolve(kind: str, *layers: Mapping[str, Any]) -> Configuration:
    """Make a configuration of settings.

    Args:
        kind: `"autoencoder"`, `"clip"` or `"diffusion"`.
        layers: dictionaries of settings, later ones over earlier ones, all over the defaults.

    Returns:
        The `Configuration` of this kind.

    Raises:
        ValueError: If a key is unknown or a value is of the wrong type or out of range; the
            message names its place.
    """
    values: dict[str, Any] = copy.deepcopy(_DEFAULTS[kind])
    for layer in layers:
        optimizer = values.get("optimizer", {})
        name = _mapping(layer.get("optimizer")).get("name")
        if name not in (None, optimizer.get("name", OptimizerSettings.name)):
            optimizer.pop("settings", None)  # another class has other arguments
        values = _merged(values, layer)
    if "seed" in _mapping(values.get("loop", {})):
        raise ValueError("`loop` has no `seed` of its own. Give `seed` beside `loop`.")
    values.setdefault("data", {})
    values.setdefault("optimizer", {})
    return record(KINDS[kind], values)


def check_autoencoder(architecture: AutoencoderArchitecture) -> None:
    """Refuse an autoencoder that takes no images, or that no file can hold.

    Args:
        architecture: `AutoencoderArchitecture`.

    Raises:
        ValueError: For other images than those of three channels; for what diffusers lacks.
    """
    check_image_channels("the autoencoder", architecture.image_channels)
    autoencoder_config(fields(architecture))


def check_image_channels(name: str, channels: int) -> None:
    """Refuse a network that takes no images of three channels.

    Args:
        name: str, for the message.
        channels: int, channels of an image as the network takes it.

    Raises:
        ValueError: If they are not three.
    """
    if channels != 3:
        raise ValueError(
            f"Images have three channels, and {name} must take them. "
            f"Received: image_channels={channels}. Use 3."
        )


def _check_dtype(dtype):
    """Refuse a dtype policy that is unknown or cannot be trained with."""
    try:
        policy = keras.dtype_policies.get(dtype)
    except ValueError:
        policy = None
    if policy is None or policy.quantization_mode or "float" not in policy.compute_dtype:
        raise ValueError(
            "`dtype` must be a Keras dtype policy of floating numbers. "
            f"Received: dtype={dtype!r}. Use 'float32' or 'mixed_bfloat16'."
        )
    check_compute_dtype(policy.compute_dtype)


def _merged(low, high):
    """Merge nested dictionaries, one over the other."""
    merged = dict(low)
    for name, value in high.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


def _mapping(value):
    return value if isinstance(value, Mapping) else {}
