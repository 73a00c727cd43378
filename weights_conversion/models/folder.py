"""Folders in the layout of diffusers: one folder per component, config and weights in each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from weights_conversion.files.checkpoint import Checkpoint, in_memory
from weights_conversion.files.errors import (
    CheckpointError,
    CheckpointLimit,
    CheckpointMismatch,
    CorruptCheckpoint,
    UnsafeCheckpoint,
    listed,
    printable,
)
from weights_conversion.files.limits import Limits
from weights_conversion.files.opening import open_checkpoint
from weights_conversion.files.safetensors_writer import Progress, write_safetensors
from weights_conversion.files.staging import staged, staged_file
from weights_conversion.models.folder_files import (
    INDEX,
    SCHEDULER,
    SCHEDULER_CONFIG,
    STEMS,
    TOKENIZER_FILES,
    weights_files,
)

MAX_JSON_BYTES = 25_000_000
MAX_SHARD_BYTES = 10_000_000_000  # what diffusers writes into one file
# The version of diffusers whose layout is written; its inpainting pipeline refuses an index
# without one.
LAYOUT_VERSION = "0.42.1"


class DiffusersFolder:
    """A pipeline's folder: reads its configs and weights when they are asked for.

    Args:
        path: the folder that holds `model_index.json` and the components' folders.

    Example:

    >>> folder = DiffusersFolder("stable-diffusion-v1-5")
    >>> fields = configs.diffusion_model_fields(folder.config("unet"))
    >>> checkpoint = folder.weights("unet", variant="fp16")
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    @property
    def index(self) -> dict[str, Any]:
        """Return the content of model_index.json: a [library, class] pair for each component."""
        return read_json(self.path / INDEX)

    def components(self) -> set[str]:
        """Return the names of the components that are there and not switched off by an index."""
        index = self.index if (self.path / INDEX).is_file() else {}
        names = os.listdir(self.path) if self.path.is_dir() else []
        there = {name for name in names if (self.path / name).is_dir()}
        return {name for name in there if index.get(name) != [None, None]}

    def has(self, component: str) -> bool:
        """Tell if the folder holds a component that is not switched off by an index."""
        return component in self.components()

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config.json, or the scheduler's scheduler_config.json."""
        name = SCHEDULER_CONFIG if component == SCHEDULER else "config.json"
        return read_json(self.path / component / name)

    def tokenizer_files(self, component: str = "tokenizer") -> dict[str, Path]:
        """Return the paths of the tokenizer's files that are there, by file name."""
        paths = {name: self.path / component / name for name in TOKENIZER_FILES}
        return {name: path for name, path in paths.items() if path.is_file()}

    def weights(self, component: str, variant: str | None = None) -> Checkpoint:
        """Open a component's weights: one file, or several with their index.

        Safetensors files are taken before PyTorch's `.bin` files.

        Args:
            component: its folder's name, such as "unet".
            variant: the part of the file name before the suffix, such as "fp16" or "non_ema".

        Raises:
            CheckpointError: there are no such weights, or one of the files cannot be used.
        """
        folder = self.path / component
        names = os.listdir(folder) if folder.is_dir() else []
        if found := weights_files(names, variant):
            is_index = found[0].endswith(".json")
            path = folder / found[0]
            return _open_shards(self.path, path) if is_index else open_checkpoint(path)
        raise CheckpointMismatch(_missing_weights(folder, variant))


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a dangling link gives a better message when opened


def _missing_weights(folder: Path, variant: str | None) -> str:
    wanted = f"weights of variant {variant!r}" if variant else "weights without a variant"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    tensors = [name for name in names if name.endswith(tuple(STEMS)) or ".index." in name]
    if tensors:
        return (
            f"{folder} has no {wanted}, but {listed(tensors)}. "
            "Pass the part before the suffix as variant."
        )
    if any(name.endswith((".ckpt", ".pt", ".msgpack", ".h5")) for name in names):
        return f"{folder} has no safetensors files, but {listed(names)}. Convert them first."
    expected = [f"{stem}{suffix}" for suffix, stems in STEMS.items() for stem in stems]
    return f"{folder} has no {wanted}. Expected one of {listed(expected)}."


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is missing, too large, or holds no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or not a file. Is the folder complete?")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointLimit(f"{path} is larger than {MAX_JSON_BYTES:,} bytes.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read as JSON: {str(error)[:200]}.") from error
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{path} holds no JSON object but a {type(content).__name__}.")
    return content


