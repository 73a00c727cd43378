"""The name tables: every tensor of every model under its kdiffusion, CompVis and diffusers name.

A table row names one layer in the three dialects and says what kind of layer it is and how wide:
`"conv3 inputs outputs"` is a 3×3 convolution whose sizes the generator fills in. Where the dialects
store a layer in different forms, both stand there, CompVis first: `"pointwise|dense width width"`.
The generators below walk the levels of a model and count; nothing is listed by hand, and no name
is ever made from another one by replacing text.

Sources: the module trees of CompVis/stable-diffusion (`openaimodel.py`, diffusionmodules/`model.py`),
mlfoundations/open_clip, huggingface/diffusers and huggingface/transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

DIALECTS = ("compvis", "diffusers")


class Stored(NamedTuple):
    """A tensor in a file: its name, and its layout (see `layouts`)."""

    name: str
    layout: str


class Row(NamedTuple):
    """One variable: its path and Keras shape in kdiffusion, and where each dialect stores it."""

    kdiffusion: str
    shape: tuple[int, ...]
    compvis: Stored
    diffusers: Stored


class _Place(NamedTuple):
    """A spot in the three module trees."""

    kdiffusion: str = ""
    compvis: str = ""
    diffusers: str = ""

    def at(self, kdiffusion: str, compvis: str, diffusers: str) -> _Place:
        return _Place(
            "/".join(filter(None, (self.kdiffusion, kdiffusion))),
            ".".join(filter(None, (self.compvis, compvis))),
            ".".join(filter(None, (self.diffusers, diffusers))),
        )


_VARIABLES = {  # kind of layer: its kdiffusion variables, the kernel first
    "norm": ("gamma", "beta"),
    "dense": ("kernel", "bias"),
    "kernel": ("kernel",),
    "pointwise": ("kernel", "bias"),
    "conv1": ("kernel", "bias"),
    "conv3": ("kernel", "bias"),
    "table": ("",),
}
_FORMS = {  # form in a file: the end of the tensor's name and its layout, for each variable
    "norm": ((".weight", "keep"), (".bias", "keep")),
    "dense": ((".weight", "dense"), (".bias", "keep")),
    "kernel": ((".weight", "dense"),),
    "pointwise": ((".weight", "pointwise"), (".bias", "keep")),
    "conv1": ((".weight", "conv"), (".bias", "keep")),
    "conv3": ((".weight", "conv"), (".bias", "keep")),
    "table": ((".weight", "keep"),),
    "bare": (("", "keep"),),  # a parameter without a module of its own
    "stack0": (("_weight", "dense[0]"), ("_bias", "keep[0]")),
    "stack1": (("_weight", "dense[1]"), ("_bias", "keep[1]")),
    "stack2": (("_weight", "dense[2]"), ("_bias", "keep[2]")),
}
_WINDOWS = {"conv1": (1, 1), "conv3": (3, 3)}

# ── the diffusion model ───────────────────────────────────────────────────────────────────────

DIFFUSION_MODEL = (  # kdiffusion, CompVis, diffusers, layer
    ("time_embedding/linear_1", "time_embed.0", "time_embedding.linear_1", "dense first time"),
    ("time_embedding/linear_2", "time_embed.2", "time_embedding.linear_2", "dense time time"),
    ("conv_in", "input_blocks.0.0", "conv_in", "conv3 inputs first"),
    ("norm_out", "out.0", "conv_norm_out", "norm first"),
    ("conv_out", "out.2", "conv_out", "conv3 first outputs"),
)
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
CONV = (("conv", "conv", "conv", "conv3 width width"),)
CONV_DOWN = (("conv", "op", "conv", "conv3 width width"),)

# ── the autoencoder ───────────────────────────────────────────────────────────────────────────

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
POST_QUANT_CONV = (("post_quant_conv", "post_quant_conv", "post_quant_conv", "conv1 latent latent"),)
IMAGE_RESNET = (
    ("norm1", "norm1", "norm1", "norm inputs"),
    ("conv1", "conv1", "conv1", "conv3 inputs outputs"),
    ("norm2", "norm2", "norm2", "norm outputs"),
    ("conv2", "conv2", "conv2", "conv3 outputs outputs"),
    ("shortcut", "nin_shortcut", "conv_shortcut", "conv1 inputs outputs"),
)
IMAGE_ATTENTION = (
    ("norm", "norm", "group_norm", "norm width"),
    ("query", "q", "to_q", "pointwise|dense width width"),
    ("key", "k", "to_k", "pointwise|dense width width"),
    ("value", "v", "to_v", "pointwise|dense width width"),
    ("out", "proj_out", "to_out.0", "pointwise|dense width width"),
)

# ── the text encoder (CompVis column: OpenCLIP's names) ───────────────────────────────────────

TEXT_ENCODER = (
    (
        "embedding/token_embedding",
        "token_embedding",
        "text_model.embeddings.token_embedding",
        "table vocabulary width",
    ),
    (
        "embedding/position_embedding",
        "positional_embedding",
        "text_model.embeddings.position_embedding",
        "bare|table length width",
    ),
    ("final_norm", "ln_final", "text_model.final_layer_norm", "norm width"),
)
TEXT_LAYER = (
    ("norm1", "ln_1", "layer_norm1", "norm width"),
    ("attention/query", "attn.in_proj", "self_attn.q_proj", "stack0|dense width width"),
    ("attention/key", "attn.in_proj", "self_attn.k_proj", "stack1|dense width width"),
    ("attention/value", "attn.in_proj", "self_attn.v_proj", "stack2|dense width width"),
    ("attention/out", "attn.out_proj", "self_attn.out_proj", "dense width width"),
    ("norm2", "ln_2", "layer_norm2", "norm width"),
    ("fc1", "mlp.c_fc", "mlp.fc1", "dense width hidden"),
    ("fc2", "mlp.c_proj", "mlp.fc2", "dense hidden width"),
)
# OpenCLIP multiplies by its projection from the right, so it is stored as Keras has it.
TEXT_PROJECTION = (
    ("projection", "text_projection", "text_projection", "bare|kernel width projection"),
)


def rows(kind: str, fields: Mapping[str, Any]) -> tuple[Row, ...]:
    """Returns the name table of a model.

    Args:
        kind: "text_encoder", "image_encoder", "image_decoder" or "diffusion_model".
        fields: the architecture, as `configs` gives it; "image_encoder" and "image_decoder" both
            take the autoencoder's. The text encoder's activation tells which family the CompVis
            names follow: "quick_gelu" is CLIP in transformers' names, "gelu" is OpenCLIP.

    Returns:
        One `Row` per variable. Every column is unique, an OpenCLIP stack counting as three.

    Raises:
        ValueError: the kind is unknown.

    Example:

    >>> rows("image_decoder", fields)[0].kdiffusion
    'conv_in/kernel'
    """
    if kind not in _GENERATORS:
        raise ValueError(f"Unknown kind of model {kind!r}. Known kinds: {', '.join(_GENERATORS)}.")
    return tuple(_GENERATORS[kind](fields))


def _layers(place: _Place, table, **sizes: int | str) -> Iterator[Row]:
    """Yields the rows of a table's layers; `sizes` gives the words of its last column a value."""
    for *names, layer in table:
        forms, *widths = (sizes.get(word, word) for word in layer.split())
        compvis, _, diffusers = forms.rpartition("|")
        yield from _layer(place.at(*names), compvis or diffusers, diffusers, widths)


