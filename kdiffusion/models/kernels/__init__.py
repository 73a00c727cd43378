"""The arithmetic of the layers. Which form of it runs where is decided here."""

from kdiffusion.models.kernels.attention import attend
from kdiffusion.models.kernels.convolution import convolve, convolve_doubled
from kdiffusion.models.kernels.flash import works as has_flash_attention
from kdiffusion.models.kernels.linear import dense, gated_gelu
from kdiffusion.models.kernels.normalization import normalize, normalize_tokens, normalizer

__all__ = [
    "attend",
    "convolve",
    "convolve_doubled",
    "dense",
    "gated_gelu",
    "has_flash_attention",
    "normalize",
    "normalize_tokens",
    "normalizer",
]
