"""Conversion of whole models: a single file or a folder in, a single file or a folder out.

One tensor is in memory at a time; nothing appears under the new name before all of it is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weights_conversion import configs
from weights_conversion.files.checkpoint import Checkpoint, in_memory
from weights_conversion.files.errors import CheckpointMismatch
from weights_conversion.files.safetensors_reader import DTYPES
from weights_conversion.files.safetensors_writer import Progress, write_safetensors
from weights_conversion.files.staging import (
    check_space,
    removed_if_killed,
    staged,
    staged_file,
)
from weights_conversion.models import folder, from_shapes
from weights_conversion.models.components import COMPONENTS
from weights_conversion.models.folder import DiffusersFolder
from weights_conversion.models.folder_files import terms
from weights_conversion.models.folder_model import FolderModel
from weights_conversion.models.single_file import SingleFile, open_single_file
from weights_conversion.names.translation import merge, translate

Model = SingleFile | FolderModel
# Makes the folder of a single file's tokenizer, and tells whether it could.
WriteTokenizer = Callable[[Path, SingleFile], bool]

FLOATS = {dtype.name: dtype for name, dtype in DTYPES.items() if name in ("F32", "F16", "BF16")}
_PIPELINES = {8: "StableDiffusionInstructPix2PixPipeline", 9: "StableDiffusionInpaintPipeline"}
_LATENT_SCALE = 0.18215
_SCHEDULE = {  # what every reader of a single file assumes
    "num_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
}


class Report(NamedTuple):
    """What a conversion did.

    Attributes:
        path: the new file or folder.
        nbytes: bytes of the tensors in it.
        dropped: what the source held and the result does not, in words or by name.
    """

    path: Path
    nbytes: int
    dropped: list[str]


def open_model(path: str | os.PathLike, *, variant: str | None = None, **settings: Any) -> Model:
    """Opens a folder in diffusers' layout, or a single file.

    Args:
        path: the folder or the file.
        variant: of a folder's weights, such as "fp16".
        **settings: of a single file, as in `open_single_file`.

    Raises:
        CheckpointError: it is neither, or cannot be used.
    """
    if Path(path).is_dir():
        return FolderModel(path, variant)
    return open_single_file(path, **settings)


def convert(
    source: Model,
    destination: str | os.PathLike,
    *,
    dtype: str | None = None,
    tokenizer: str | os.PathLike | WriteTokenizer | None = None,
    max_shard_bytes: int = folder.MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Writes a model as a single file in CompVis names, or as a folder in diffusers' layout.

    Args:
        source: the model, from `open_model`.
        destination: the new path, which must not exist: with the suffix .safetensors a single
            file, without a suffix a folder.
        dtype: "float32", "float16" or "bfloat16"; None for that of each tensor.
        tokenizer: for a folder, a folder with the tokenizer's files, which single files have not;
            or a function that writes them for a single file.
        max_shard_bytes: for a folder, the size above which weights are split.
        progress: is told again and again how many bytes are written, and of how many.

    Returns:
        A `Report` that lists everything that was dropped.

    Raises:
        CheckpointError: the source is incomplete, or the destination exists or is too small.

    Example:

    >>> convert(open_model("v1-5-pruned.ckpt"), "stable-diffusion-v1-5", dtype="float16").dropped
    ['alphas_cumprod', ...]
    """
    path = Path(destination).absolute()
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}. Received: {dtype!r}")
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise CheckpointMismatch(
            f"{path} would be a pickle, which is not written here. Name it .safetensors."
        )
    target = None if dtype is None else FLOATS[dtype]
    if path.suffix == ".safetensors":
        return _write_single_file(source, path, target, progress)
    return _write_folder(source, path, target, (tokenizer, max_shard_bytes, progress))


def component(
    source: Model, kinds: Iterable[str], dialect: str, dtype: np.dtype | None = None
) -> Checkpoint:
    """Returns the tensors of some kinds of models in a dialect, translated when they are read."""
    return merge(
        translate(
            source.rows(kind),
            source.tensors(kind),
            source.dialect,
            dialect,
            beside=source.beside(kind),
            dtype=dtype,
        )
        for kind in kinds
    )