def _layer(place: _Place, compvis: str, diffusers: str, widths: list[int]) -> Iterator[Row]:
    kernel_shape = (*_WINDOWS.get(diffusers, ()), *widths)
    files = zip(_FORMS[compvis], _FORMS[diffusers])
    for variable, (in_compvis, in_diffusers) in zip(_VARIABLES[diffusers], files):
        yield Row(
            "/".join(filter(None, (place.kdiffusion, variable))),
            kernel_shape if variable in ("kernel", "") else (widths[-1],),
            Stored(place.compvis + in_compvis[0], in_compvis[1]),
            Stored(place.diffusers + in_diffusers[0], in_diffusers[1]),
        )


def _resnet(place: _Place, table, inputs: int, outputs: int, **sizes: int) -> Iterator[Row]:
    table = table if inputs != outputs else table[:-1]  # the shortcut stands last
    return _layers(place, table, inputs=inputs, outputs=outputs, **sizes)


# ── generators ────────────────────────────────────────────────────────────────────────────────


def _diffusion_model(fields: Mapping[str, Any]) -> Iterator[Row]:
    root = _Place(compvis="model.diffusion_model")
    first = fields["channels"][0]
    yield from _layers(
        root,
        DIFFUSION_MODEL,
        first=first,
        time=4 * first,
        inputs=fields["in_channels"],
        outputs=fields["out_channels"],
    )
    yield from _down(root, fields)
    yield from _middle(root, fields)
    yield from _up(root, fields)


