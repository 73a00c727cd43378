"""Architecture fields of Stable Diffusion 1 and 2, derived from the shapes in a CompVis file.

Some facts are in no shape: 8 heads in version 1 and heads of 64 in version 2, groups of 32, the
activation, and every epsilon; they are the family's. Sources: `v1-inference.yaml` of
CompVis/stable-diffusion and `v2-inference.yaml` of Stability-AI/stablediffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_conversion.configs.autoencoder import LATENT_SCALE
from weights_conversion.files.errors import CheckpointMismatch, printable
from weights_conversion.names.text_encoder import clip_prefix, open_clip_prefix

_NUM_GROUPS = 32
_HEADS = {768: lambda width: 8, 1024: lambda width: width // 64}  # by width of the context
_TEXT_HEAD_WIDTH = 64
_OPEN_CLIP_DEPTH = 23  # of 24; the last one's output is not used


class Shapes:
    """The shapes in a file, by name; what is missing or of another rank is an error.

    Args:
        path: the file, for messages.
        shapes: shape of each tensor, in CompVis names.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]):
        self.path, self.shapes = path, shapes

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def of(self, name: str, *ranks: int) -> tuple[int, ...]:
        """Return the shape of a tensor, which must have one of some ranks."""
        if name not in self.shapes:
            raise CheckpointMismatch(
                f"{self.path} has no tensor {printable(name)}, which its model needs. "
                "Download it again, or take the model's folder."
            )
        shape = self.shapes[name]
        if len(shape) not in ranks or 0 in shape:
            raise CheckpointMismatch(
                f"{self.path}: tensor {printable(name)} has the shape {shape}; expected "
                f"{' or '.join(map(str, ranks))} dimensions."
            )
        return shape

    def count(self, pattern: str) -> int:
        """Count the numbers from 0 that give a name of the file."""
        number = 0
        while pattern.format(number) in self.shapes:
            number += 1
        return number

    def unsupported(self, what: str) -> CheckpointMismatch:
        """Return the error of a file that no field describes."""
        return CheckpointMismatch(
            f"{self.path} {what}, which Stable Diffusion 1 and 2 have not. Pass config= with a "
            "folder in diffusers' layout that describes it."
        )


