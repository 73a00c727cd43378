"""The names of the text encoder: CLIP in transformers' names, or OpenCLIP in its own.

Sources: `modeling_clip.py` of huggingface/transformers, `transformer.py` of
mlfoundations/open_clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weights_conversion.names.table import Place, Row, Stored, layers

PREFIX = "cond_stage_model"  # in single files of Stable Diffusion

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


def text_encoder(fields: Mapping[str, Any], prefix: str = PREFIX) -> Iterator[Row]:
    """Yield the rows of CLIP's text encoder, or of OpenCLIP's if it has the exact GELU."""
    for row in _open_clip(fields, open_clip_prefix(prefix)):
        if fields["activation"] == "quick_gelu":  # CLIP, which CompVis took from transformers
            name, layout = row.diffusers
            row = row._replace(compvis=Stored(f"{clip_prefix(prefix)}.{name}", layout))
        yield row


def clip_prefix(prefix: str) -> str:
    """Return the start of the names of a CLIP from transformers in a single file's part."""
    return f"{prefix}.transformer"


def open_clip_prefix(prefix: str) -> str:
    """Return the start of the names of an OpenCLIP in a single file's part."""
    return f"{prefix}.model"


def unused(fields: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    """Return the beginnings of names of layers behind the text states that are used."""
    layer = f"{open_clip_prefix(prefix)}.transformer.resblocks.{fields['depth']}."
    if fields["projection_width"] is not None:
        return (layer,)
    return (
        layer,
        f"{clip_prefix(prefix)}.text_projection",
        f"{open_clip_prefix(prefix)}.text_projection",
    )


def _open_clip(fields: Mapping[str, Any], prefix: str) -> Iterator[Row]:
    root = Place(compvis=prefix)
    sizes = {
        "vocabulary": fields["vocabulary_size"],
        "length": fields["max_length"],
        "width": fields["width"],
        "hidden": fields["mlp_width"],
        "projection": fields["projection_width"],
    }
    yield from layers(root, TEXT_ENCODER, **sizes)
    for n in range(fields["depth"]):
        place = root.at(
            f"layer_{n}", f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}"
        )
        yield from layers(place, TEXT_LAYER, **sizes)
    if fields["projection_width"] is not None:
        yield from layers(root, TEXT_PROJECTION, **sizes)
