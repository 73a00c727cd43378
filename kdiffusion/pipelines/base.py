"""Pipelines: the parts of a model that generates, and the run of its denoising loop."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np

from kdiffusion import images
from kdiffusion.models.architectures import DiffusionArchitecture
from kdiffusion.pipelines.settings import Settings
from kdiffusion.pipelines.starts import Start
from kdiffusion.runtime import programs
from kdiffusion.runtime.preparation import prepare
from kdiffusion.runtime.programs import Program
from kdiffusion.sampling import run as sampling_run
from kdiffusion.sampling.guidance import Guidance
from kdiffusion.sampling.noise import NoiseStream
from kdiffusion.sampling.run import Run
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights.find import open_source
from kdiffusion.weights.save import save
from kdiffusion.weights.sources import Built, PartsSource, Source

Conditions = Mapping[str, np.ndarray]


class Component:
    """An attribute that holds a network: loaded at first use, replaced by assignment.

    The network itself lives in the private attribute of the same name, as in KerasCV.

    Args:
        part: str, the name of the part in the model's source.
        doc: str, what it is.
    """

    def __init__(self, part: str, doc: str):
        self.part = part
        self.__doc__ = doc

    def __set_name__(self, owner, name):
        self.attribute = f"_{name}"

    def __get__(self, instance, owner=None):
        return self if instance is None else self.load(instance)

    def __set__(self, instance, model):
        setattr(instance, self.attribute, model)

    def loaded(self, instance: Pipeline) -> Any:
        """Return the network, or `None` if it is not loaded yet."""
        return getattr(instance, self.attribute, None)

    def load(self, instance: Pipeline, built: Built | None = None) -> Any:
        """Return the network; if it has to be loaded, call `built` before its weights are read."""
        if self.loaded(instance) is None:
            model = instance.source.model(self.part, instance.dtype_policy, built)
            setattr(instance, self.attribute, model)
        return self.loaded(instance)


class Pipeline(abc.ABC):
    """A diffusion model, its schedule and its denoising loop; parts are loaded lazily.

    Args:
        img_height: int, default height of an image in pixels.
        img_width: int, default width of an image in pixels.
        jit_compile: `True`, `False` or `"auto"`, whether to compile with XLA. Automatic means
            everywhere but on TensorFlow's CPU, where a plain graph is faster.
        preset: where the parts come from, see `weights.find.open_source`.
        dtype: Keras dtype policy of all networks, or `None` for the global one. `"bfloat16"` and
            `"float16"` also store the weights in half.

    Raises:
        ValueError: If a size is out of range or the backend cannot compute in `dtype`.
    """

    # The divisor of the default size; that of the network itself is known after loading.
    _multiple = 1

    diffusion_model = Component("diffusion_model", "The U-Net, see `DiffusionModel`.")

    def __init__(
        self,
        img_height: int,
        img_width: int,
        jit_compile: bool | str = "auto",
        *,
        preset: str | os.PathLike,
        dtype: Any = None,
    ):
        self.img_height, self.img_width = images.check_size(img_height, img_width, self._multiple)
        self.preset = preset
        self.dtype_policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        prepare(self.dtype_policy.compute_dtype)
        self.jit_compile = programs.use_jit(jit_compile)
        self._source: Source | None = None
        self._schedule: Schedule | None = None
        self._diffusion_model: Any = None
        self._denoise_program = Program(sampling_run.denoise, self.jit_compile)

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike,
        img_height: int | None = None,
        img_width: int | None = None,
        jit_compile: bool | str = "auto",
        *,
        dtype: Any = None,
        prediction_type: str | None = None,
        weights: str = "ema",
    ) -> Self:
        """Make a model that generates at the size its checkpoint was trained for.

        Args:
            preset: see the class. It is looked up, and downloaded if need be, at once.
            img_height: int, or `None` for the checkpoint's own.
            img_width: int, or `None` for the checkpoint's own.
            jit_compile: see the class.
            dtype: see the class.
            prediction_type: `"epsilon"`, `"v"` or `"sample"`, for a single file that does not
                tell.
            weights: `"ema"` or `"raw"`, for a single file that holds both.

        Returns:
            A model of this class.

        Raises:
            ValueError: If there is no such preset, folder or repository, or another class
                generates with it.
        """
        source = open_source(preset, prediction_type=prediction_type, weights=weights)
        model = cls.from_source(source, img_height, img_width, jit_compile, dtype=dtype)
        model.preset = preset
        return model

    @classmethod
    def from_source(
        cls,
        source: Source,
        img_height: int | None = None,
        img_width: int | None = None,
        jit_compile: bool | str = "auto",
        *,
        dtype: Any = None,
    ) -> Self:
        """Make a model of an open source, see `weights.find.open_source`.

        Args:
            source: where its parts come from.
            img_height: int, or `None` for the source's own.
            img_width: int, or `None` for the source's own.
            jit_compile: see the class.
            dtype: see the class.

        Returns:
            A model of this class.

        Raises:
            ValueError: If another class generates with such a network.
        """
        cls._check_architecture(source.architecture("diffusion_model"))
        size = img_height or source.height, img_width or source.width
        model = cls(*size, jit_compile, preset=source.name, dtype=dtype)
        model._source = source
        return model

    @classmethod
    def from_parts(
        cls,
        models: dict[str, Any],
        schedule: Schedule,
        size: tuple[int, int],
        *,
        tokenizer: SimpleTokenizer | Mapping[str, SimpleTokenizer] | None = None,
        sampling: tuple[str, Spacing] | None = None,
        jit_compile: bool | str = "auto",
    ) -> Self:
        """Make a model of networks in memory, such as new ones to be trained.

        Args:
            models: dictionary of networks, by their names in `weights.variables.MODELS`.
            schedule: `Schedule`.
            size: default (height, width) of an image in pixels.
            tokenizer: `SimpleTokenizer`, where there is a text encoder; a dictionary of one for
                the name of each, where there are several.
            sampling: the default sampler's name and the default spacing; `None` for ddim, whose
                timesteps are trailing if the schedule ends in pure noise, else leading.
            jit_compile: see the class.

        Returns:
            A model of this class.

        Raises:
            ValueError: If another class generates with such a network.
        """
        source = PartsSource(models, schedule, size, tokenizer, sampling)
        policy = source.model("diffusion_model", None).dtype_policy
        return cls.from_source(source, *size, jit_compile, dtype=policy)

    @property
    def source(self) -> Source:
        """The source of the parts; a preset is looked up when it is first needed."""
        if self._source is None:
            source = open_source(self.preset)
            self._check_architecture(source.architecture("diffusion_model"))
            self._source = source
        return self._source

    @property
    def schedule(self) -> Schedule:
        """The schedule that the diffusion model was trained with."""
        if self._schedule is None:
            self._schedule = self.source.schedule()
        return self._schedule

    @property
    def default_sampling(self) -> tuple[str, Spacing]:
        """The checkpoint's own sampler, by name, and its spacing."""
        return self.source.sampling()

    @classmethod
    def components(cls) -> dict[str, Component]:
        """Return the networks of a model of this class, by their names in its source."""
        attributes = (value for base in reversed(cls.__mro__) for value in vars(base).values())
        return {value.part: value for value in attributes if isinstance(value, Component)}

    def architecture(self, part: str) -> Any:
        """Return the architecture record of a network, which need not be loaded.

        Args:
            part: its name in the source, such as `"diffusion_model"`.
        """
        model = self.components()[part].loaded(self)
        return self.source.architecture(part) if model is None else model.architecture

    @abc.abstractmethod
    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return the shape of what the network denoises for an image.

        Args:
            height: int, in pixels, or `None` for `img_height`.
            width: int, in pixels, or `None` for `img_width`.

        Raises:
            ValueError: If the model cannot generate images of that size.
        """

    @abc.abstractmethod
    def decode(self, latents: Any) -> np.ndarray:
        """Turn denoised latents into images, (batch, height, width, 3) uint8."""

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Estimate the images of latents that are not denoised to the end.

        Args:
            latents: (batch, height, width, channels) float32, such as `Step.denoised`.

        Returns:
            (batch, height, width, 3) uint8, smaller than the image where that is quicker.
        """
        return self.decode(latents)

    def denoise(
        self,
        start: Start,
        conditions: Conditions,
        negatives: Conditions | None,
        settings: Settings,
        streams: Sequence[NoiseStream],
    ) -> np.ndarray:
        """Run the sampler from a start to latents.

        Args:
            start: `Start`.
            conditions: dictionary of the network's further inputs for each image, such as
                `context` or `label`.
            negatives: the same of what guidance moves away from; `None` without guidance.
            settings: `Settings`.
            streams: a noise stream for each image.

        Returns:
            (batch, height, width, channels) float32.

        Raises:
            ValueError: For a setting out of range, or if the latents are not finite.
        """
        run = self.make_run(start, conditions, negatives, settings, streams)
        network = self._load_for(run)
        watcher = settings.watcher()
        return sampling_run.sample(
            self._denoise_program, network, run, watcher, settings.resume, self.preview
        )

    def make_run(
        self,
        start: Start,
        conditions: Conditions,
        negatives: Conditions | None,
        settings: Settings,
        streams: Sequence[NoiseStream],
    ) -> Run:
        """Return the `Run` of `denoise`; see there for the arguments."""
        count = len(streams)
        tables = settings.tables(count, self.schedule, self.default_sampling, start.strength)
        guidance = settings.guidance or Guidance()
        guided: dict[str, np.ndarray] = {}
        if negatives is not None:
            guided = {
                name: np.concatenate([negatives[name], value]) for name, value in conditions.items()
            }
            guided["guidance_rescale"] = np.full(count, guidance.rescale, np.float32)
        return Run(
            tables,
            start.latents(tables),
            {**conditions, **start.inputs},
            {**guided, **start.inputs},
            settings.scales(count),
            guidance,
            streams,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write all parts as a folder in diffusers' layout.

        diffusers loads a folder of Stable Diffusion as a pipeline, and each part of other models.

        Args:
            path: path of the folder; it must not exist, or be empty.

        Raises:
            ValueError: If the folder exists already.
        """
        save(
            path,
            {name: component.load(self) for name, component in self.components().items()},
            self.schedule,
            sampling=self.default_sampling,
            size=(self.img_height, self.img_width),
            tokenizers=self._tokenizers(),
            whole=True,
        )

    def _tokenizers(self) -> dict[str, SimpleTokenizer]:
        """Return the tokenizers by the names of the text encoders they feed."""
        return {}

    def _load_for(self, run: Run) -> Any:
        """Load the network while its program and the decoder's are made ready."""
        self._prepare_decoding(run.latents.shape)
        component = self.components()["diffusion_model"]
        program = self._denoise_program
        return component.load(self, lambda model: sampling_run.prepare(program, model, run))

    def _prepare_decoding(self, shape: tuple[int, ...]) -> None:
        """Begin what decoding latents of a shape (batch, height, width, channels) needs."""

    @classmethod
    @abc.abstractmethod
    def _check_architecture(cls, architecture: DiffusionArchitecture) -> None:
        """Refuse a network that another class generates with.

        Raises:
            ValueError: If its inputs are not those that this class gives it.
        """
