"""Training of autoencoders, CLIP and diffusion models.

The public names are imported when they are first used, like those of `kdiffusion`.
"""

from typing import TYPE_CHECKING

from kdiffusion.lazy import lazy

_MODULES = {
    "Augmentation": "kdiffusion.training.data.augmentation",
    "AutoencoderObjective": "kdiffusion.training.trainers.autoencoder",
    "AutoencoderTrainer": "kdiffusion.training.trainers.autoencoder",
    "CLIPTrainer": "kdiffusion.training.trainers.clip",
    "Data": "kdiffusion.training.data.batches",
    "DiffusionTrainer": "kdiffusion.training.trainers.diffusion",
    "Discriminator": "kdiffusion.training.trainers.discriminator",
    "ImageFolder": "kdiffusion.training.data.folders",
    "InMemory": "kdiffusion.training.data.batches",
    "Loop": "kdiffusion.training.loop.loop",
    "LoopSettings": "kdiffusion.training.loop.settings",
    "Objective": "kdiffusion.training.trainers.diffusion_objective",
    "Perceptual": "kdiffusion.training.trainers.perceptual",
    "Prefetch": "kdiffusion.training.data.batches",
    "Preprocessing": "kdiffusion.images.preprocessing",
    "Stream": "kdiffusion.training.data.streams",
    "Trainer": "kdiffusion.training.trainers.base",
    "cached": "kdiffusion.training.data.cache",
}

__all__ = [*_MODULES]

if TYPE_CHECKING:  # the same names for type checkers and editors, which cannot follow strings
    from kdiffusion.images.preprocessing import Preprocessing as Preprocessing
    from kdiffusion.training.data.augmentation import Augmentation as Augmentation
    from kdiffusion.training.data.batches import Data as Data
    from kdiffusion.training.data.batches import InMemory as InMemory
    from kdiffusion.training.data.batches import Prefetch as Prefetch
    from kdiffusion.training.data.cache import cached as cached
    from kdiffusion.training.data.folders import ImageFolder as ImageFolder
    from kdiffusion.training.data.streams import Stream as Stream
    from kdiffusion.training.loop.loop import Loop as Loop
    from kdiffusion.training.loop.settings import LoopSettings as LoopSettings
    from kdiffusion.training.trainers.autoencoder import (
        AutoencoderObjective as AutoencoderObjective,
    )
    from kdiffusion.training.trainers.autoencoder import AutoencoderTrainer as AutoencoderTrainer
    from kdiffusion.training.trainers.base import Trainer as Trainer
    from kdiffusion.training.trainers.clip import CLIPTrainer as CLIPTrainer
    from kdiffusion.training.trainers.diffusion import DiffusionTrainer as DiffusionTrainer
    from kdiffusion.training.trainers.diffusion_objective import Objective as Objective
    from kdiffusion.training.trainers.discriminator import Discriminator as Discriminator
    from kdiffusion.training.trainers.perceptual import Perceptual as Perceptual

__getattr__, __dir__ = lazy(__name__, _MODULES)
