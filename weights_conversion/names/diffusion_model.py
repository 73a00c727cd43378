"""The names of the diffusion model, a U-Net.

Sources: `openaimodel.py` and `attention.py` of CompVis/stable-diffusion, `unet_2d_condition.py` and
`unet_2d_blocks.py` of huggingface/diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weights_conversion.names.table import Place, Row, layers, resnet

PREFIX = "model.diffusion_model"  # in single files of Stable Diffusion

DIFFUSION_MODEL = (  # kdiffusion, CompVis, diffusers, layer
    ("time_embedding/linear_1", "time_embed.0", "time_embedding.linear_1", "dense first time"),
    ("time_embedding/linear_2", "time_embed.2", "time_embedding.linear_2", "dense time time"),
    ("conv_in", "input_blocks.0.0", "conv_in", "conv3 inputs first"),
    ("norm_out", "out.0", "conv_norm_out", "norm first"),
    ("conv_out", "out.2", "conv_out", "conv3 first outputs"),
)
LABEL_EMBEDDING = (("label_embedding/table", "label_emb", "class_embedding", "table labels time"),)
RESNET = (
    ("norm1", "in_layers.0", "norm1", "norm inputs"),
    ("conv1", "in_layers.2", "conv1", "conv3 inputs outputs"),
    ("time_proj", "emb_layers.1", "time_emb_proj", "dense time outputs"),
    ("norm2", "out_layers.0", "norm2", "norm outputs"),
    ("conv2", "out_layers.3", "conv2", "conv3 outputs outputs"),
    ("shortcut", "skip_connection", "conv_shortcut", "conv1 inputs outputs"),
)
TRANSFORMER = (
    ("norm", "norm", "norm", "norm width"),
    ("proj_in", "proj_in", "proj_in", "projection width width"),
    ("proj_out", "proj_out", "proj_out", "projection width width"),
)
TRANSFORMER_BLOCK = (
    ("norm1", "norm1", "norm1", "norm width"),
    ("attn1/query", "attn1.to_q", "attn1.to_q", "kernel width width"),
    ("attn1/key", "attn1.to_k", "attn1.to_k", "kernel width width"),
    ("attn1/value", "attn1.to_v", "attn1.to_v", "kernel width width"),
    ("attn1/out", "attn1.to_out.0", "attn1.to_out.0", "dense width width"),
    ("norm2", "norm2", "norm2", "norm width"),
    ("attn2/query", "attn2.to_q", "attn2.to_q", "kernel width width"),
    ("attn2/key", "attn2.to_k", "attn2.to_k", "kernel context width"),
    ("attn2/value", "attn2.to_v", "attn2.to_v", "kernel context width"),
    ("attn2/out", "attn2.to_out.0", "attn2.to_out.0", "dense width width"),
    ("norm3", "norm3", "norm3", "norm width"),
    ("ff/proj", "ff.net.0.proj", "ff.net.0.proj", "dense width gated"),
    ("ff/out", "ff.net.2", "ff.net.2", "dense hidden width"),
)
DOWNSAMPLE = (("conv", "op", "conv", "conv3 width width"),)
UPSAMPLE = (("conv", "conv", "conv", "conv3 width width"),)


def diffusion_model(fields: Mapping[str, Any], prefix: str = PREFIX) -> Iterator[Row]:
    """Yield the rows of the U-Net."""
    root = Place(compvis=prefix)
    first = fields["channels"][0]
    sizes = {"inputs": fields["in_channels"], "outputs": fields["out_channels"]}
    yield from layers(root, DIFFUSION_MODEL, first=first, time=4 * first, **sizes)
    if fields["num_classes"] is not None:
        labels = fields["num_classes"] + 1  # the last one stands for no class
        yield from layers(root, LABEL_EMBEDDING, labels=labels, time=4 * first)
    yield from _down(root, fields)
    yield from _middle(root, fields)
    yield from _up(root, fields)


def _down(root: Place, fields: Mapping[str, Any]) -> Iterator[Row]:
    inputs = fields["channels"][0]
    n = 1  # CompVis counts on through the levels; 0 is conv_in
    for i, (width, depth) in enumerate(zip(fields["channels"], fields["depths"])):
        down, theirs = f"down_{i}", f"down_blocks.{i}"
        for j in range(fields["layers_per_level"]):
            place = root.at(f"{down}_resnet_{j}", f"input_blocks.{n}.0", f"{theirs}.resnets.{j}")
            yield from _resnet(place, fields, inputs, width)
            place = root.at(
                f"{down}_transformer_{j}", f"input_blocks.{n}.1", f"{theirs}.attentions.{j}"
            )
            yield from _transformer(place, fields, width, depth)
            inputs, n = width, n + 1
        if i < len(fields["channels"]) - 1:
            place = root.at(f"{down}_downsample", f"input_blocks.{n}.0", f"{theirs}.downsamplers.0")
            yield from layers(place, DOWNSAMPLE, width=width)
            n += 1


def _middle(root: Place, fields: Mapping[str, Any]) -> Iterator[Row]:
    width = fields["channels"][-1]
    place = root.at("mid_resnet_0", "middle_block.0", "mid_block.resnets.0")
    yield from _resnet(place, fields, width, width)
    place = root.at("mid_transformer", "middle_block.1", "mid_block.attentions.0")
    yield from _transformer(place, fields, width, fields["mid_depth"])
    place = root.at("mid_resnet_1", "middle_block.2", "mid_block.resnets.1")
    yield from _resnet(place, fields, width, width)


def _up(root: Place, fields: Mapping[str, Any]) -> Iterator[Row]:
    skips = _skip_widths(fields)
    inputs = fields["channels"][-1]
    n = 0
    for i, (width, depth) in enumerate(zip(fields["channels"][::-1], fields["depths"][::-1])):
        up, theirs = f"up_{i}", f"up_blocks.{i}"
        for j in range(fields["layers_per_level"] + 1):
            place = root.at(f"{up}_resnet_{j}", f"output_blocks.{n}.0", f"{theirs}.resnets.{j}")
            yield from _resnet(place, fields, inputs + skips.pop(), width)
            place = root.at(
                f"{up}_transformer_{j}", f"output_blocks.{n}.1", f"{theirs}.attentions.{j}"
            )
            yield from _transformer(place, fields, width, depth)
            inputs, n = width, n + 1
        if i < len(fields["channels"]) - 1:
            # In CompVis it follows the level's last resnet and, where there is one, transformer.
            position = 2 if depth else 1
            place = root.at(
                f"{up}_upsample", f"output_blocks.{n - 1}.{position}", f"{theirs}.upsamplers.0"
            )
            yield from layers(place, UPSAMPLE, width=width)


def _skip_widths(fields: Mapping[str, Any]) -> list[int]:
    """Return the widths of the skips, in the order in which the way down makes them."""
    widths = [fields["channels"][0]]
    for width in fields["channels"]:
        widths += [width] * (fields["layers_per_level"] + 1)  # of the resnets and the downsampling
    return widths[:-1]  # the last level is not downsampled


def _resnet(place: Place, fields: Mapping[str, Any], inputs: int, outputs: int) -> Iterator[Row]:
    return resnet(place, RESNET, inputs, outputs, time=4 * fields["channels"][0])


def _transformer(place: Place, fields: Mapping[str, Any], width: int, depth: int) -> Iterator[Row]:
    if depth == 0:
        return
    projection = "dense" if fields["linear_projection"] else "pointwise"
    yield from layers(place, TRANSFORMER, width=width, projection=projection)
    for d in range(depth):
        block = f"transformer_blocks.{d}"
        yield from layers(
            place.at(f"block_{d}", block, block),
            TRANSFORMER_BLOCK,
            width=width,
            context=fields["context_width"] or width,  # without a text, to its own tokens
            gated=8 * width,  # values and gates of 4·width hidden units
            hidden=4 * width,
        )
