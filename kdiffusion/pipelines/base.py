"""The parts of a latent diffusion model and what each does alone: encode text, encode, decode."""

from __future__ import annotations

import abc
import os
import warnings
from collections.abc import Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from kdiffusion import images
from kdiffusion.models.architectures import DiffusionArchitecture
from kdiffusion.pipelines.tiling import MAX_CELLS, decode_in_tiles
from kdiffusion.runtime import backend, kernel_files, programs
from kdiffusion.sampling import run
from kdiffusion.sampling.noise import NoiseStream, noise_stream
from kdiffusion.sampling.run import Program
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights.sources import Built, PartsSource, Source, ignore, open_source
from kdiffusion.weights.variables import rebuilt


class Component:
    """An attribute that holds a network: loaded at first use, replaced by assignment.

    The network itself lives in the private attribute of the same name, as in KerasCV.

    Args:
        kind: str, a name in `weights.MODELS`.
        doc: str, what it is.
    """

    def __init__(self, kind: str, doc: str):
        self.kind = kind
        self.__doc__ = doc

    def __set_name__(self, owner, name):
        self.attribute = f"_{name}"

    def __get__(self, instance, owner=None):
        return self if instance is None else self.load(instance)

    def __set__(self, instance, model):
        setattr(instance, self.attribute, model)

    def load(self, instance: Components, built: Built = ignore) -> Any:
        """The network; if it has to be loaded, `built` is called before its weights are read."""
        if getattr(instance, self.attribute) is None:
            model = instance._source.model(self.kind, instance.dtype_policy, built)
            setattr(instance, self.attribute, model)
        return getattr(instance, self.attribute)


class Components(abc.ABC):
    """What every model has: a diffusion model and its schedule, loaded lazily.

    Args:
        img_height: int, default height of a picture in pixels.
        img_width: int, default width of a picture in pixels.
        jit_compile: `True`, `False` or `"auto"`, whether to compile with XLA. Automatic means
            everywhere but on TensorFlow's CPU, where a plain graph is faster.
        preset: where the parts come from, see `sources.open_source`.
        dtype: Keras dtype policy of all networks, or `None` for the global one. `"bfloat16"` and
            `"float16"` also store the weights in half.

    Raises:
        ValueError: If a size is out of range or the backend cannot compute in `dtype`.
    """

    # Of the default size; what the network itself needs is known after loading.
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
        kernel_files.folder()  # TensorFlow is told of it before it does anything
        backend.reserve_memory()
        self.img_height, self.img_width = images.check_size(img_height, img_width, self._multiple)
        self.preset = preset
        self.dtype_policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        backend.check_kernels(self.dtype_policy.compute_dtype)
        self.jit_compile = programs.use_jit(jit_compile)
        self._opened_source: Source | None = None
        self._diffusion_model: Any = None
        self._schedule: Schedule | None = None
        self._denoise_program = Program(run.denoise, self.jit_compile)

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
        """Make a model that draws at the size its checkpoint was trained for.

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
            ValueError: If there is no such preset, folder or repository, or another class draws
                with it.
        """
        source = open_source(preset, prediction_type=prediction_type, weights=weights)
        cls._check_architecture(source.architecture("diffusion_model"))
        height, width = img_height or source.height, img_width or source.width
        model = cls(height, width, jit_compile, preset=preset, dtype=dtype)
        model._opened_source = source
        return model

    @classmethod
    def from_parts(
        cls,
        models: dict[str, Any],
        schedule: Schedule,
        size: tuple[int, int],
        *,
        tokenizer: SimpleTokenizer | None = None,
        sampling: tuple[str, Spacing] | None = None,
        jit_compile: bool | str = "auto",
    ) -> Self:
        """Make a model of networks that are in memory already, such as new ones to be trained.

        Args:
            models: dictionary of networks, by their names in `weights.MODELS`.
            schedule: `Schedule`.
            size: default (height, width) of a picture in pixels.
            tokenizer: `SimpleTokenizer`, where there is a text encoder.
            sampling: the default sampler's name and the default spacing; `None` for ddim, whose
                timesteps are trailing if the schedule ends in pure noise, else leading.
            jit_compile: see the class.

        Returns:
            A model of this class.

        Raises:
            ValueError: If another class draws with such a network.
        """
        source = PartsSource(models, schedule, size, tokenizer, sampling)
        cls._check_architecture(source.architecture("diffusion_model"))
        policy = source.model("diffusion_model", None).dtype_policy
        model = cls(*size, jit_compile, preset=source.name, dtype=policy)
        model._opened_source = source
        return model

    @property
    def _source(self) -> Source:
        if self._opened_source is None:
            source = open_source(self.preset)
            self._check_architecture(source.architecture("diffusion_model"))
            self._opened_source = source
        return self._opened_source

    @classmethod
    @abc.abstractmethod
    def _check_architecture(cls, architecture: DiffusionArchitecture) -> None:
        """Refuse a network that another class draws with.

        Raises:
            ValueError: If its inputs are not those that this class gives it.
        """

    def _load(self, name: str, built: Built) -> Any:
        """The attribute `name`, see `Component.load`."""
        return getattr(type(self), name).load(self, built)

    def _architecture(self, name: str) -> Any:
        """The architecture record of the attribute `name`, which is not loaded for it."""
        model = getattr(self, f"_{name}")
        if model is None:
            return self._source.architecture(getattr(type(self), name).kind)
        return model.architecture

    def _prepare_decoding(self, shape: tuple[int, ...]) -> None:
        """What can be done for the decoding of (batch, height, width, channels) beforehand."""

    @property
    def schedule(self) -> Schedule:
        """The schedule that the diffusion model was trained with."""
        if self._schedule is None:
            self._schedule = self._source.schedule()
        return self._schedule


