"""The names of CLIP's image tower: transformers' and OpenAI's, which OpenCLIP has kept.

Sources: `modeling_clip.py` of huggingface/transformers (whose spelling is `pre_layrnorm`),
`model.py` of openai/CLIP, `transformer.py` of mlfoundations/open_clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weights_conversion.names.table import Place, Row, layers
from weights_conversion.names.text_encoder import TEXT_LAYER

PREFIX = "visual"  # in the files of OpenAI and OpenCLIP

IMAGE_TOWER = (
    (
        "embedding/class_embedding",
        "class_embedding",
        "vision_model.embeddings.class_embedding",
        "bare width",
    ),
    (
        "embedding/patches",
        "conv1",
        "vision_model.embeddings.patch_embedding",
        "patches patch patch channels width",
    ),
    (
        "embedding/position_embedding",
        "positional_embedding",
        "vision_model.embeddings.position_embedding",
        "bare|table tokens width",
    ),
    ("pre_norm", "ln_pre", "vision_model.pre_layrnorm", "norm width"),
    ("post_norm", "ln_post", "vision_model.post_layernorm", "norm width"),
    # OpenAI multiplies by its projection from the right, so it is stored as Keras has it.
    ("projection", "proj", "visual_projection", "bare|kernel width projection"),
)


def image_tower(fields: Mapping[str, Any], prefix: str = PREFIX) -> Iterator[Row]:
    """Yield the rows of CLIP's image tower."""
    root = Place(compvis=prefix)
    sizes = {
        "width": fields["width"],
        "patch": fields["patch_size"],
        "channels": fields["image_channels"],
        "tokens": (fields["image_size"] // fields["patch_size"]) ** 2 + 1,
        "hidden": fields["mlp_width"],
        "projection": fields["projection_width"],
    }
    yield from layers(root, IMAGE_TOWER, **sizes)
    for n in range(fields["depth"]):
        place = root.at(
            f"layer_{n}", f"transformer.resblocks.{n}", f"vision_model.encoder.layers.{n}"
        )
        yield from layers(place, TEXT_LAYER, **sizes)
