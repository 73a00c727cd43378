"""The sections of a run's configuration; each is checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.models.architectures import (
    DiffusionArchitecture,
    ImageTowerArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.sampling.schedule import Schedule


@dataclass(frozen=True)
class DataSettings:
    """The images, and how they are cut for the network.

    Args:
        folder: path of the images, see `ImageFolder`.
        height: int, in pixels; `None` for the size that the model generates by default.
        width: int, likewise.
        crop, crop_share, flip: see `Preprocessing`.
        augmentation: list of dictionaries, each with `layer`, the name of a layer of
            `keras_cv.layers`, and its arguments; values are from 0 to 255, see `Augmentation`.
        cache: path of a folder for latents and text states, see `cached`; `None` for none.
        shuffle, workers: see `Data`.

    Raises:
        ValueError: If a value is out of range.
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

    def __post_init__(self):
        any_size = 1
        self.preprocessing(self.height or any_size, self.width or any_size)
        for name in ("height", "width", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more, or null. Received: {name}={value}")

    def preprocessing(self, height: int, width: int) -> Preprocessing:
        """Return the crop and the resize to a size in pixels."""
        return Preprocessing(height, width, self.crop, self.crop_share, self.flip)


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning rate.

    Args:
        name: of a class in `keras.optimizers`, in any case.
        learning_rate: float, the highest.
        warmup_steps: int, steps in which it rises from 0.
        decay: `"constant"`, or `"cosine"` down to 0 at the last step.
        settings: dictionary of further arguments of the class.

    Raises:
        ValueError: If a value is out of range.
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
        if not 0 < self.learning_rate < math.inf or self.warmup_steps < 0:
            raise ValueError(
                "`learning_rate` must be positive and `warmup_steps` not negative. Received: "
                f"learning_rate={self.learning_rate}, warmup_steps={self.warmup_steps}"
            )
        if "learning_rate" in self.settings:
            raise ValueError("Give `learning_rate` beside `settings`, not in it.")


@dataclass(frozen=True)
class SampleSettings:
    """The images that are generated while a diffusion model is trained.

    Args:
        prompts: texts; none for the first captions of the data. A model of classes generates each
            class.
        num_steps: int, steps of the sampler.
        guidance_scale: float.
        seed: int, of the first image.

    Raises:
        ValueError: If a value is out of range.
    """

    prompts: tuple[str, ...] = ()
    num_steps: int = 20
    guidance_scale: float = 3.0
    seed: int = 0

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(
                f"`num_steps` must be 1 or more. Received: num_steps={self.num_steps}. Use 20."
            )
        if not math.isfinite(self.guidance_scale):
            raise ValueError(
                "`guidance_scale` must be a finite number. "
                f"Received: guidance_scale={self.guidance_scale}. Use 3, or 1 for no guidance."
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(
                "`seed` must be a whole number from -2**63 to 2**64 - 1. "
                f"Received: seed={self.seed}"
            )


@dataclass(frozen=True)
class DiffusionParts:
    """A diffusion model that is trained from scratch.

    Args:
        diffusion_model: `DiffusionArchitecture`.
        schedule: `Schedule`.
        autoencoder: the model whose autoencoder makes the latents: a folder or a preset; `None`
            for a model of pixels.
        text_encoder: the model whose text encoder is used; or a `TextEncoderArchitecture`, which is
            trained too; `None` for a model without texts.
        tokenizer: of a new text encoder, `"clip"`, `"byte_level"`, or a model that has one.

    Raises:
        ValueError: If the parts do not fit each other.
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
        texts = self.text_encoder
        if isinstance(texts, TextEncoderArchitecture) and texts.width != width:
            raise ValueError(
                "`context_width` of `diffusion_model` must be the `width` of `text_encoder`. "
                f"Received: context_width={width}, width={texts.width}"
            )
        if width is not None and self.autoencoder is None:
            raise ValueError("A model of texts generates latents: give `autoencoder` too.")
        channels = self.diffusion_model.out_channels
        if self.autoencoder is None and channels != 3:
            raise ValueError(
                "A model without `autoencoder` generates pixels, which have 3 channels. Received: "
                f"out_channels={channels}. Use in_channels=3 and out_channels=3, or give "
                "`autoencoder`."
            )


@dataclass(frozen=True)
class CLIPParts:
    """A CLIP that is trained from scratch.

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
