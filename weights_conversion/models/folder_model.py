"""A folder in diffusers' layout, seen as one model: the counterpart of `SingleFile`."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from weights_conversion.files.checkpoint import Checkpoint
from weights_conversion.models.components import (
    COMPONENT_OF,
    COMPONENTS,
    component_fields,
)
from weights_conversion.models.folder import DiffusersFolder
from weights_conversion.names import Row, rows


class FolderModel:
    """A folder's architecture, schedule and weights, each read when it is asked for.

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
        self._variant = variant

    def has(self, kind: str) -> bool:
        """Whether the folder holds a model of this kind."""
        return self.folder.has(COMPONENT_OF[kind])

    def fields(self, kind: str) -> dict[str, Any]:
        """Returns the architecture fields of a kind of model; both halves of the autoencoder's."""
        return component_fields(self.folder, COMPONENT_OF[kind])

    def rows(self, kind: str) -> tuple[Row, ...]:
        """Returns the name table of a kind of model."""
        return rows(kind, self.fields(kind))

    def beside(self, kind: str) -> list[Row]:
        """Returns the name tables of the models in the same component."""
        return [
            row
            for other in COMPONENTS[COMPONENT_OF[kind]]
            if other != kind
            for row in self.rows(other)
        ]

    def tensors(self, kind: str) -> Checkpoint:
        """Returns the tensors of the component that holds a kind of model, read lazily."""
        return self.folder.weights(COMPONENT_OF[kind], self._variant)

    @cached_property
    def _scheduler(self) -> dict[str, dict[str, Any]]:
        return component_fields(self.folder, "scheduler")

    @property
    def schedule(self) -> dict[str, Any]:
        """The schedule's fields."""
        return self._scheduler["schedule"]

    @property
    def sampling(self) -> dict[str, Any]:
        """The default sampler's and spacing's fields."""
        return self._scheduler["sampling"]

    @property
    def sample_size(self) -> int | list[int]:
        """Side, or height and width, in latents, of the pictures that the model was made for."""
        return self.folder.config("unet").get("sample_size") or 64

    @property
    def dropped(self) -> list[str]:
        """The folder's parts that are no part of Stable Diffusion's four networks."""
        known = {*COMPONENTS, "scheduler", "tokenizer"}
        return sorted(
            f"{part.name}/"
            for part in self.path.iterdir()
            if part.is_dir() and part.name not in known and not part.name.startswith(".")
        )
