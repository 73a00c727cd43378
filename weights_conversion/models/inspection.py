"""Description of a checkpoint from its header alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weights_conversion.files.checkpoint import Checkpoint, TensorInfo
from weights_conversion.files.errors import (
    CheckpointError,
    CheckpointMismatch,
    printable,
)
from weights_conversion.files.limits import Limits
from weights_conversion.files.opening import is_torch, open_checkpoint
from weights_conversion.models.families import FAMILIES, identify
from weights_conversion.models.family import Family
from weights_conversion.models.folder import DiffusersFolder
from weights_conversion.models.folder_files import SCHEDULER, select, terms
from weights_conversion.models.folder_model import FolderModel
from weights_conversion.models.prediction import find_prediction
from weights_conversion.models.single_file import EMA, canonical_names

_TITLES = {"unet": "diffusion model", "vae": "autoencoder"}  # of folders, others are words
_README_BYTES = 10_000
# In the front matter of a model card: https://huggingface.co/docs/hub/model-cards
_LICENCE_LINE = re.compile(r"^license: *(\S+) *$", re.MULTILINE)


def inspect(path: str | os.PathLike, *, limits: Limits = Limits()) -> dict[str, Any]:
    """Describe a checkpoint file or a folder in diffusers' layout, without reading weights.

    Args:
        path: the file or the folder.
        limits: what a file may ask for.

    Returns:
        Plain values, fit for JSON: path, format, family, what to use if it cannot be loaded,
        prediction (None if nothing tells), the sizes of the whole and of each part, metadata and
        notes.

    Raises:
        CheckpointError: the file cannot be read; its subclasses tell why.

    Example:

    >>> inspect("v1-5-pruned-emaonly.safetensors")["family"]
    'Stable Diffusion 1'
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    checkpoint = open_checkpoint(path, limits=limits)
    names = canonical_names(checkpoint)
    family = identify({name: checkpoint.info(own).shape for name, own in names.items()})
    beginnings = {**_beginnings(family), "other": ""}
    parts: dict[str, list[TensorInfo]] = {title: [] for title in beginnings}
    for name, own in names.items():
        title = next(title for title, start in beginnings.items() if name.startswith(start))
        parts[title].append(checkpoint.info(own))
    return {
        "path": str(path),
        "format": "PyTorch" if is_torch(path) else "safetensors",
        "file_bytes": path.stat().st_size,
        "family": family.title,
        "use": family.use,
        "prediction": _prediction(checkpoint.renamed(names), family),
        **_size(info for infos in parts.values() for info in infos),
        "parts": {title: _size(infos) for title, infos in parts.items() if infos},
        "metadata": checkpoint.metadata,
        "notes": list(checkpoint.notes),
    }


def _beginnings(family: Family) -> dict[str, str]:
    """Return the beginnings of names in a single file by the title of what has them."""
    network, *others = reversed((family if family.pipeline else FAMILIES["sd1"]).parts)
    starts = {_title(network.folder): f"{network.prefix}.", "moving average": EMA}
    return starts | {_title(part.folder): f"{part.prefix}." for part in others}


def _title(folder: str) -> str:
    return _TITLES.get(folder, folder.replace("_", " "))


def _folder(path: Path) -> dict[str, Any]:
    model = FolderModel(path)
    folder = model.folder
    parts: dict[str, list[TensorInfo]] = {}
    notes = []
    for name in filter(folder.has, model.family.folders):
        try:
            checkpoint = folder.weights(name)
        except CheckpointError as error:
            notes.append(str(error))
        else:
            parts[name] = [checkpoint.info(tensor) for tensor in checkpoint]
    licence, missing = _licence(path), _missing(folder)
    return {
        "path": str(path),
        "format": "diffusers",
        "file_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "family": str(folder.index.get("_class_name")),
        "use": None,
        "prediction": _scheduler(folder).get("prediction_type", "epsilon"),
        **_size(info for infos in parts.values() for info in infos),
        "parts": {name: _size(infos) for name, infos in parts.items()},
        "metadata": {"licence": licence} if licence else {},
        "notes": notes + missing,
    }


def _licence(path: Path) -> str | None:
    """Name a folder's licence, as its README's first lines do, and the files that hold terms."""
    files = [name for name in terms(os.listdir(path)) if (path / name).is_file()]
    named = None
    if "README.md" in files:
        with open(path / "README.md", "rb") as readme:
            start = readme.read(_README_BYTES).decode("utf-8", errors="replace")
        match = _LICENCE_LINE.search(start) if start.startswith("---") else None
        named = match[1].strip("'\"") if match else None
    return f"{named or 'see the terms'} ({', '.join(files)})" if files else None


def _missing(folder: DiffusersFolder) -> list[str]:
    """Return what loading will miss."""
    files = (file for file in folder.path.rglob("*") if file.is_file())
    try:
        selection = select((f.relative_to(folder.path).as_posix() for f in files), folder.index)
    except CheckpointMismatch as error:
        return [str(error)]
    variant = selection.variant
    return [] if variant is None else [f"all weights are of the variant {variant!r}"]


def _scheduler(folder: DiffusersFolder) -> dict[str, Any]:
    return folder.config(SCHEDULER) if folder.has(SCHEDULER) else {}


def _prediction(checkpoint: Checkpoint, family: Family) -> str | None:
    try:
        return find_prediction(checkpoint, family, suggest=False)
    except CheckpointMismatch:
        return None


def _size(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    infos = list(infos)
    return {
        "tensors": len(infos),
        "parameters": sum(info.nbytes // info.dtype.itemsize for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(Counter(info.dtype.name for info in infos).most_common()),
    }


def as_text(description: dict[str, Any]) -> str:
    """Return a description as lines for people, safe for a terminal."""
    whole = {**description, "parts": {"all": description, **description["parts"]}}
    lines = [
        f"{printable(whole['path'])}: {whole['format']}, {whole['file_bytes']:,} bytes",
        f"family: {whole['family']}" + (f" ({whole['use']})" if whole["use"] else ""),
        f"prediction: {whole['prediction'] or 'not told; pass it'}",
    ]
    for title, part in whole["parts"].items():
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in part["dtypes"].items())
        lines.append(
            f"{title}: {part['tensors']:,} tensors, {part['parameters']:,} numbers, "
            f"{part['bytes']:,} bytes ({dtypes or 'none'})"
        )
    lines += [f"metadata {printable(k)}: {printable(v)}" for k, v in whole["metadata"].items()]
    lines += [f"note: {note}" for note in whole["notes"]]
    return "\n".join(lines)