def diffusion_model(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Return the diffusion model's fields, given the start of its names."""
    levels = _unet_levels(shapes, prefix)
    channels = [level[0][0] for level in levels]
    depths = [level[0][1] for level in levels]
    if any(level != [level[0]] * len(levels[0]) for level in levels):
        raise shapes.unsupported("has levels whose layers are not alike")
    block = f"{prefix}.middle_block.1"
    context_width = shapes.of(f"{block}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    if context_width not in _HEADS:
        raise shapes.unsupported(f"has a context of width {context_width}")
    num_heads = [_HEADS[context_width](width) for width in channels]
    if any(not heads or width % heads for width, heads in zip(channels, num_heads)):
        raise shapes.unsupported(f"has channels {channels}")
    return {
        "in_channels": shapes.of(f"{prefix}.input_blocks.0.0.weight", 4)[1],
        "out_channels": shapes.of(f"{prefix}.out.2.weight", 4)[0],
        "channels": _grouped(shapes, channels),
        "layers_per_level": len(levels[0]),
        "depths": tuple(depths),
        "mid_depth": shapes.count(f"{block}.transformer_blocks.{{}}.norm1.weight"),
        "num_heads": tuple(num_heads),
        "context_width": context_width,
        "num_classes": None,
        "linear_projection": len(shapes.of(f"{block}.proj_in.weight", 2, 3, 4)) == 2,
        "num_groups": _NUM_GROUPS,
        "epsilon": 1e-5,
    }


def _unet_levels(shapes: Shapes, prefix: str) -> list[list[tuple[int, int]]]:
    """Return width and depth of each layer of each stage on the way down."""
    levels: list[list[tuple[int, int]]] = [[]]
    n = 1
    while True:
        block = f"{prefix}.input_blocks.{n}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        elif f"{block}.0.in_layers.2.weight" in shapes:
            width = shapes.of(f"{block}.0.in_layers.2.weight", 4)[0]
            depth = shapes.count(f"{block}.1.transformer_blocks.{{}}.norm1.weight")
            levels[-1].append((width, depth))
        else:
            break
        n += 1
    if not all(levels):
        raise shapes.unsupported("has a level without layers")
    return levels


def autoencoder(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Return the autoencoder's fields, given the start of its names; the scale is the usual one."""
    encoder = f"{prefix}.encoder"
    if any(name.startswith(f"{prefix}.quantize.") for name in shapes.shapes):
        raise shapes.unsupported("has an autoencoder with a codebook")
    if any(f"{encoder}.down.{i}.attn.0.q.weight" in shapes for i in range(8)):
        raise shapes.unsupported("has an autoencoder with attention on its levels")
    count = shapes.count(f"{encoder}.down.{{}}.block.0.conv1.weight")
    channels = [shapes.of(f"{encoder}.down.{i}.block.0.conv1.weight", 4)[0] for i in range(count)]
    if not channels:
        shapes.of(f"{encoder}.down.0.block.0.conv1.weight", 4)
    return {
        "image_channels": shapes.of(f"{encoder}.conv_in.weight", 4)[1],
        "latent_channels": shapes.of(f"{prefix}.decoder.conv_in.weight", 4)[1],
        "channels": _grouped(shapes, channels),
        "layers_per_level": shapes.count(f"{encoder}.down.0.block.{{}}.conv1.weight"),
        "num_groups": _NUM_GROUPS,
        "latent_scale": LATENT_SCALE,
        "latent_shift": 0.0,
        "mid_attention": f"{encoder}.mid.attn_1.q.weight" in shapes,
        "quant_conv": f"{prefix}.quant_conv.weight" in shapes,
        "post_quant_conv": f"{prefix}.post_quant_conv.weight" in shapes,
        "codebook_size": None,
    }


def is_open_clip(shapes: Shapes, prefix: str) -> bool:
    """Tell if a file's text encoder is OpenCLIP's, as in Stable Diffusion 2."""
    return f"{open_clip_prefix(prefix)}.token_embedding.weight" in shapes


def text_encoder(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Return the text encoder's fields, of CLIP or of OpenCLIP, given the start of its names."""
    if is_open_clip(shapes, prefix):
        place = open_clip_prefix(prefix)
        vocabulary_size, width = shapes.of(f"{place}.token_embedding.weight", 2)
        layer = f"{place}.transformer.resblocks"
        depth = min(shapes.count(f"{layer}.{{}}.ln_1.weight"), _OPEN_CLIP_DEPTH)
        max_length = shapes.of(f"{place}.positional_embedding", 2)[0]
        mlp_width = shapes.of(f"{layer}.0.mlp.c_fc.weight", 2)[0]
    else:
        place = f"{clip_prefix(prefix)}.text_model"
        vocabulary_size, width = shapes.of(f"{place}.embeddings.token_embedding.weight", 2)
        layer = f"{place}.encoder.layers"
        depth = shapes.count(f"{layer}.{{}}.layer_norm1.weight")
        max_length = shapes.of(f"{place}.embeddings.position_embedding.weight", 2)[0]
        mlp_width = shapes.of(f"{layer}.0.mlp.fc1.weight", 2)[0]
    if width % _TEXT_HEAD_WIDTH:
        raise shapes.unsupported(f"has a text encoder of width {width}")
    return {
        "vocabulary_size": vocabulary_size,
        "max_length": max_length,
        "width": width,
        "depth": depth,
        "num_heads": width // _TEXT_HEAD_WIDTH,
        "mlp_width": mlp_width,
        "activation": "gelu" if is_open_clip(shapes, prefix) else "quick_gelu",
        "epsilon": 1e-5,
        "projection_width": None,
        "end_id": vocabulary_size - 1,
    }


def _grouped(shapes: Shapes, channels: list[int]) -> tuple[int, ...]:
    if any(width % _NUM_GROUPS for width in channels):
        raise shapes.unsupported(f"has channels {channels}, no multiples of {_NUM_GROUPS}")
    return tuple(channels)
