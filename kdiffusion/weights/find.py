"""Find the source of a model by its name: a preset, a folder, a file, or an address on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from kdiffusion.weights import hub, random_tiny
from kdiffusion.weights.presets import PRESETS, Preset
from kdiffusion.weights.sources import CheckpointSource, Source

_PACKAGE = Path(__file__).parents[1]


def open_source(preset: str | os.PathLike, **settings) -> Source:
    """Find the model of a preset name, a folder, a file or a hub address; may download.

    Args:
        preset: a name in `weights.presets.PRESETS`, `"random-tiny"`, the path of a folder in
            diffusers' layout or of a single file (`.safetensors`, `.ckpt`), or
            `"hf://organisation/repository[@revision]"`.
        settings: keyword arguments of `weights_conversion.open_single_file`, for single files.

    Returns:
        A `Source`.

    Raises:
        ValueError: If it is none of these; the message lists the known names.
    """
    text = os.fspath(preset)
    check_preset(text)
    if text == random_tiny.NAME:
        return random_tiny.RandomSource()
    if text in PRESETS:
        return _open_preset(text, PRESETS[text])
    if text.startswith("hf://"):
        repository, _, revision = text.removeprefix("hf://").partition("@")
        path, variant = hub.fetch(repository, revision or None)
        return CheckpointSource(path, name=repository.split("/")[-1], variant=variant)
    if os.path.isdir(text):
        return CheckpointSource(text)
    return CheckpointSource(text, **settings)


def check_preset(preset: str | os.PathLike) -> None:
    """Refuse a name that `open_source` finds nothing for; open and download nothing.

    Args:
        preset: see `open_source`.

    Raises:
        ValueError: If it is no known name, no address and no path of this machine.
    """
    text = os.fspath(preset)
    names = sorted([*PRESETS, random_tiny.NAME])
    if text not in names and not text.startswith("hf://") and not os.path.exists(text):
        raise ValueError(
            "`preset` must be a known name, a folder in diffusers' layout, a .safetensors or .ckpt "
            f"file, or an address 'hf://organisation/repository'. Received: preset={text!r}, which "
            f"is no file or folder here. Known names: {', '.join(names)}"
        )


def _open_preset(name: str, preset: Preset) -> Source:
    size = preset.height, preset.width
    if preset.repository is None:
        return CheckpointSource(_PACKAGE / preset.folder, size, name)
    path, variant = hub.fetch(preset.repository, licence=preset.licence)
    return CheckpointSource(path, size, name, variant=variant)
