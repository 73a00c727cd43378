"""Stable Diffusion, native to Keras.

The public names are imported when they are first used, so `import kdiffusion` is quick.
"""

import os
import sys
from typing import TYPE_CHECKING

from kdiffusion.lazy import lazy

__version__ = "0.1.0"

# TensorFlow leaves oneDNN's kernels out on processors that have AVX2 but neither VNNI nor AMX,
# where a denoising step takes nearly twice as long without them. It decides when it is loaded;
# where it already is, `processor.warn_without_onednn` tells.
if "tensorflow" not in sys.modules:
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

_MODULES = {
    "DiffusionModel": "kdiffusion.models.diffusion_model",
    "Guidance": "kdiffusion.sampling.guidance",
    "ImageDecoder": "kdiffusion.models.image_decoder",
    "ImageEncoder": "kdiffusion.models.image_encoder",
    "ImageTower": "kdiffusion.models.image_tower",
    "LatentDiffusion": "kdiffusion.pipelines.latent_diffusion",
    "PixelDiffusion": "kdiffusion.pipelines.latent_diffusion",
    "Sampler": "kdiffusion.sampling.samplers",
    "Schedule": "kdiffusion.sampling.schedule",
    "SimpleTokenizer": "kdiffusion.text.tokenizer",
    "Spacing": "kdiffusion.sampling.spacing",
    "StableDiffusion": "kdiffusion.pipelines.stable_diffusion",
    "TextEncoder": "kdiffusion.models.text_encoder",
    "open_model": "kdiffusion.pipelines.open_model",
}

__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:  # the same names for type checkers and editors, which cannot follow strings
    from kdiffusion.models.diffusion_model import DiffusionModel as DiffusionModel
    from kdiffusion.models.image_decoder import ImageDecoder as ImageDecoder
    from kdiffusion.models.image_encoder import ImageEncoder as ImageEncoder
    from kdiffusion.models.image_tower import ImageTower as ImageTower
    from kdiffusion.models.text_encoder import TextEncoder as TextEncoder
    from kdiffusion.pipelines.latent_diffusion import LatentDiffusion as LatentDiffusion
    from kdiffusion.pipelines.latent_diffusion import PixelDiffusion as PixelDiffusion
    from kdiffusion.pipelines.open_model import open_model as open_model
    from kdiffusion.pipelines.stable_diffusion import StableDiffusion as StableDiffusion
    from kdiffusion.sampling.guidance import Guidance as Guidance
    from kdiffusion.sampling.samplers import Sampler as Sampler
    from kdiffusion.sampling.schedule import Schedule as Schedule
    from kdiffusion.sampling.spacing import Spacing as Spacing
    from kdiffusion.text.tokenizer import SimpleTokenizer as SimpleTokenizer

__getattr__, __dir__ = lazy(__name__, _MODULES)