class LatentComponents(Components):
    """An autoencoder too: what is drawn are latents."""

    image_encoder = Component("image_encoder", "Pictures to latents, see `ImageEncoder`.")
    decoder = Component("image_decoder", "Latents to pictures, see `ImageDecoder`.")

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._image_encoder: Any = None
        self._decoder: Any = None
        self._encode_image_program = Program(_encode_image, self.jit_compile)
        self._decode_program = Program(_decode, self.jit_compile)

    def encode_image(
        self,
        image: Any,
        height: int | None = None,
        width: int | None = None,
        *,
        seed: int | None = None,
    ) -> np.ndarray:
        """Encode pictures as latents.

        Args:
            image: a PIL image, the path of a file, an array, or a list of these, see
                `images.to_model`.
            height: int, in pixels, a multiple of 8; `None` for the picture's own.
            width: int, in pixels, a multiple of 8; `None` for the picture's own.
            seed: int, draws a sample of the latents' distribution; `None` gives its mean.

        Returns:
            (batch, height / 8, width / 8, 4) float32.

        Raises:
            ValueError: If something is no picture.
        """
        multiple = self.decoder.architecture.downsampling
        pictures = images.to_model(image, height, width, multiple)
        streams = None
        if seed is not None:
            streams = [noise_stream(seed + i) for i in range(len(pictures))]
        return self._encode_pictures(pictures, streams)

    def decode(self, latents: Any) -> np.ndarray:
        """Turn latents into pictures, one after the other; above a megapixel tile by tile.

        Args:
            latents: (batch, height, width, 4) float32, as the diffusion model makes them.

        Returns:
            (batch, 8 * height, 8 * width, 3) uint8.

        Raises:
            ValueError: If a picture is not finite, also after a half-precision decoder was tried
                once more in float32.
        """
        latents = np.asarray(latents, np.float32)
        pictures = [self._decode_picture(latents[i : i + 1]) for i in range(len(latents))]
        return images.to_uint8(np.concatenate(pictures))

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """The shape of the latents of a picture, by default of one of the default size."""
        codec = self.decoder.architecture
        height = self.img_height if height is None else height
        width = self.img_width if width is None else width
        height, width = images.check_size(height, width, codec.downsampling)
        return height // codec.downsampling, width // codec.downsampling, codec.latent_channels

    def _prepare_decoding(self, shape):
        if shape[1] * shape[2] <= MAX_CELLS:
            latents = ops.zeros((1, *shape[1:]), "float32")
            self._decode_program.prepare(self.decoder, latents)

    def _decode_picture(self, latents):
        def decode(part):
            return self._decode_one(self.decoder, part)

        if latents.shape[1] * latents.shape[2] <= MAX_CELLS:
            return decode(latents)
        return decode_in_tiles(decode, latents, self.decoder.architecture.downsampling)

    def _encode_pictures(self, pictures, streams: Sequence[NoiseStream] | None):
        """Latents of pictures in [-1, 1], one after the other; samples where there are streams."""
        latents = []
        for index in range(len(pictures)):
            picture = ops.convert_to_tensor(pictures[index : index + 1])
            distribution = self._encode_image_program(self.image_encoder, picture)
            latents.append(ops.convert_to_numpy(distribution["mean"]))
            if streams is not None:
                deviation = np.exp(0.5 * ops.convert_to_numpy(distribution["logvar"]))
                latents[-1] = latents[-1] + deviation * streams[index].draw(*deviation.shape[1:])
        return np.concatenate(latents)

    def _decode_one(self, decoder, latents):
        latents_in = ops.convert_to_tensor(latents)
        picture = ops.convert_to_numpy(self._decode_program(decoder, latents_in))
        if np.isfinite(picture).all():
            return picture
        if decoder.compute_dtype == "float32":
            raise ValueError(
                "The decoded picture is NaN or infinite. Check the latents and the weights of "
                "the decoder."
            )
        warnings.warn(
            f"The decoder's picture in {decoder.compute_dtype} is NaN or infinite; it is decoded "
            "again in float32.",
            stacklevel=4,
        )
        return self._decode_one(rebuilt(decoder, dtype="float32"), latents)


class TextComponents(LatentComponents):
    """A text encoder and its tokenizer too: what is drawn follows a text."""

    text_encoder = Component("text_encoder", "Tokens to text states, see `TextEncoder`.")

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._text_encoder: Any = None
        self._tokenizer: SimpleTokenizer | None = None
        self._encode_text_program = Program(_encode_text, self.jit_compile)

    @property
    def tokenizer(self) -> SimpleTokenizer:
        """Texts to tokens; may be replaced by assignment."""
        if self._tokenizer is None:
            self._tokenizer = self._source.tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        self._tokenizer = tokenizer

    def encode_text(self, prompt: str | Sequence[str]) -> np.ndarray:
        """Encode texts for `generate_image`.

        Args:
            prompt: str, or a list of n texts.

        Returns:
            (n, 77, width) float32; n is 1 for a single text.

        Raises:
            ValueError: If there is no text.
        """
        rows = self.tokenizer.rows([prompt] if isinstance(prompt, str) else prompt)
        if not len(rows):
            raise ValueError("`prompt` must be a text or a list of texts. Received: an empty list")
        tokens, program = ops.convert_to_tensor(rows, "int32"), self._encode_text_program
        encoder = self._load("text_encoder", lambda model: program.prepare(model, tokens))
        return ops.convert_to_numpy(program(encoder, tokens))


def _encode_text(model, tokens):
    return ops.cast(model(tokens)["context"], "float32")


def _encode_image(model, pictures):
    return model(pictures)


def _decode(model, latents):
    return ops.cast(model(latents), "float32")