def _write_single_file(
    source: Model,
    path: Path,
    dtype: np.dtype | None,
    progress: Callable[[int, int], None] | None,
) -> Report:
    kinds = [kind for group in COMPONENTS.values() for kind in group]
    tensors = component(source, kinds, "compvis", dtype)
    scale = source.fields("image_decoder")["latent_scale"]
    if scale != _LATENT_SCALE and isinstance(scale, float):  # one by channel has no place there
        tensors = merge([tensors, in_memory({"scale_factor": np.array(scale, np.float32)})])
    if source.schedule["rescale_zero_terminal_snr"]:
        tensors = merge([tensors, in_memory({"ztsnr": np.empty(0, np.float32)})])
    metadata = {"modelspec.prediction_type": source.schedule["prediction"]}
    check_space(path, tensors.nbytes)
    count = _counter(progress, tensors.nbytes)
    with staged_file(path) as stage, removed_if_killed(stage):
        write_safetensors(stage, tensors, metadata=metadata, progress=count)
    dropped = source.dropped + _facts_without_place(source, tensors)
    if isinstance(source, FolderModel):
        parts = ("scheduler", "tokenizer")
        dropped += [f"{part}/" for part in parts if (source.path / part).is_dir()]
    return Report(path, tensors.nbytes, dropped)


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Progress | None:
    if progress is None:
        return None
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return count


def _facts_without_place(source: Model, tensors: Checkpoint) -> list[str]:
    """Lists what a reader of the single file would tell otherwise from its shapes."""
    shapes = from_shapes.Shapes(tensors.path, {name: tensors.info(name).shape for name in tensors})
    scale = source.fields("image_decoder")["latent_scale"]
    told_scale = scale if isinstance(scale, float) else None
    told = {
        "text_encoder": from_shapes.text_encoder,
        "image_decoder": lambda found: from_shapes.autoencoder(found, told_scale),
        "diffusion_model": from_shapes.diffusion_model,
    }
    facts = []
    for kind, tell in told.items():
        own = source.fields(kind)
        try:
            theirs = tell(shapes)
        except CheckpointMismatch:
            theirs = {}
        differing = [key for key, value in own.items() if theirs.get(key, ...) != value]
        facts += [f"{kind}'s {key}: open with config=" for key in differing]
    schedule = source.schedule
    facts += [f"schedule's {key}" for key, value in _SCHEDULE.items() if schedule[key] != value]
    return facts


def _write_folder(source: Model, path: Path, dtype: np.dtype | None, settings: tuple) -> Report:
    tokenizer, max_shard_bytes, progress = settings
    parts = {
        name: component(source, kinds, "diffusers", dtype) for name, kinds in COMPONENTS.items()
    }
    part_configs = _configs(source)
    total = sum(tensors.nbytes for tensors in parts.values())
    if isinstance(source, FolderModel) and (tokenizer is None or callable(tokenizer)):
        tokenizer = source.path / "tokenizer"
    check_space(path, total)
    count = _counter(progress, total)
    with staged(path) as stage, removed_if_killed(stage):
        for name, tensors in parts.items():
            folder.write_component(
                stage,
                name,
                part_configs[name],
                tensors,
                max_shard_bytes=max_shard_bytes,
                progress=count,
            )
        folder.write_scheduler(stage, part_configs["scheduler"])
        if callable(tokenizer):
            has_tokenizer = tokenizer(stage / "tokenizer", source)
        else:
            has_tokenizer = _copy_tokenizer(tokenizer, stage)
        _copy_terms(source, stage)
        inputs = source.fields("diffusion_model")["in_channels"]
        folder.write_index(stage, _PIPELINES.get(inputs, "StableDiffusionPipeline"))
    missing = [] if has_tokenizer else ["tokenizer/, which the source has not: pass tokenizer="]
    return Report(path, total, source.dropped + missing)


def _configs(source: Model) -> dict[str, dict[str, Any]]:
    """Returns the config of each component: a folder's own, or made of a file's fields."""
    if isinstance(source, FolderModel):
        return {name: source.folder.config(name) for name in (*COMPONENTS, "scheduler")}
    cells = source.sample_size
    decoder = source.fields("image_decoder")
    pixels = cells * 2 ** (len(decoder["channels"]) - 1)
    return {
        "text_encoder": configs.text_encoder_config(source.fields("text_encoder")),
        "vae": configs.autoencoder_config(decoder, pixels),
        "unet": configs.diffusion_model_config(source.fields("diffusion_model"), cells),
        "scheduler": configs.scheduler_config(
            {"schedule": source.schedule, "sampling": source.sampling}
        ),
    }


def _copy_terms(source: Model, stage: Path) -> None:
    """Keeps a folder's README and licence beside its weights."""
    if isinstance(source, FolderModel):
        for name in terms(os.listdir(source.path)):
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, stage / name)


def _copy_tokenizer(tokenizer: str | os.PathLike | None, stage: Path) -> bool:
    if tokenizer is None:
        return False
    place = Path(tokenizer)
    files = DiffusersFolder(place.parent).tokenizer_files(place.name)
    if files:
        (stage / "tokenizer").mkdir()
    for name, path in files.items():
        shutil.copyfile(path, stage / "tokenizer" / name)
    return bool(files)