def _down(root: _Place, fields: Mapping[str, Any]) -> Iterator[Row]:
    levels = list(zip(fields["channels"], fields["depths"]))
    inputs, block = fields["channels"][0], 1
    for i, (width, depth) in enumerate(levels):
        for j in range(fields["layers_per_level"]):
            level = root.at(f"down_{i}", f"input_blocks.{block}", f"down_blocks.{i}")
            yield from _resnet_and_transformer(level, fields, j, (inputs, width), depth)
            inputs, block = width, block + 1
        if i < len(levels) - 1:
            place = root.at(
                f"down_{i}_downsample", f"input_blocks.{block}.0", f"down_blocks.{i}.downsamplers.0"
            )
            yield from _layers(place, CONV_DOWN, width=width)
            block += 1


def _middle(root: _Place, fields: Mapping[str, Any]) -> Iterator[Row]:
    width, time = fields["channels"][-1], 4 * fields["channels"][0]
    before = root.at("mid_resnet_0", "middle_block.0", "mid_block.resnets.0")
    between = root.at("mid_transformer", "middle_block.1", "mid_block.attentions.0")
    after = root.at("mid_resnet_1", "middle_block.2", "mid_block.resnets.1")
    yield from _resnet(before, RESNET, width, width, time=time)
    yield from _transformer(between, fields, width, fields["mid_depth"])
    yield from _resnet(after, RESNET, width, width, time=time)


def _up(root: _Place, fields: Mapping[str, Any]) -> Iterator[Row]:
    levels = list(zip(fields["channels"], fields["depths"]))[::-1]
    skips = _skip_widths(fields["channels"], fields["layers_per_level"])
    inputs, block = fields["channels"][-1], 0
    for i, (width, depth) in enumerate(levels):
        for j in range(fields["layers_per_level"] + 1):
            level = root.at(f"up_{i}", f"output_blocks.{block}", f"up_blocks.{i}")
            yield from _resnet_and_transformer(
                level, fields, j, (inputs + skips.pop(), width), depth
            )
            inputs, block = width, block + 1
        if i < len(levels) - 1:
            # CompVis numbers it behind the last resnet and, where there is one, its transformer.
            place = root.at(
                f"up_{i}_upsample",
                f"output_blocks.{block - 1}.{2 if depth else 1}",
                f"up_blocks.{i}.upsamplers.0",
            )
            yield from _layers(place, CONV, width=width)


def _skip_widths(channels, layers_per_level: int) -> list[int]:
    """Widths of what the way down hands to the way up, in the order they are made."""
    widths = [channels[0]]
    for width in channels:
        widths += [width] * (layers_per_level + 1)  # the resnets and the downsampled
    return widths[:-1]  # the last level is not downsampled


def _resnet_and_transformer(
    level: _Place, fields: Mapping[str, Any], j: int, widths: tuple[int, int], depth: int
) -> Iterator[Row]:
    inputs, width = widths
    resnet, transformer = (
        _Place(
            f"{level.kdiffusion}_{ours}_{j}",
            f"{level.compvis}.{place}",
            f"{level.diffusers}.{theirs}.{j}",
        )
        for place, (ours, theirs) in enumerate((("resnet", "resnets"), ("transformer", "attentions")))
    )
    yield from _resnet(resnet, RESNET, inputs, width, time=4 * fields["channels"][0])
    if depth:
        yield from _transformer(transformer, fields, width, depth)


def _transformer(
    place: _Place, fields: Mapping[str, Any], width: int, depth: int
) -> Iterator[Row]:
    projection = "dense" if fields["linear_projection"] else "pointwise"
    yield from _layers(place, TRANSFORMER, width=width, projection=projection)
    for d in range(depth):
        yield from _layers(
            place.at(f"block_{d}", f"transformer_blocks.{d}", f"transformer_blocks.{d}"),
            TRANSFORMER_BLOCK,
            width=width,
            context=fields["context_width"],
            gated=8 * width,  # values and gates of the 4·width hidden units
            hidden=4 * width,
        )


