"""The sources of a model's parts: a folder or file, and networks in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from kdiffusion.models.base import ArchitectureModel
from kdiffusion.records import fields
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights.variables import MODELS, assign, kind_of
from weights_conversion import Family, family_of, open_model

# Called with a network before its weights are read, see `Source.model`.
Built = Callable[[ArchitectureModel], Any]


class Source(Protocol):
    """A place from which the parts of a model can be loaded.

    Parts have the names of the family's row, such as `"text_encoder"` and `"diffusion_model"`.

    Attributes:
        name: str, for people.
    """

    name: str

    @property
    def height(self) -> int:
        """Return the default height of an image in pixels."""

    @property
    def width(self) -> int:
        """Return the default width of an image in pixels."""

    @property
    def family(self) -> Family:
        """Return the row of the model's family in `weights_conversion.FAMILIES`."""

    def has(self, name: str) -> bool:
        """Tell if there is a part of this name."""

    def architecture(self, name: str) -> Any:
        """Return the architecture record of a part."""

    def model(self, name: str, dtype: Any, built: Built | None = None) -> ArchitectureModel:
        """Return the network of a part with its weights.

        Args:
            name: str, the part.
            dtype: Keras dtype policy, or `None` for the global one.
            built: function, called with a network that is new before its weights are read.
        """

    def tokenizer(self, name: str = "text_encoder") -> SimpleTokenizer:
        """Return the tokenizer that feeds a text encoder."""

    def schedule(self) -> Schedule:
        """Return the schedule that the diffusion model was trained with."""

    def sampling(self) -> tuple[str, Spacing]:
        """Return the default sampler's name and the default spacing."""


class CheckpointSource:
    """A folder in diffusers' layout, or a single file in CompVis names.

    The folder may hold parts of a model alone; only what is asked for must be there.

    Args:
        path: path of the folder or file.
        size: (height, width) in pixels, each `None` for what the checkpoint was made for.
        name: for people; `None` for the path's last part.
        settings: keyword arguments of `weights_conversion.open_model`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: tuple[int | None, int | None] = (None, None),
        name: str | None = None,
        **settings,
    ):
        self.checkpoint = open_model(path, **settings)
        self.name = name or Path(path).resolve().name
        self._size = size

    @property
    def family(self):
        """See `Source`."""
        return self.checkpoint.family

    @property
    def height(self):
        """See `Source`."""
        return self._size[0] or self._trained_size[0]

    @property
    def width(self):
        """See `Source`."""
        return self._size[1] or self._trained_size[1]

    @cached_property
    def _trained_size(self) -> tuple[int, int]:
        """Return the height and width in pixels of the images it was made for."""
        cells: Any = self.checkpoint.sample_size
        height, width = cells if isinstance(cells, (list, tuple)) else (cells, cells)
        downsampling = 1
        if self.has("image_decoder"):
            downsampling = self.architecture("image_decoder").downsampling
        return height * downsampling, width * downsampling

    def has(self, name):
        """See `Source`."""
        return self.checkpoint.has(name)

    def architecture(self, name):
        """See `Source`."""
        kind = self.checkpoint.part(name).kind
        return MODELS[kind].architecture_class(**self.checkpoint.fields(name))

    def model(self, name, dtype, built=None):
        """See `Source`."""
        model_class = MODELS[self.checkpoint.part(name).kind]
        model = model_class(self.architecture(name), initialize=False, dtype=dtype, name=name)
        if built is not None:
            built(model)
        assign(model, self.checkpoint.arrays(name))
        return model

    def tokenizer(self, name="text_encoder"):
        """See `Source`."""
        folder = self.checkpoint.tokenizer(name)
        if folder is not None:
            return SimpleTokenizer.from_folder(folder)
        return SimpleTokenizer.default(pad_id=self.checkpoint.pad_id(name))

    def schedule(self):
        """See `Source`."""
        return Schedule(**self.checkpoint.schedule)

    def sampling(self):
        """See `Source`."""
        settings = dict(self.checkpoint.sampling)
        sampler = settings.pop("sampler")
        # Stable Diffusion was trained for an offset of 1, and diffusers' pipeline insists on it
        # whatever the file says: early files were written with 0.
        settings["steps_offset"] = 1
        return sampler, Spacing(
            timesteps=settings.pop("timestep_spacing"),
            sigmas=settings.pop("sigma_spacing"),
            **settings,
        )


class PartsSource:
    """Networks that are in memory already.

    Args:
        models: dictionary of networks, by the names that their family gives its parts.
        schedule: `Schedule`.
        size: default (height, width) of an image in pixels.
        tokenizer: `SimpleTokenizer`, or a dictionary of one for the name of each text encoder, or
            `None` if there is none.
        sampling: the default sampler's name and the default spacing, or `None` for ddim.
    """

    name = "parts in memory"

    def __init__(
        self,
        models: Mapping[str, Any],
        schedule: Schedule,
        size: tuple[int, int],
        tokenizer: SimpleTokenizer | Mapping[str, SimpleTokenizer] | None = None,
        sampling: tuple[str, Spacing] | None = None,
    ):
        self.height, self.width = size
        self._models = dict(models)
        self._schedule = schedule
        if isinstance(tokenizer, SimpleTokenizer):
            tokenizer = {"text_encoder": tokenizer}
        self._tokenizers = dict(tokenizer or {})
        # Where the schedule ends in pure noise, sampling has to start there.
        spacing = Spacing("trailing" if schedule.rescale_zero_terminal_snr else "leading")
        self._sampling = sampling or ("ddim", spacing)

    @cached_property
    def family(self):
        """See `Source`."""
        return family_of(
            lambda part: self.has(part.name) and kind_of(self._models[part.name]) == part.kind,
            lambda part: fields(self.architecture(part.name)),
        )

    def has(self, name):
        """See `Source`."""
        return name in self._models

    def architecture(self, name):
        """See `Source`."""
        return self.model(name, None).architecture

    def model(self, name, dtype, built=None):
        """See `Source`."""
        if name not in self._models:
            raise ValueError(
                f"This model was made of {sorted(self._models)} and has no {name}. Give it to "
                "`from_parts` too."
            )
        return self._models[name]

    def tokenizer(self, name="text_encoder"):
        """See `Source`."""
        if name not in self._tokenizers:
            raise ValueError(f"This model has no tokenizer of {name}. Give one to `from_parts`.")
        return self._tokenizers[name]

    def schedule(self):
        """See `Source`."""
        return self._schedule

    def sampling(self):
        """See `Source`."""
        return self._sampling
