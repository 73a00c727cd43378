"""Where a model's parts come from: a folder, a file, the hub, memory, or random numbers."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights import hub
from kdiffusion.weights.presets import PRESETS
from kdiffusion.weights.variables import MODELS, assign

# What is to be done with a model that has no weights yet, see `Source.model`.
Built = Callable[[ArchitectureModel], Any]


# The weights that come with the package.
_SHAPES = Path(__file__).parents[1] / "shapes" / "model"


def ignore(model: ArchitectureModel) -> None:
    """Nothing is to be done."""


class Source(Protocol):
    """Something that the parts of a latent diffusion model can be loaded from.

    Attributes:
        name: str, for people.
        height, width: int, the size that the model draws by default, in pixels.
    """

    name: str
    height: int
    width: int

    def has(self, kind: str) -> bool:
        """Whether there is one of `MODELS`."""

    def architecture(self, kind: str) -> Any:
        """The architecture record of one of `MODELS`."""

    def model(self, kind: str, dtype: Any, built: Built = ignore) -> ArchitectureModel:
        """One of `MODELS`, with its weights.

        Where it has to be made first, `built` is called with it before its weights are read.
        """

    def tokenizer(self) -> SimpleTokenizer:
        """The tokenizer."""

    def schedule(self) -> Schedule:
        """The schedule that the network was trained with."""

    def sampling(self) -> tuple[str, Spacing]:
        """The default sampler's name and the default spacing."""


