"""A whole CLIP in a folder that transformers, diffusers and kdiffusion read.

The folder holds `text_encoder/` and `image_encoder/`, parts as of a pipeline in diffusers' layout
(CLIPTextModelWithProjection and CLIPVisionModelWithProjection), and an index over both, by which
transformers loads the folder itself as a CLIPModel. No weight is stored twice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kdiffusion.models.architectures import (
    ImageTowerArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.records import fields
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights.variables import arrays_of, assign

_LOGIT_SCALE = "logit_scale"
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def save(
    path: str | os.PathLike,
    text_encoder: TextEncoder,
    image_tower: ImageTower,
    logit_scale: float,
    tokenizer: SimpleTokenizer | None = None,
    dtype: str = "float32",
) -> None:
    """Write a CLIP, whole or not at all.

    Args:
        path: path of a folder that does not exist, or is empty.
        text_encoder: `TextEncoder` with a projection.
        image_tower: `ImageTower` with one of the same width.
        logit_scale: float, logarithm of the inverse temperature.
        tokenizer: `SimpleTokenizer`, written to `tokenizer/`, or `None`.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.

    Raises:
        ValueError: If the folder is not empty, the widths differ, or a weight is not finite in
            this dtype.
    """
    from weights_conversion import configs
    from weights_conversion.models import folder

    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}. Received: dtype={dtype!r}")
    records = [fields(model.architecture) for model in (text_encoder, image_tower)]
    config = configs.clip_config(*records)
    tensors = {
        "text_encoder": _tensors("text_encoder", text_encoder, _DTYPES[dtype]),
        "image_encoder": _tensors("image_tower", image_tower, _DTYPES[dtype]),
    }
    with folder.staged(path) as stage:
        for part, key in {"text_encoder": "text_config", "image_encoder": "vision_config"}.items():
            folder.write_component(stage, part, config[key], tensors[part])
        _write_index(stage, tensors, logit_scale)
        folder.write_json(stage / "config.json", config)
        folder.write_json(
            stage / "preprocessor_config.json", configs.preprocessor_config(records[1])
        )
        if tokenizer is not None:
            tokenizer.save(stage / "tokenizer")


def _tensors(kind: str, model: ArchitectureModel, dtype: np.dtype):
    """A model's tensors in transformers' names, each cast and checked when it is written."""
    from weights_conversion import names, translate
    from weights_conversion.files import checkpoint
    from weights_conversion.names import mapping

    rows = names.rows(kind, fields(model.architecture))
    written = checkpoint.in_memory(mapping.write(rows, arrays_of(model), "diffusers"))
    return translate(rows, written, "diffusers", "diffusers", dtype=dtype)


def _write_index(stage: Path, tensors: dict[str, Any], logit_scale: float) -> None:
    from weights_conversion.files import checkpoint, safetensors_writer
    from weights_conversion.models import folder

    scale = checkpoint.in_memory({_LOGIT_SCALE: np.array(logit_scale, np.float32)})
    safetensors_writer.write_safetensors(stage / f"{_LOGIT_SCALE}.safetensors", scale)
    places = {_LOGIT_SCALE: f"{_LOGIT_SCALE}.safetensors"}
    for part, content in tensors.items():
        places |= dict.fromkeys(content, f"{part}/model.safetensors")
    size = scale.nbytes + sum(content.nbytes for content in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    folder.write_json(stage / "model.safetensors.index.json", index)


def load(
    path: str | os.PathLike, dtype: Any = None
) -> tuple[TextEncoder, ImageTower, float, SimpleTokenizer | None]:
    """Read a CLIP: what `save` has written, or a folder of transformers' CLIPModel.

    Args:
        path: path of the folder.
        dtype: Keras dtype policy of both networks, or `None` for the global one.

    Returns:
        Text encoder, image tower, the logarithm of the inverse temperature, and the tokenizer if
        the folder has one.

    Raises:
        ValueError: If the folder holds no CLIP that is known here.
    """
    from weights_conversion import CheckpointMismatch, names, read

    path = Path(path)
    text, image = architectures(path)
    checkpoint = _open(path)
    if _LOGIT_SCALE not in checkpoint:
        raise CheckpointMismatch(f"{path} has no tensor {_LOGIT_SCALE!r}. Is the folder complete?")
    text_rows = names.rows("text_encoder", fields(text))
    image_rows = names.rows("image_tower", fields(image))
    text_encoder = TextEncoder(text, initialize=False, dtype=dtype, name="text_encoder")
    assign(text_encoder, read(text_rows, checkpoint, "diffusers", beside=image_rows))
    image_tower = ImageTower(image, initialize=False, dtype=dtype, name="image_tower")
    assign(image_tower, read(image_rows, checkpoint, "diffusers", beside=text_rows))
    return text_encoder, image_tower, float(checkpoint[_LOGIT_SCALE]), tokenizer_of(path)


def architectures(
    path: str | os.PathLike,
) -> tuple[TextEncoderArchitecture, ImageTowerArchitecture]:
    """Read the architectures of a CLIP's two networks; its weights stay unread.

    Args:
        path: path of the folder, see `load`.

    Raises:
        ValueError: If the folder holds no CLIP that is known here.
    """
    from weights_conversion import configs
    from weights_conversion.models import folder

    path = Path(path)
    preprocessor = path / "preprocessor_config.json"
    text, image = configs.clip_fields(
        folder.read_json(path / "config.json"),
        folder.read_json(preprocessor) if preprocessor.exists() else None,
    )
    return TextEncoderArchitecture(**text), ImageTowerArchitecture(**image)


def _open(path: Path):
    from weights_conversion import DiffusersFolder, open_safetensors
    from weights_conversion.names import translation

    folder = DiffusersFolder(path)
    if not (path / "text_encoder").is_dir():
        return folder.weights("")
    parts = [folder.weights(part) for part in ("text_encoder", "image_encoder")]
    return translation.merge([*parts, open_safetensors(path / f"{_LOGIT_SCALE}.safetensors")])


def tokenizer_of(path: str | os.PathLike) -> SimpleTokenizer | None:
    """Read the tokenizer of a CLIP's folder; return `None` if the folder has none.

    Args:
        path: path of the folder, see `load`.
    """
    path = Path(path)
    for folder in (path / "tokenizer", path):
        if (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file():
            return SimpleTokenizer.from_folder(folder)
    return None
