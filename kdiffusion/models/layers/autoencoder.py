"""The parts that the image encoder and the image decoder share."""

from __future__ import annotations

from kdiffusion.models.layers.attention import SpatialAttention
from kdiffusion.models.layers.norms import GroupNorm
from kdiffusion.models.layers.residual import ResnetBlock

# Every group normalization of the autoencoder; the original implementation's value, ten times
# smaller than the U-Net's.
EPSILON = 1e-6


def resnet(x, channels, architecture, options, name):
    """Apply a residual block without time embedding."""
    return ResnetBlock(channels, architecture.num_groups, EPSILON, name=name, **options)(x)


def middle(x, architecture, options):
    """Apply a residual block, attention over all positions, and a residual block."""
    channels = architecture.channels[-1]
    x = resnet(x, channels, architecture, options, "mid_resnet_0")
    if architecture.mid_attention:
        x = SpatialAttention(architecture.num_groups, name="mid_attention", **options)(x)
    return resnet(x, channels, architecture, options, "mid_resnet_1")


def blocks(way, architecture):
    """Return the names of the layers that gradient checkpointing computes twice."""
    levels, layers = len(architecture.channels), architecture.layers_per_level + 1
    names = [f"{way}_{level}_resnet_{i}" for level in range(levels) for i in range(layers)]
    return [*names, "mid_resnet_0", "mid_attention", "mid_resnet_1"]


def norm_out(x, architecture, options):
    """Apply the last normalization and its activation."""
    norm = GroupNorm(
        architecture.num_groups, EPSILON, "silu", dtype=options["dtype"], name="norm_out"
    )
    return norm(x)
