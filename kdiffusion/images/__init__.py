"""Images, masks and previews as arrays."""

from kdiffusion.images.conversion import (
    check_size,
    latent_mask,
    masked_image,
    pad_for_outpainting,
    preview,
    slerp,
    to_mask,
    to_model,
    to_uint8,
)
from kdiffusion.images.preprocessing import Preprocessing

__all__ = [
    "Preprocessing",
    "check_size",
    "latent_mask",
    "masked_image",
    "pad_for_outpainting",
    "preview",
    "slerp",
    "to_mask",
    "to_model",
    "to_uint8",
]
