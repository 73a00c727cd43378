"""Networks in memory, seen as one model: what is saved as a folder or as a single file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weights_conversion.files.checkpoint import Checkpoint, in_memory
from weights_conversion.files.errors import CheckpointMismatch, listed
from weights_conversion.models.families import family_of
from weights_conversion.models.family import Family, Part
from weights_conversion.models.kinds import Fields, SampleSize
from weights_conversion.models.model import Model
from weights_conversion.names import mapping

_IMAGE_SIZE = 512  # of autoencoders whose images are of no size in particular


class Network(NamedTuple):
    """A network in memory.

    Attributes:
        kind: a name in `KINDS`.
        fields: its architecture.
        arrays: its variables in Keras layout, by kdiffusion path.
    """

    kind: str
    fields: Fields
    arrays: Mapping[str, np.ndarray]


class InMemory(Model):
    """Networks in memory with what else a folder says of them.

    Args:
        networks: `Network` of each part, by the part's name.
        schedule: the schedule's fields; needed with a diffusion model.
        sampling: the default sampler's and spacing's fields; likewise.
        size: default (height, width) of an image in pixels, or None.
        tokenizers: for the names of text encoders, functions that write a tokenizer's files into a
            folder.
        extras: writes further files into a new folder.
        is_whole: whether these are all parts of a family, so that an index is written.

    Attributes:
        dialect: "diffusers".

    Raises:
        CheckpointMismatch: no family has all these parts.

    Example:

    >>> model = InMemory({"image_encoder": encoder, "image_decoder": decoder})
    >>> convert(model, "autoencoder")
    """

    dialect = "diffusers"
    path = Path("memory")

    def __init__(
        self,
        networks: Mapping[str, Network],
        *,
        schedule: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        tokenizers: Mapping[str, Callable[[Path], Any]] | None = None,
        extras: Callable[[Path], Any] | None = None,
        is_whole: bool = False,
    ):
        self.is_whole = is_whole
        self._networks = dict(networks)
        self._schedule, self._sampling, self._size = schedule, sampling, size
        self._tokenizers, self._extras = dict(tokenizers or {}), extras
        strangers = networks.keys() - {part.name for part in self.family.parts}
        if strangers:
            raise CheckpointMismatch(
                f"No family of models has the parts {listed(networks)}: {self.family.title} has no "
                f"{listed(sorted(strangers))}. Add a row to FAMILIES."
            )

    @cached_property
    def family(self) -> Family:
        """Return the family that has these networks and such inputs of the diffusion model."""
        return family_of(
            lambda part: self.has(part.name) and self._networks[part.name].kind == part.kind,
            lambda part: self._networks[part.name].fields,
        )

    def has(self, name: str) -> bool:
        """Tell if there is such a network."""
        return name in self._networks

    def fields(self, name: str) -> dict[str, Any]:
        """Return the architecture fields of a part."""
        return dict(self._networks[self.part(name).name].fields)

    def component(self, part: Part) -> Checkpoint:
        """Return the tensors of a part, which lie in no component yet."""
        network = self._networks[part.name]
        return in_memory(mapping.write(self.rows(part.name), network.arrays, self.dialect))

    @property
    def schedule(self) -> dict[str, Any]:
        """Return the schedule's fields."""
        return self._told("schedule", self._schedule)

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the default sampler's and spacing's fields."""
        return self._told("sampling", self._sampling)

    def _told(self, name: str, fields: dict[str, Any] | None) -> dict[str, Any]:
        if fields is None:
            raise CheckpointMismatch(f"A diffusion model is written with its {name}. Pass {name}=.")
        return fields

    @property
    def sample_size(self) -> SampleSize:
        """Return the side, or height and width, in latents of an image; None without a size."""
        if self._size is None:
            return None
        stages = len(self.fields("image_decoder")["channels"]) if self.has("image_decoder") else 1
        height, width = (side // 2 ** (stages - 1) for side in self._size)
        return height if height == width else [height, width]

    @property
    def image_size(self) -> int:
        """Return the longer side of an image in pixels."""
        return max(self._size or (_IMAGE_SIZE,))

    @property
    def dropped(self) -> list[str]:
        """Return no names: every network has a place."""
        return []

    def write_tokenizer(self, name: str, folder: Path) -> bool:
        """Write the tokenizer that feeds a text encoder, and tell if there is one."""
        if name not in self._tokenizers:
            return False
        self._tokenizers[name](folder)
        return True

    def write_extras(self, folder: Path) -> None:
        """Write further files into a new folder."""
        if self._extras is not None:
            self._extras(folder)
