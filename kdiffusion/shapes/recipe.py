"""The recipe of our own small model: its words, architectures and stages, as records."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    ImageTowerArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.shapes.data import MAX_LENGTH, SceneData
from kdiffusion.shapes.scenes import Words


@dataclass(frozen=True)
class Stage:
    """The length and the speed of a network's training.

    Args:
        steps: int.
        batch_size: int.
        learning_rate: float, the highest; it rises for `warmup_steps` and falls as a cosine.
        warmup_steps: int.
        ema_decay: float, of the averaged weights; `None` for none.
        save_every: int, steps between checkpoints.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 50
    ema_decay: float | None = None
    save_every: int = 250


@dataclass(frozen=True)
class Recipe:
    """A model, its training, and the quality that it must reach.

    Args:
        seed: int, of scenes, new weights and all random numbers.
        words: `Words` of the scenes.
        image_size: int, side of the images in pixels.
        autoencoder, text_encoder, image_tower, diffusion_model: architectures.
        schedule: `Schedule`, which ends in pure noise: flat images need that.
        autoencoder_stage, clip_stage, diffusion_stage: `Stage` of each.
        latents: int, scenes whose latents the diffusion model is trained with.
        min_psnr: float, in dB, that reconstructions must reach, see `check_autoencoder`.
        min_accuracy: float, share of reconstructions that must agree with their captions.
        min_retrieval: float, share of first guesses of CLIP that must be right, see `measure_clip`.
        prompts: int, how many prompts measure the model and its parts.
        reported: bool, whether the finished model is measured, which takes all words.
    """

    seed: int = 0
    words: Words = Words()
    image_size: int = 64
    autoencoder: AutoencoderArchitecture = AutoencoderArchitecture(
        channels=(16, 32, 64),
        layers_per_level=1,
        num_groups=8,
        latent_scale=1.0,
        mid_attention=False,
    )
    text_encoder: TextEncoderArchitecture = TextEncoderArchitecture(
        vocabulary_size=280,
        max_length=MAX_LENGTH,
        width=128,
        depth=3,
        num_heads=4,
        mlp_width=512,
        projection_width=128,
        end_id=279,
    )
    image_tower: ImageTowerArchitecture = ImageTowerArchitecture(
        image_size=64,
        patch_size=8,
        width=96,
        depth=3,
        num_heads=4,
        mlp_width=384,
        projection_width=128,
    )
    diffusion_model: DiffusionArchitecture = DiffusionArchitecture(
        channels=(48, 96, 112),
        layers_per_level=1,
        # Attention at 16 x 16, too, would take a third more work.
        depths=(0, 1, 1),
        num_heads=(2, 4, 4),
        context_width=128,
        num_groups=16,
    )
    schedule: Schedule = Schedule(prediction="v", rescale_zero_terminal_snr=True)
    autoencoder_stage: Stage = Stage(4000, 16, 2e-3)
    clip_stage: Stage = Stage(4000, 128, 1e-3, warmup_steps=100)
    diffusion_stage: Stage = Stage(
        14_000, 32, 1e-3, warmup_steps=200, ema_decay=0.999, save_every=500
    )
    latents: int = 65_536
    min_psnr: float = 33.0
    min_accuracy: float = 0.98
    min_retrieval: float = 0.9
    prompts: int = 512
    reported: bool = True

    def data(self, contrasts: bool = False) -> SceneData:
        """Return the endless scenes of training, see `SceneData`."""
        return SceneData(self.seed, self.image_size, self.words, contrasts=contrasts)


# This recipe takes four minutes on two cores. Its images have a quarter of the size, too small for
# kernels that take long to compile.
MICRO = Recipe(
    words=Words(("red", "blue"), ("circle", "cross"), ("white",), pairs=0.0),
    image_size=32,
    autoencoder=dataclasses.replace(Recipe.autoencoder, channels=(12, 24, 48), num_groups=4),
    text_encoder=dataclasses.replace(
        Recipe.text_encoder, width=64, depth=2, num_heads=2, mlp_width=128, projection_width=64
    ),
    image_tower=dataclasses.replace(
        Recipe.image_tower,
        image_size=32,
        width=64,
        depth=2,
        num_heads=2,
        mlp_width=128,
        projection_width=64,
    ),
    diffusion_model=dataclasses.replace(
        Recipe.diffusion_model,
        channels=(32, 64),
        depths=(0, 1),
        num_heads=(2, 2),
        context_width=64,
    ),
    autoencoder_stage=Stage(300, 8, 4e-3),
    clip_stage=Stage(60, 64, 2e-3, warmup_steps=10),
    diffusion_stage=Stage(1000, 32, 2e-3, ema_decay=0.99),
    latents=2048,
    min_psnr=20.0,
    min_accuracy=0.25,
    min_retrieval=0.0,
    prompts=16,
    reported=False,
)
