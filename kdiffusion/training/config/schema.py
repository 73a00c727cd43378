"""What a training run can be told, and its defaults."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    ImageTowerArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.records import record
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.training.loop.settings import LoopSettings
from kdiffusion.training.trainers.autoencoder import AutoencoderObjective
from kdiffusion.training.trainers.diffusion_objective import Objective
from kdiffusion.training.trainers.discriminator import DiscriminatorArchitecture


@dataclass(frozen=True)
class DataSettings:
    """Where the pictures are and how they are shown to the network.

    Args:
        folder: path of the pictures, see `ImageFolder`.
        height: int, in pixels; `None` for the size that the model draws by default.
        width: int, likewise.
        crop, crop_share, flip: see `Preprocessing`.
        augmentation: list of dictionaries, each with `layer`, the name of a layer of
            `keras_cv.layers`, and its arguments; values are from 0 to 255, see `Augmentation`.
        cache: path of a folder for latents and text states, see `cached`; `None` for none.
        shuffle, workers: see `Data`.
    """

    folder: str | None = None
    height: int | None = None
    width: int | None = None
    crop: str = "center"
    crop_share: float = 1.0
    flip: bool = False
    augmentation: tuple[dict, ...] = ()
    cache: str | None = None
    shuffle: bool = True
    workers: int | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning rate.

    Args:
        name: of a class in `keras.optimizers`, in any case.
        learning_rate: float, the highest.
        warmup_steps: int, steps in which it rises from 0.
        decay: `"constant"`, or `"cosine"` down to 0 at the last step.
        settings: dictionary of further arguments of the class.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    decay: str = "constant"
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.decay not in ("constant", "cosine"):
            raise ValueError(
                f"`decay` must be 'constant' or 'cosine'. Received: decay={self.decay!r}"
            )
        if not self.learning_rate > 0 or self.warmup_steps < 0:
            raise ValueError(
                "`learning_rate` must be positive and `warmup_steps` not negative. Received: "
                f"learning_rate={self.learning_rate}, warmup_steps={self.warmup_steps}"
            )


@dataclass(frozen=True)
class SampleSettings:
    """The pictures that are drawn while a diffusion model is trained.

    Args:
        prompts: texts; none for the first captions of the data. A model of classes draws each.
        num_steps: int, steps of the sampler.
        guidance_scale: float.
        seed: int, of the first picture.
    """

    prompts: tuple[str, ...] = ()
    num_steps: int = 20
    guidance_scale: float = 3.0
    seed: int = 0


@dataclass(frozen=True)
class DiffusionParts:
    """A diffusion model that is trained from nothing.

    Args:
        diffusion_model: `DiffusionArchitecture`.
        schedule: `Schedule`.
        autoencoder: the model whose autoencoder makes the latents: a folder or a preset; `None`
            for a model of pixels.
        text_encoder: the model whose text encoder is used; or a `TextEncoderArchitecture`, which is
            trained too; `None` for a model without texts.
        tokenizer: of a new text encoder, `"clip"`, `"byte_level"`, or a model that has one.
    """

    diffusion_model: DiffusionArchitecture
    schedule: Schedule = Schedule()
    autoencoder: str | None = None
    text_encoder: TextEncoderArchitecture | str | None = None
    tokenizer: str = "byte_level"

    def __post_init__(self):
        width = self.diffusion_model.context_width
        if (width is None) != (self.text_encoder is None):
            raise ValueError(
                "A model of texts needs `text_encoder` and a `context_width` of its width in "
                "`diffusion_model`; one without texts the `context_width` null and no "
                f"`text_encoder`. Received: context_width={width} and "
                f"{'no' if self.text_encoder is None else 'a'} text_encoder"
            )
        if width is not None and self.autoencoder is None:
            raise ValueError("A model of texts draws latents: give `autoencoder` too.")


@dataclass(frozen=True)
class CLIPParts:
    """A CLIP that is trained from nothing.

    Args:
        image_tower: `ImageTowerArchitecture`.
        text_encoder: `TextEncoderArchitecture`, with a projection.
        tokenizer: see `DiffusionParts`.
    """

    image_tower: ImageTowerArchitecture
    text_encoder: TextEncoderArchitecture
    tokenizer: str = "byte_level"


@dataclass(frozen=True)
class PerceptualFiles:
    """The public weights of the perceptual network, see `Perceptual.from_checkpoints`.

    Args:
        vgg16: path.
        linear: path.
    """

    vgg16: str
    linear: str


@dataclass(frozen=True)
class Configuration:
    """What all runs have in common.

    Args:
        data: `DataSettings`.
        optimizer: `OptimizerSettings`.
        loop: `LoopSettings`, whose seed is `seed` and which says nothing of it here.
        steps: int, how many steps to train.
        seed: int from 0 to 2**32 - 1, of the new weights, the order of the data and all draws.
        dtype: Keras dtype policy of the networks, such as `"mixed_bfloat16"`.
        preset: the model to go on from: a folder, or a name in `weights.presets.PRESETS`.
        model: the architecture of a new one, in place of `preset`.
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
                "Give either `preset`, a model to go on from, or `model`, the architecture of a "
                f"new one. Received: {'both' if self.preset else 'neither'}"
            )
        object.__setattr__(self, "loop", dataclasses.replace(self.loop, seed=self.seed))

    @property
    def fields(self) -> dict[str, Any]:
        """All settings as JSON holds them; `resolve` makes the same configuration of them."""
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


@dataclass(frozen=True)
class CLIPConfiguration(Configuration):
    """A run of `CLIPTrainer`.

    Args:
        model: `CLIPParts`, in place of `preset`.
    """

    model: CLIPParts | None = None


KINDS: dict[str, type[Configuration]] = {
    "autoencoder": AutoencoderConfiguration,
    "clip": CLIPConfiguration,
    "diffusion": DiffusionConfiguration,
}

# Where they are not those of the records: Rombach et al. 2022 and its code for the autoencoder,
# Radford et al. 2021 for CLIP; an average of the weights for what draws.
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
    """Make a configuration of what people have said.

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
            optimizer.pop("settings", None)  # another class does not know them
        values = _merged(values, layer)
    if "seed" in _mapping(values.get("loop", {})):
        raise ValueError("loop.seed is not set there. Give `seed` beside `loop`.")
    values.setdefault("data", {})
    values.setdefault("optimizer", {})
    return record(KINDS[kind], values)


def _merged(low, high):
    """Nested dictionaries, one over the other."""
    merged = dict(low)
    for name, value in high.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


def _mapping(value):
    return value if isinstance(value, Mapping) else {}
