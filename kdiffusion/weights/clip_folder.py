"""A whole CLIP in a folder that transformers, diffusers and kdiffusion read.

The folder holds `text_encoder/` and `image_encoder/`, parts as of a pipeline in diffusers' layout
(CLIPTextModelWithProjection and CLIPVisionModelWithProjection), and an index over both, by which
transformers loads the folder itself as a CLIPModel. No weight is stored twice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from kdiffusion.models.architectures import (
    ImageTowerArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.records import fields
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights.save import network
from kdiffusion.weights.variables import assign
from weights_conversion import (
    FAMILIES,
    Checkpoint,
    CheckpointMismatch,
    DiffusersFolder,
    InMemory,
    clip_config,
    clip_fields,
    convert,
    in_memory,
    merge,
    open_safetensors,
    preprocessor_config,
    read,
    read_json,
    rows,
    write_json,
    write_safetensors,
)

_LOGIT_SCALE = "logit_scale"


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
    records = [fields(model.architecture) for model in (text_encoder, image_tower)]
    config = clip_config(*records)

    def write_extras(folder: Path) -> None:
        _write_index(folder, logit_scale)
        write_json(folder / "config.json", config)
        write_json(folder / "preprocessor_config.json", preprocessor_config(records[1]))

    model = InMemory(
        {"text_encoder": network(text_encoder), "image_tower": network(image_tower)},
        tokenizers={} if tokenizer is None else {"text_encoder": tokenizer.save},
        extras=write_extras,
    )
    convert(model, path, dtype=dtype)


def _write_index(folder: Path, logit_scale: float) -> None:
    """Write the index over both parts, and the tensor that belongs to neither."""
    scale = in_memory({_LOGIT_SCALE: np.array(logit_scale, np.float32)})
    write_safetensors(folder / f"{_LOGIT_SCALE}.safetensors", scale)
    places = {_LOGIT_SCALE: f"{_LOGIT_SCALE}.safetensors"}
    size = scale.nbytes
    for part in FAMILIES["clip"].folders:
        content = DiffusersFolder(folder).weights(part)
        places |= dict.fromkeys(content, f"{part}/{content.path.name}")
        size += content.nbytes
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


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
    path = Path(path)
    text, image = architectures(path)
    checkpoint = _open(path)
    if _LOGIT_SCALE not in checkpoint:
        raise CheckpointMismatch(f"{path} has no tensor {_LOGIT_SCALE!r}. Is the folder complete?")
    text_rows = rows("text_encoder", fields(text))
    image_rows = rows("image_tower", fields(image))
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
    path = Path(path)
    preprocessor = path / "preprocessor_config.json"
    text, image = clip_fields(
        read_json(path / "config.json"),
        read_json(preprocessor) if preprocessor.exists() else None,
    )
    return TextEncoderArchitecture(**text), ImageTowerArchitecture(**image)


def _open(path: Path) -> Checkpoint:
    """Return the tensors of both parts and of what belongs to neither."""
    folder = DiffusersFolder(path)
    if not (path / "text_encoder").is_dir():
        return folder.weights("")
    parts = [folder.weights(part) for part in FAMILIES["clip"].folders]
    return merge([*parts, open_safetensors(path / f"{_LOGIT_SCALE}.safetensors")])


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
