"""Conversion of whole models: a file, a folder or networks in memory, to a file or a folder.

One tensor is in memory at a time; nothing appears under the new name before all of it is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weights_conversion.files.checkpoint import Checkpoint, in_memory
from weights_conversion.files.errors import CheckpointMismatch, listed
from weights_conversion.files.safetensors_reader import DTYPES
from weights_conversion.files.safetensors_writer import Progress, write_safetensors
from weights_conversion.files.staging import (
    check_space,
    removed_if_killed,
    staged,
    staged_file,
)
from weights_conversion.models import folder
from weights_conversion.models.family import NETWORK, Part
from weights_conversion.models.folder_files import SCHEDULER
from weights_conversion.models.folder_model import FolderModel
from weights_conversion.models.model import Model, copy_tokenizer
from weights_conversion.models.single_file import (
    LATENT_SCALE,
    ZERO_TERMINAL_SNR,
    SingleFile,
    open_single_file,
)
from weights_conversion.names.translation import merge, translate

# Writes the tokenizer of a model's text encoder into a new folder, and tells if it could.
WriteTokenizer = Callable[[Path, Model, str], bool]

FLOATS = {DTYPES[name].name: DTYPES[name] for name in ("F32", "F16", "BF16")}


class Report(NamedTuple):
    """The result of a conversion.

    Attributes:
        path: the new file or folder.
        nbytes: bytes of the tensors in it.
        dropped: what the source held and the result does not, in words or by name.
    """

    path: Path
    nbytes: int
    dropped: list[str]


def open_model(path: str | os.PathLike, *, variant: str | None = None, **settings: Any) -> Model:
    """Open a folder in diffusers' layout, or a single file.

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
    """Write a model as a single file in CompVis names, or as a folder in diffusers' layout.

    Args:
        source: the model, from `open_model`, or `InMemory`.
        destination: the new path, which must not exist: with the suffix .safetensors a single
            file, without a suffix a folder.
        dtype: "float32", "float16" or "bfloat16"; None for that of each tensor.
        tokenizer: for a folder, a folder with the tokenizer's files, which single files have not;
            or a function that writes those that the source has not.
        max_shard_bytes: for a folder, the size above which weights are split.
        progress: is called again and again with the bytes that are written and those of all.

    Returns:
        A `Report` that lists everything that was dropped.

    Raises:
        CheckpointError: the source is incomplete, a weight is not finite, or the destination
            exists or is too small.

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
    parts = _parts(source)
    components = {
        name: _component(source, group, "diffusers", target) for name, group in parts.items()
    }
    total = sum(tensors.nbytes for tensors in components.values())
    configs = {name: source.config(group[0].name) for name, group in parts.items()}
    schedules = any(part.name == NETWORK for group in parts.values() for part in group)
    scheduler = source.scheduler_config() if schedules else None
    check_space(path, total)
    count = _counter(progress, total)
    with staged(path) as stage, removed_if_killed(stage):
        for name, tensors in components.items():
            folder.write_component(
                stage,
                name,
                configs[name],
                tensors,
                max_shard_bytes=max_shard_bytes,
                progress=count,
            )
        if scheduler is not None:
            folder.write_scheduler(stage, scheduler)
        missing = _write_tokenizers(source, stage, tokenizer)
        source.write_extras(stage)
        if source.is_whole and source.family.index is not None:
            folder.write_index(stage, source.family.index)
    return Report(path, total, source.dropped + missing)


def _parts(source: Model) -> dict[str, list[Part]]:
    """Return the parts to write, by the folder that holds them.

    Raises:
        CheckpointMismatch: there are none, or one is missing.
    """
    found: dict[str, list[Part]] = {}
    for part in source.family.parts:
        if source.is_whole or source.has(part.name):
            found.setdefault(part.folder, []).append(source.part(part.name))
    for part in source.family.parts:
        if part.folder in found and part not in found[part.folder]:
            raise CheckpointMismatch(
                f"{part.folder}/ needs {part.name} too. Received: "
                f"{listed(other.name for other in found[part.folder])}. Give all of it or nothing."
            )
    if not found:
        raise CheckpointMismatch(f"{source.path} holds no part of a model that is known here.")
    return found


def _component(
    source: Model, parts: Iterable[Part], dialect: str, dtype: np.dtype | None
) -> Checkpoint:
    """Return the tensors of some parts in a dialect, translated when they are read."""
    return merge(
        translate(
            source.rows(part.name),
            source.tensors(part.name),
            source.dialect,
            dialect,
            dtype=dtype,
        )
        for part in parts
    )


def _write_single_file(
    source: Model,
    path: Path,
    dtype: np.dtype | None,
    progress: Callable[[int, int], None] | None,
) -> Report:
    family, schedule = source.family, source.schedule
    if family.signs is None:
        raise CheckpointMismatch(
            f"There are no single files of {family.title}. Name a folder, without a suffix."
        )
    tensors = _component(source, family.parts, "compvis", dtype)
    facts = {}
    scale = source.fields("image_decoder")["latent_scale"]
    if scale != family.latent_scale and isinstance(scale, float):  # one by channel has no place
        facts[LATENT_SCALE] = np.array(scale, np.float32)
    if schedule["rescale_zero_terminal_snr"]:
        facts[ZERO_TERMINAL_SNR] = np.empty(0, np.float32)
    tensors = merge([tensors, in_memory(facts)])
    metadata = {"modelspec.prediction_type": schedule["prediction"]}
    check_space(path, tensors.nbytes)
    count = _counter(progress, tensors.nbytes)
    with staged_file(path) as stage, removed_if_killed(stage):
        write_safetensors(stage, tensors, metadata=metadata, progress=count)
    folders = (SCHEDULER, *family.tokenizers)
    dropped = [f"{name}/" for name in folders if (source.path / name).is_dir()]
    written = SingleFile(tensors, {name: name for name in tensors}, family, schedule["prediction"])
    return Report(path, tensors.nbytes, source.dropped + _untold(source, written) + dropped)


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Progress | None:
    if progress is None:
        return None
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return count


def _untold(source: Model, written: SingleFile) -> list[str]:
    """List what a reader of a single file would tell otherwise from its shapes."""
    facts = []
    for name in {part.folder: part.name for part in source.family.parts}.values():
        try:
            theirs = written.fields(name)
        except CheckpointMismatch:
            theirs = {}
        own = source.fields(name)
        differing = [key for key, value in own.items() if theirs.get(key, ...) != value]
        facts += [f"{name}'s {key}: open with config=" for key in differing]
    schedule = source.schedule
    return facts + [f"schedule's {k}" for k, v in written.schedule.items() if schedule[k] != v]


def _write_tokenizers(
    source: Model, stage: Path, tokenizer: str | os.PathLike | WriteTokenizer | None
) -> list[str]:
    """Write the tokenizers of all text encoders, and list those that are missing."""
    missing = []
    for part in source.family.parts:
        if part.tokenizer is None or not source.has(part.name):
            continue
        place = stage / part.tokenizer
        if tokenizer is None or callable(tokenizer):
            is_there = source.write_tokenizer(part.name, place)
        else:
            is_there = copy_tokenizer(tokenizer, place)
        if not is_there and callable(tokenizer):
            is_there = tokenizer(place, source, part.name)
        if not is_there:
            missing.append(f"{part.tokenizer}/, which the source has not: pass tokenizer=")
    return missing
