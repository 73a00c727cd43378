"""A folder in diffusers' layout, seen as one model: the counterpart of `SingleFile`."""

from __future__ import annotations

import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from weights_conversion.configs import scheduler_fields
from weights_conversion.files.checkpoint import Checkpoint
from weights_conversion.files.errors import CheckpointMismatch
from weights_conversion.models.families import family_of
from weights_conversion.models.family import NETWORK, Family, Part
from weights_conversion.models.folder import DiffusersFolder
from weights_conversion.models.folder_files import INDEX, SCHEDULER, terms
from weights_conversion.models.kinds import KINDS, SampleSize
from weights_conversion.models.model import Model


class FolderModel(Model):
    """A folder's architecture, schedule and weights, each read when it is asked for.

    The folder may hold a whole model, or some of its parts without an index.

    Args:
        path: the folder.
        variant: of its weights' files, such as "fp16"; None for those without one.

    Attributes:
        dialect: "diffusers".
        path: the folder.
        folder: its files.
    """

    dialect = "diffusers"

    def __init__(self, path: str | os.PathLike, variant: str | None = None):
        self.path = Path(path)
        self.folder = DiffusersFolder(path)
        self.is_whole = (self.path / INDEX).is_file()
        self._variant = variant

    @cached_property
    def family(self) -> Family:
        """Return the family that has such parts and such inputs of the diffusion model."""
        there = self.folder.components()
        return family_of(
            lambda part: part.folder in there, lambda part: folder_fields(self.folder, part)
        )

    def has(self, name: str) -> bool:
        """Tell if the folder holds a part."""
        parts = (part for part in self.family.parts if part.name == name)
        return any(self.folder.has(part.folder) for part in parts)

    def fields(self, name: str) -> dict[str, Any]:
        """Return the architecture fields of a part; both halves of the autoencoder's."""
        return folder_fields(self.folder, self.part(name))

    def component(self, part: Part) -> Checkpoint:
        """Return the tensors of the component that holds a part, read lazily."""
        return self.folder.weights(part.folder, self._variant)

    def config(self, name: str) -> dict[str, Any]:
        """Return the config.json of the component that holds a part, as it is."""
        return self.folder.config(self.part(name).folder)

    def scheduler_config(self) -> dict[str, Any]:
        """Return the scheduler_config.json, as it is."""
        return self.folder.config(SCHEDULER)

    @cached_property
    def _scheduler(self) -> dict[str, dict[str, Any]]:
        return folder_scheduler(self.folder)

    @property
    def schedule(self) -> dict[str, Any]:
        """Return the schedule's fields."""
        return self._scheduler["schedule"]

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the default sampler's and spacing's fields."""
        return self._scheduler["sampling"]

    @property
    def sample_size(self) -> SampleSize:
        """Return the side, or height and width, in latents of the images it was made for."""
        return self.folder.config(self.part(NETWORK).folder).get("sample_size") or 64

    @property
    def dropped(self) -> list[str]:
        """Return the names of the folders that are no part of its family."""
        known = {*self.family.folders, *self.family.tokenizers, SCHEDULER}
        return sorted(
            f"{part.name}/"
            for part in self.path.iterdir()
            if part.is_dir() and part.name not in known and not part.name.startswith(".")
        )

    def tokenizer(self, name: str) -> Path | None:
        """Return the folder of the tokenizer that feeds a text encoder, if there is one."""
        folders = {part.name: part.tokenizer for part in self.family.parts}
        folder = self.path / (folders.get(name) or "tokenizer")
        return folder if folder.is_dir() else None

    def write_extras(self, folder: Path) -> None:
        """Copy README and licence, which go with the weights."""
        for name in terms(os.listdir(self.path)):
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)


def folder_fields(folder: DiffusersFolder, part: Part) -> dict[str, Any]:
    """Return the fields of a part's config.json in a folder.

    Raises:
        CheckpointMismatch: it is not supported; the message names the folder, key and value.
    """
    config = folder.config(part.folder)
    try:
        return KINDS[part.kind].fields(config)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{folder.path / part.folder}: {error}") from error


def folder_scheduler(folder: DiffusersFolder) -> dict[str, dict[str, Any]]:
    """Return the fields of the schedule and of the sampling in a folder.

    Raises:
        CheckpointMismatch: they are not supported; the message names the folder, key and value.
    """
    config = folder.config(SCHEDULER)
    try:
        return scheduler_fields(config)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{folder.path / SCHEDULER}: {error}") from error