def _autoencoder_sizes(fields: Mapping[str, Any]) -> dict[str, int]:
    return {
        "image": fields["image_channels"],
        "latent": fields["latent_channels"],
        "moments": 2 * fields["latent_channels"],  # mean and logvar
        "first": fields["channels"][0],
        "last": fields["channels"][-1],
    }


def _image_encoder(fields: Mapping[str, Any]) -> Iterator[Row]:
    root = _Place(compvis="first_stage_model")
    sizes = _autoencoder_sizes(fields)
    yield from _layers(root, ENCODER, **sizes)
    inputs, last = sizes["first"], len(fields["channels"]) - 1
    for i, width in enumerate(fields["channels"]):
        level = root.at(f"down_{i}", f"encoder.down.{i}", f"encoder.down_blocks.{i}")
        for j in range(fields["layers_per_level"]):
            place = _image_resnet(level, j)
            yield from _resnet(place, IMAGE_RESNET, inputs, width)
            inputs = width
        if i < last:
            yield from _layers(_resampler(level, "downsample"), CONV, width=width)
    yield from _image_middle(root, "encoder", fields)
    if fields["quant_conv"]:
        yield from _layers(root, QUANT_CONV, **sizes)


def _image_decoder(fields: Mapping[str, Any]) -> Iterator[Row]:
    root = _Place(compvis="first_stage_model")
    sizes = _autoencoder_sizes(fields)
    yield from _layers(root, DECODER, **sizes)
    yield from _image_middle(root, "decoder", fields)
    inputs, last = sizes["last"], len(fields["channels"]) - 1
    for i, width in enumerate(fields["channels"][::-1]):
        # CompVis numbers the levels by resolution, diffusers by the order of computing.
        level = root.at(f"up_{i}", f"decoder.up.{last - i}", f"decoder.up_blocks.{i}")
        for j in range(fields["layers_per_level"] + 1):
            yield from _resnet(_image_resnet(level, j), IMAGE_RESNET, inputs, width)
            inputs = width
        if i < last:
            yield from _layers(_resampler(level, "upsample"), CONV, width=width)
    if fields["post_quant_conv"]:
        yield from _layers(root, POST_QUANT_CONV, **sizes)


def _image_resnet(level: _Place, j: int) -> _Place:
    return _Place(
        f"{level.kdiffusion}_resnet_{j}", f"{level.compvis}.block.{j}", f"{level.diffusers}.resnets.{j}"
    )


def _resampler(level: _Place, direction: str) -> _Place:
    return _Place(
        f"{level.kdiffusion}_{direction}",
        f"{level.compvis}.{direction}",
        f"{level.diffusers}.{direction}rs.0",
    )


def _image_middle(root: _Place, side: str, fields: Mapping[str, Any]) -> Iterator[Row]:
    width = fields["channels"][-1]
    for j in range(2):
        place = root.at(f"mid_resnet_{j}", f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}")
        yield from _resnet(place, IMAGE_RESNET, width, width)
    if fields["mid_attention"]:
        place = root.at("mid_attention", f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
        yield from _layers(place, IMAGE_ATTENTION, width=width)


def _text_encoder(fields: Mapping[str, Any]) -> Iterator[Row]:
    for row in _open_clip(fields):
        if fields["activation"] == "quick_gelu":  # CLIP, which CompVis took from transformers
            name, layout = row.diffusers
            row = row._replace(compvis=Stored(f"cond_stage_model.transformer.{name}", layout))
        yield row


def _open_clip(fields: Mapping[str, Any]) -> Iterator[Row]:
    root = _Place(compvis="cond_stage_model.model")
    width = fields["width"]
    yield from _layers(
        root,
        TEXT_ENCODER,
        vocabulary=fields["vocabulary_size"],
        length=fields["max_length"],
        width=width,
    )
    for n in range(fields["depth"]):
        layer = root.at(f"layer_{n}", f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}")
        yield from _layers(layer, TEXT_LAYER, width=width, hidden=fields["mlp_width"])
    if fields["projection_width"]:
        yield from _layers(root, TEXT_PROJECTION, width=width, projection=fields["projection_width"])


_GENERATORS = {
    "text_encoder": _text_encoder,
    "image_encoder": _image_encoder,
    "image_decoder": _image_decoder,
    "diffusion_model": _diffusion_model,
}
