"""The names of the autoencoder's two models, the image encoder and the image decoder.

Sources: `diffusionmodules/model.py` of CompVis/stable-diffusion, `autoencoder_kl.py`,
`vq_model.py` and `vae.py` of huggingface/diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weights_conversion.names.table import Place, Row, layers, resnet

PREFIX = "first_stage_model"  # in single files of Stable Diffusion

ENCODER = (
    ("conv_in", "encoder.conv_in", "encoder.conv_in", "conv3 image first"),
    ("norm_out", "encoder.norm_out", "encoder.conv_norm_out", "norm last"),
    ("conv_out", "encoder.conv_out", "encoder.conv_out", "conv3 last moments"),
)
QUANT_CONV = (("quant_conv", "quant_conv", "quant_conv", "conv1 moments moments"),)
DECODER = (
    ("conv_in", "decoder.conv_in", "decoder.conv_in", "conv3 latent last"),
    ("norm_out", "decoder.norm_out", "decoder.conv_norm_out", "norm first"),
    ("conv_out", "decoder.conv_out", "decoder.conv_out", "conv3 first image"),
)
CODEBOOK = (
    (
        "codebook/embedding",
        "quantize.embedding",
        "quantize.embedding",
        "table codebook latent",
    ),
)
POST_QUANT_CONV = (
    ("post_quant_conv", "post_quant_conv", "post_quant_conv", "conv1 latent latent"),
)
RESNET = (
    ("norm1", "norm1", "norm1", "norm inputs"),
    ("conv1", "conv1", "conv1", "conv3 inputs outputs"),
    ("norm2", "norm2", "norm2", "norm outputs"),
    ("conv2", "conv2", "conv2", "conv3 outputs outputs"),
    ("shortcut", "nin_shortcut", "conv_shortcut", "conv1 inputs outputs"),
)
ATTENTION = (
    ("norm", "norm", "group_norm", "norm width"),
    ("query", "q", "to_q", "pointwise|dense width width"),
    ("key", "k", "to_k", "pointwise|dense width width"),
    ("value", "v", "to_v", "pointwise|dense width width"),
    ("out", "proj_out", "to_out.0", "pointwise|dense width width"),
)
RESAMPLE = (("conv", "conv", "conv", "conv3 width width"),)


def image_encoder(fields: Mapping[str, Any], prefix: str = PREFIX) -> Iterator[Row]:
    """Yield the rows of the autoencoder's encoder half."""
    root = Place(compvis=prefix)
    sizes = _sizes(fields)
    inputs = sizes["first"]
    yield from layers(root, ENCODER, **sizes)
    for i, width in enumerate(fields["channels"]):
        down, compvis, theirs = f"down_{i}", f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        for j in range(fields["layers_per_level"]):
            place = root.at(f"{down}_resnet_{j}", f"{compvis}.block.{j}", f"{theirs}.resnets.{j}")
            yield from resnet(place, RESNET, inputs, width)
            inputs = width
        if i < len(fields["channels"]) - 1:
            place = root.at(
                f"{down}_downsample", f"{compvis}.downsample", f"{theirs}.downsamplers.0"
            )
            yield from layers(place, RESAMPLE, width=width)
    yield from _middle(root, "encoder", fields)
    if fields["quant_conv"]:
        yield from layers(root, QUANT_CONV, **sizes)


def image_decoder(fields: Mapping[str, Any], prefix: str = PREFIX) -> Iterator[Row]:
    """Yield the rows of the autoencoder's decoder half."""
    root = Place(compvis=prefix)
    sizes = _sizes(fields)
    inputs = sizes["last"]
    last = len(fields["channels"]) - 1
    yield from layers(root, DECODER, **sizes)
    yield from _middle(root, "decoder", fields)
    for i, width in enumerate(fields["channels"][::-1]):
        # CompVis counts the levels from the finest, diffusers in the order of computing.
        up, compvis, theirs = f"up_{i}", f"decoder.up.{last - i}", f"decoder.up_blocks.{i}"
        for j in range(fields["layers_per_level"] + 1):
            place = root.at(f"{up}_resnet_{j}", f"{compvis}.block.{j}", f"{theirs}.resnets.{j}")
            yield from resnet(place, RESNET, inputs, width)
            inputs = width
        if i < last:
            place = root.at(f"{up}_upsample", f"{compvis}.upsample", f"{theirs}.upsamplers.0")
            yield from layers(place, RESAMPLE, width=width)
    if fields["codebook_size"] is not None:
        yield from layers(root, CODEBOOK, **sizes)
    if fields["post_quant_conv"]:
        yield from layers(root, POST_QUANT_CONV, **sizes)


def _middle(root: Place, side: str, fields: Mapping[str, Any]) -> Iterator[Row]:
    width = fields["channels"][-1]
    compvis, theirs = f"{side}.mid", f"{side}.mid_block"
    for j in range(2):
        place = root.at(f"mid_resnet_{j}", f"{compvis}.block_{j + 1}", f"{theirs}.resnets.{j}")
        yield from resnet(place, RESNET, width, width)
    if fields["mid_attention"]:
        place = root.at("mid_attention", f"{compvis}.attn_1", f"{theirs}.attentions.0")
        yield from layers(place, ATTENTION, width=width)


def _sizes(fields: Mapping[str, Any]) -> dict[str, Any]:
    codebook, latent = fields["codebook_size"], fields["latent_channels"]
    return {
        "image": fields["image_channels"],
        "latent": latent,
        "moments": 2 * latent if codebook is None else latent,  # mean and logvar, or the code
        "codebook": codebook,
        "first": fields["channels"][0],
        "last": fields["channels"][-1],
    }