class CheckpointSource:
    """A folder in diffusers' layout, or a single file in CompVis names.

    Args:
        path: path of the folder or file.
        size: (height, width) in pixels, or `None` for what the checkpoint was made for.
        name: for people; `None` for the path's last part.
        settings: keyword arguments of `weights_conversion.open_model`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: tuple[int, int] | None = None,
        name: str | None = None,
        **settings,
    ):
        from weights_conversion import open_model

        self.checkpoint: Any = open_model(path, **settings)
        self.name = name or Path(path).resolve().name
        self.height, self.width = size or self._trained_size()

    def has(self, kind):
        return self.checkpoint.has(kind)

    def architecture(self, kind):
        return MODELS[kind].architecture_class(**self.checkpoint.fields(kind))

    def model(self, kind, dtype, built=ignore):
        from weights_conversion import read

        model = MODELS[kind](self.architecture(kind), initialize=False, dtype=dtype, name=kind)
        built(model)
        arrays = read(
            self.checkpoint.rows(kind),
            self.checkpoint.tensors(kind),
            self.checkpoint.dialect,
            beside=self.checkpoint.beside(kind),
        )
        assign(model, arrays)
        return model

    def tokenizer(self):
        folder = self.checkpoint.path / "tokenizer"
        if folder.is_dir():
            return SimpleTokenizer.from_folder(folder)
        return SimpleTokenizer.default(pad_id=getattr(self.checkpoint, "pad_id", None))

    def schedule(self):
        return Schedule(**self.checkpoint.schedule)

    def sampling(self):
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

    def _trained_size(self) -> tuple[int, int]:
        cells = self.checkpoint.sample_size
        sides = (cells, cells) if isinstance(cells, int) else tuple(cells)
        downsampling = 1
        if self.checkpoint.has("image_decoder"):
            downsampling = self.architecture("image_decoder").downsampling
        return sides[0] * downsampling, sides[1] * downsampling


class PartsSource:
    """Parts that are in memory already.

    Args:
        models: dictionary of networks, by their names in `MODELS`.
        schedule: `Schedule`.
        size: default (height, width) of a picture in pixels.
        tokenizer: `SimpleTokenizer`, or `None` if there is none.
        sampling: the default sampler's name and the default spacing, or `None` for ddim.
    """

    name = "parts in memory"

    def __init__(self, models, schedule, size, tokenizer=None, sampling=None):
        self.height, self.width = size
        self._models = dict(models)
        self._schedule = schedule
        self._tokenizer = tokenizer
        # Where the schedule ends in pure noise, drawing has to start there.
        spacing = Spacing("trailing" if schedule.rescale_zero_terminal_snr else "leading")
        self._sampling = sampling or ("ddim", spacing)

    def has(self, kind):
        return kind in self._models

    def architecture(self, kind):
        return self.model(kind, None).architecture

    def model(self, kind, dtype, built=ignore):
        if kind not in self._models:
            raise ValueError(
                f"This model was made of {sorted(self._models)} and has no {kind}. Give it to "
                "`from_parts` too."
            )
        return self._models[kind]

    def tokenizer(self):
        if self._tokenizer is None:
            raise ValueError("This model has no tokenizer. Give one to `from_parts`.")
        return self._tokenizer

    def schedule(self):
        return self._schedule

    def sampling(self):
        return self._sampling


class RandomSource:
    """A tiny latent diffusion model whose weights are random numbers from a fixed seed.

    It has learned nothing and draws coloured noise. It exists so that everything around the
    weights can be tried, tested and timed offline within seconds.
    """

    name = "random-tiny"
    height = 64
    width = 64

    _ARCHITECTURES = {
        "text_encoder": TextEncoderArchitecture(
            vocabulary_size=514, width=32, depth=2, num_heads=2, mlp_width=64, end_id=513
        ),
        "autoencoder": AutoencoderArchitecture(
            channels=(16, 16, 32, 32), layers_per_level=1, num_groups=8
        ),
        "diffusion_model": DiffusionArchitecture(
            channels=(16, 32),
            layers_per_level=1,
            depths=(1, 0),
            num_heads=(2, 2),
            context_width=32,
            num_groups=8,
        ),
    }

    def has(self, kind):
        return kind in MODELS

    def architecture(self, kind):
        return self._ARCHITECTURES.get(kind) or self._ARCHITECTURES["autoencoder"]

    def model(self, kind, dtype, built=ignore):
        model = MODELS[kind](self.architecture(kind), initialize=False, dtype=dtype, name=kind)
        built(model)
        assign(model, [(v.path, _random_weight(kind, v.path, v.shape)) for v in model.variables])
        return model

    def tokenizer(self):
        return SimpleTokenizer.byte_level()

    def schedule(self):
        return Schedule()

    def sampling(self):
        return "ddim", Spacing()


def _random_weight(kind, path, shape):
    leaf = path.split("/")[-1]
    if leaf == "gamma":
        return np.ones(shape, np.float32)
    if leaf in ("beta", "bias"):
        return np.zeros(shape, np.float32)
    generator = np.random.default_rng(zlib.crc32(f"{kind}/{path}".encode()))
    deviation = 1.0 if leaf.endswith("embedding") else np.prod(shape[:-1]) ** -0.5
    return (generator.standard_normal(tuple(shape)) * deviation).astype(np.float32)


def open_source(preset: str | os.PathLike, **settings) -> Source:
    """Find what a preset name, a folder, a file or a hub address stands for; may download.

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
    if text == RandomSource.name:
        return RandomSource()
    if text in PRESETS:
        record = PRESETS[text]
        size = record.height, record.width
        if record.repository is None:
            return CheckpointSource(_SHAPES, size, text)
        path, variant = hub.fetch(record.repository, licence=record.licence)
        return CheckpointSource(path, size, text, variant=variant)
    if text.startswith("hf://"):
        repository, _, revision = text.removeprefix("hf://").partition("@")
        path, variant = hub.fetch(repository, revision or None)
        return CheckpointSource(path, name=repository.split("/")[-1], variant=variant)
    if os.path.isdir(text):
        return CheckpointSource(text)
    return CheckpointSource(text, **settings)


def check_preset(preset: str | os.PathLike) -> None:
    """Refuse what `open_source` finds nothing for; opens and downloads nothing.

    Args:
        preset: see `open_source`.

    Raises:
        ValueError: If it is no known name, no address and no path of this machine.
    """
    text = os.fspath(preset)
    names = sorted([*PRESETS, RandomSource.name])
    if text not in names and not text.startswith("hf://") and not os.path.exists(text):
        raise ValueError(
            "`preset` must be a known name, a folder in diffusers' layout, a .safetensors or .ckpt "
            f"file, or an address 'hf://organisation/repository'. Received: preset={text!r}, which "
            f"is no file or folder here. Known names: {', '.join(names)}"
        )
