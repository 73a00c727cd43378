"""Training of autoencoders, CLIP and diffusion models.

The public names are imported when they are first used, like those of `kdiffusion`.
"""

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "Augmentation": "kdiffusion.training.augmentation",
    "AutoencoderObjective": "kdiffusion.training.autoencoder",
    "AutoencoderTrainer": "kdiffusion.training.autoencoder",
    "CLIPTrainer": "kdiffusion.training.clip",
    "Data": "kdiffusion.training.data",
    "DiffusionTrainer": "kdiffusion.training.diffusion",
    "Discriminator": "kdiffusion.training.discriminator",
    "ImageFolder": "kdiffusion.training.folders",
    "InMemory": "kdiffusion.training.data",
    "Loop": "kdiffusion.training.loop",
    "LoopSettings": "kdiffusion.training.loop_settings",
    "Objective": "kdiffusion.training.objective",
    "Perceptual": "kdiffusion.training.perceptual",
    "Prefetch": "kdiffusion.training.data",
    "Preprocessing": "kdiffusion.preprocessing",
    "Stream": "kdiffusion.training.streams",
    "Trainer": "kdiffusion.training.trainer",
    "cached": "kdiffusion.training.cache",
}

__all__ = [*_MODULES]

if TYPE_CHECKING:  # the same names for type checkers and editors, which cannot follow strings
    from kdiffusion.preprocessing import Preprocessing as Preprocessing
    from kdiffusion.training.augmentation import Augmentation as Augmentation
    from kdiffusion.training.autoencoder import AutoencoderObjective as AutoencoderObjective
    from kdiffusion.training.autoencoder import AutoencoderTrainer as AutoencoderTrainer
    from kdiffusion.training.cache import cached as cached
    from kdiffusion.training.clip import CLIPTrainer as CLIPTrainer
    from kdiffusion.training.data import Data as Data
    from kdiffusion.training.data import InMemory as InMemory
    from kdiffusion.training.data import Prefetch as Prefetch
    from kdiffusion.training.diffusion import DiffusionTrainer as DiffusionTrainer
    from kdiffusion.training.discriminator import Discriminator as Discriminator
    from kdiffusion.training.folders import ImageFolder as ImageFolder
    from kdiffusion.training.loop import Loop as Loop
    from kdiffusion.training.loop_settings import LoopSettings as LoopSettings
    from kdiffusion.training.objective import Objective as Objective
    from kdiffusion.training.perceptual import Perceptual as Perceptual
    from kdiffusion.training.streams import Stream as Stream
    from kdiffusion.training.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kdiffusion.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