def _open_shards(root: Path, index: Path) -> Checkpoint:
    """Open the shards that an index names, as one checkpoint."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_text, weight_map.values())):
        raise CorruptCheckpoint(f"{index} has no weight_map from tensor names to file names.")
    max_tensors = Limits().tensors
    if len(weight_map) > max_tensors:
        raise CheckpointLimit(
            f"{index} lists {len(weight_map):,} tensors, more than the {max_tensors:,} allowed."
        )
    shards = {
        name: open_checkpoint(_shard_path(root, index, name))
        for name in sorted(set(weight_map.values()))
    }
    for name, shard in shards.items():
        disputed = shard.keys() ^ {tensor for tensor, place in weight_map.items() if place == name}
        if disputed:
            raise CorruptCheckpoint(
                f"{index} and {shard.path} do not agree on {listed(sorted(disputed))}. "
                "Download both again."
            )
    infos = {tensor: shards[name].info(tensor) for tensor, name in weight_map.items()}
    metadata = next((shard.metadata for shard in shards.values()), {})
    return Checkpoint(index, infos, lambda tensor: shards[weight_map[tensor]][tensor], metadata)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _shard_path(root: Path, index: Path, name: str) -> Path:
    """Return a shard's path, which must be a plain name of a file inside the folder."""
    unsafe = UnsafeCheckpoint(
        f"{index} names the file {printable(name)}, which is not beside it. "
        "Do not trust this folder; download it from its source."
    )
    if name in ("", ".", "..") or PurePosixPath(name).name != name or set("\\:\0") & set(name):
        raise unsafe
    path = index.parent / name
    if not _exists(path):
        raise CorruptCheckpoint(f"{index} names the file {printable(name)}, which is missing.")
    inside = [root.resolve()]
    if root.absolute().parent.name == "snapshots":  # the Hub's cache links to blobs beside them
        inside.append(root.absolute().parent.parent.resolve() / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in inside):
        raise unsafe
    return path


def write_component(
    path: str | os.PathLike,
    component: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    variant: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a component's folder: its config and its weights, all of it or nothing.

    Args:
        path: the pipeline's folder.
        component: the name of the folder to make, such as "unet".
        config: what config.json shall hold. With a class name of diffusers in it, the weights'
            file is named as diffusers does, else as transformers does.
        tensors: arrays by name, which need not be contiguous; of a `Checkpoint` one is read at a
            time.
        variant: as in `DiffusersFolder.weights`.
        max_shard_bytes: size above which the weights are split into several files.
        progress: is called with the bytes of each part that was written.

    Raises:
        CheckpointError: the component's folder exists already and is not empty.
    """
    stem = STEMS[".safetensors"][0 if "_class_name" in config else 1]
    with staged(Path(path) / component) as folder:
        write_json(folder / "config.json", config)
        stem += f".{variant}" if variant else ""
        _write_weights(folder / stem, in_memory(tensors), max_shard_bytes, progress)


def write_scheduler(path: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Write the scheduler's folder, which holds its scheduler_config.json only.

    Raises:
        CheckpointError: the folder exists already and is not empty.
    """
    with staged(Path(path) / SCHEDULER) as folder:
        write_json(folder / SCHEDULER_CONFIG, config)


def write_index(path: str | os.PathLike, class_name: str = "StableDiffusionPipeline") -> None:
    """Write model_index.json for the components that the folder holds; last, for this reason.

    Args:
        path: the pipeline's folder.
        class_name: the pipeline's class in diffusers.
    """
    folder = Path(path)
    absent = [None, None]
    index: dict[str, Any] = {"safety_checker": absent, "feature_extractor": absent}
    index |= {part.name: _class_row(part) for part in folder.iterdir() if part.is_dir()}
    index["_class_name"] = class_name
    index["_diffusers_version"] = LAYOUT_VERSION
    index["requires_safety_checker"] = index["safety_checker"] != absent
    with staged_file(folder / INDEX, overwrite=True) as partial:
        write_json(partial, index)


def _class_row(component: Path) -> list[str | None]:
    """Return the library and the class that load a component's folder."""
    if (component / SCHEDULER_CONFIG).is_file():
        return ["diffusers", read_json(component / SCHEDULER_CONFIG)["_class_name"]]
    if (component / "vocab.json").is_file():
        return ["transformers", "CLIPTokenizer"]
    if not (component / "config.json").is_file():
        return [None, None]
    config = read_json(component / "config.json")
    if "_class_name" in config:
        return ["diffusers", config["_class_name"]]
    return ["transformers", config["architectures"][0]]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, as diffusers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(
    stem: Path, tensors: Checkpoint, max_bytes: int, progress: Progress | None
) -> None:
    shards = _shards(tensors, max_bytes)
    if len(shards) == 1:
        path = stem.with_name(f"{stem.name}.safetensors")
        write_safetensors(path, tensors, progress=progress)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem.name}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(stem.with_name(file), tensors, names, progress=progress)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": tensors.nbytes}, "weight_map": weight_map}
    plain, _, variant = stem.name.partition(".")
    dotted = f".{variant}" if variant else ""
    write_json(stem.with_name(f"{plain}.safetensors.index{dotted}.json"), index)


def _shards(tensors: Checkpoint, max_bytes: int) -> list[list[str]]:
    """Split the names, in their order, into runs of at most this size (or one tensor)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        nbytes = tensors.info(name).nbytes
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards
