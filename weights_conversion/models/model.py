"""The protocol of models: a single file, a folder, and networks in memory look alike."""

from __future__ import annotations

import abc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weights_conversion.configs import scheduler_config
from weights_conversion.files.checkpoint import Checkpoint
from weights_conversion.files.errors import CheckpointMismatch, listed
from weights_conversion.models.family import Family, Part
from weights_conversion.models.folder import DiffusersFolder
from weights_conversion.models.kinds import KINDS, SampleSize, rows
from weights_conversion.names import mapping
from weights_conversion.names.table import Row


class Model(abc.ABC):
    """The networks of a model, its schedule and sampler, each read when it is asked for.

    Parts have the names of the family's row: "text_encoder", "image_decoder", "diffusion_model".

    Attributes:
        path: the file or folder, for messages.
        dialect: "compvis" or "diffusers", the names of its tensors.
        is_whole: whether all parts of the family must be there.
    """

    path: Path
    dialect: str
    is_whole: bool = True

    @property
    @abc.abstractmethod
    def family(self) -> Family:
        """Return the row of the family."""

    @abc.abstractmethod
    def has(self, name: str) -> bool:
        """Tell if a part is there."""

    @abc.abstractmethod
    def fields(self, name: str) -> dict[str, Any]:
        """Return the architecture fields of a part; both halves of the autoencoder's.

        Raises:
            CheckpointMismatch: there is no such part, or one that is not supported.
        """

    @abc.abstractmethod
    def component(self, part: Part) -> Checkpoint:
        """Return the tensors of the component that holds a part, read lazily."""

    @property
    @abc.abstractmethod
    def schedule(self) -> dict[str, Any]:
        """Return the schedule's fields."""

    @property
    @abc.abstractmethod
    def sampling(self) -> dict[str, Any]:
        """Return the default sampler's and spacing's fields."""

    @property
    @abc.abstractmethod
    def sample_size(self) -> SampleSize:
        """Return the side, or height and width, in latents of the images it was made for."""

    @property
    @abc.abstractmethod
    def dropped(self) -> list[str]:
        """Return the names of what belongs to no part of the family."""

    @property
    def image_size(self) -> int:
        """Return the longer side in pixels of the images it was made for."""
        size = self.sample_size
        cells = max(size) if isinstance(size, list) else size or 64
        stages = len(self.fields("image_decoder")["channels"]) if self.has("image_decoder") else 1
        return cells * 2 ** (stages - 1)

    def part(self, name: str) -> Part:
        """Return the row of a part that is there.

        Raises:
            CheckpointMismatch: it is not; the message names those that are.
        """
        there = {part.name: part for part in self.family.parts if self.has(part.name)}
        if name not in there:
            raise CheckpointMismatch(
                f"{self.path} is pruned: it has no {name}, only {listed(there) or 'other things'}. "
                "Take a file that holds the whole model, or its folder."
            )
        return there[name]

    def rows(self, name: str) -> tuple[Row, ...]:
        """Return the name table of a part."""
        part = self.part(name)
        return rows(part.kind, self.fields(name), part.prefix)

    def tensors(self, name: str) -> Checkpoint:
        """Return the tensors of a part, read lazily: its component without the other parts."""
        own = self.part(name)
        others = [
            row
            for part in self.family.parts
            if part.folder == own.folder and part != own and self.has(part.name)
            for row in self.rows(part.name)
        ]
        return mapping.without(self.component(own), others, self.dialect)

    def arrays(
        self, name: str, *, allow_nonfinite: bool = False
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Read every variable of a part; see `mapping.read`.

        Returns:
            An iterator of (kdiffusion path, array in Keras layout and the dtype of the weights).
        """
        return mapping.read(
            self.rows(name), self.tensors(name), self.dialect, allow_nonfinite=allow_nonfinite
        )

    def config(self, name: str) -> dict[str, Any]:
        """Return the config.json of the component that holds a part."""
        kind = KINDS[self.part(name).kind]
        return kind.config(self.fields(name), self.sample_size, self.image_size)

    def scheduler_config(self) -> dict[str, Any]:
        """Return the scheduler_config.json of the schedule and the default sampler."""
        return scheduler_config({"schedule": self.schedule, "sampling": self.sampling})

    def pad_id(self, name: str) -> int | None:
        """Return the id that fills the rows of a text encoder's tokens; None for the usual one."""
        return None

    def tokenizer(self, name: str) -> Path | None:
        """Return the folder of the tokenizer that feeds a text encoder, if there is one."""
        return None

    def write_tokenizer(self, name: str, folder: Path) -> bool:
        """Write the tokenizer that feeds a text encoder into a new folder, and tell if it could."""
        return copy_tokenizer(self.tokenizer(name), folder)

    def write_extras(self, folder: Path) -> None:
        """Write into a new folder what belongs there beside the parts: nothing."""


def copy_tokenizer(source: str | os.PathLike | None, folder: Path) -> bool:
    """Copy the files of a tokenizer into a new folder, and tell if there are any."""
    if source is None:
        return False
    place = Path(source)
    files = DiffusersFolder(place.parent).tokenizer_files(place.name)
    if files:
        folder.mkdir()
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    return bool(files)
