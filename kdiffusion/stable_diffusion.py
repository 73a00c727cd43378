"""Stable Diffusion: a sentence in, pictures out."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiffusion import backend, generation, weights
from kdiffusion.generation import Program, Step
from kdiffusion.images import check_size, to_uint8
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.noise import noise_stream
from kdiffusion.sampling.guidance import Guidance
from kdiffusion.sampling.levels import Spacing
from kdiffusion.sampling.samplers import SAMPLERS, Sampler, default_spacing, make_table
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.tokenizer import SimpleTokenizer


class _Component:
    """An attribute that holds a model: loaded at first use, replaced by assignment.

    The model itself lives in the private attribute of the same name, as in KerasCV.
    """

    def __init__(self, kind: str, doc: str):
        self.kind = kind
        self.__doc__ = doc

    def __set_name__(self, owner, name):
        self.attribute = f"_{name}"

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        if getattr(instance, self.attribute) is None:
            model = instance._source.model(self.kind, instance.dtype_policy)
            setattr(instance, self.attribute, model)
        return getattr(instance, self.attribute)

    def __set__(self, instance, model):
        setattr(instance, self.attribute, model)


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x, from the public checkpoints.

    Nothing is read or downloaded before it is needed. All settings of a picture are data: after
    the first picture of a size, prompts, seeds, samplers, steps and guidance scales change without
    a new compilation.

    Args:
        img_height: int, default height of a picture in pixels, a multiple of 8.
        img_width: int, default width of a picture in pixels, a multiple of 8.
        jit_compile: `True`, `False` or `"auto"`, whether to compile with XLA. Automatic means
            everywhere but for half types on TensorFlow's CPU, where a plain graph is faster.
        preset: a name in `kdiffusion.presets.PRESETS`, the path of a folder in diffusers' layout,
            or `"hf://organisation/repository"`.
        dtype: Keras dtype policy of all networks, or `None` for the global one. `"bfloat16"` and
            `"float16"` also store the weights in half.

    Raises:
        ValueError: If a size is not a multiple of 8 or the backend cannot compute in `dtype`.

    Example:

    ```python
    model = StableDiffusion(preset="stable-diffusion-v1-5")
    images = model.text_to_image("a watercolour of a lighthouse", batch_size=2, seed=42)
    images.shape  # (2, 512, 512, 3), uint8
    ```
    """

    text_encoder = _Component("text_encoder", "Tokens to text states, see `TextEncoder`.")
    image_encoder = _Component("image_encoder", "Pictures to latents, see `ImageEncoder`.")
    diffusion_model = _Component("diffusion_model", "The U-Net, see `DiffusionModel`.")
    decoder = _Component("image_decoder", "Latents to pictures, see `ImageDecoder`.")

    def __init__(
        self,
        img_height: int = 512,
        img_width: int = 512,
        jit_compile: bool | str = "auto",
        *,
        preset: str | os.PathLike = "stable-diffusion-v1-4",
        dtype: Any = None,
    ):
        # Every public autoencoder halves three times; the exact factor is known after loading.
        self.img_height, self.img_width = check_size(img_height, img_width, 8)
        self.preset = preset
        self.dtype_policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        backend.check_dtype(self.dtype_policy.compute_dtype)
        self.jit_compile = backend.use_jit(jit_compile, self.dtype_policy.compute_dtype)
        self._opened_source: weights.Source | None = None
        self._text_encoder: Any = None
        self._image_encoder: Any = None
        self._diffusion_model: Any = None
        self._decoder: Any = None
        self._tokenizer: SimpleTokenizer | None = None
        self._schedule: Schedule | None = None
        self._encode_text_program = Program(_encode_text, self.jit_compile)
        self._denoise_program = Program(generation.denoise, self.jit_compile)
        self._encode_image_program = Program(_encode_image, self.jit_compile)
        self._decode_program = Program(_decode, self.jit_compile)

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike,
        img_height: int | None = None,
        img_width: int | None = None,
        jit_compile: bool | str = "auto",
        *,
        dtype: Any = None,
    ) -> StableDiffusion:
        """Make a model that draws at the size its checkpoint was trained for.

        Args:
            preset: see the class. It is looked up, and downloaded if need be, at once.
            img_height: int, or `None` for the checkpoint's own.
            img_width: int, or `None` for the checkpoint's own.
            jit_compile: see the class.
            dtype: see the class.

        Returns:
            A `StableDiffusion`.

        Raises:
            ValueError: If there is no such preset, folder or repository.
        """
        source = weights.open_source(preset)
        model = cls(
            img_height or source.height,
            img_width or source.width,
            jit_compile,
            preset=preset,
            dtype=dtype,
        )
        model._opened_source = source
        return model

    @property
    def _source(self) -> weights.Source:
        if self._opened_source is None:
            self._opened_source = weights.open_source(self.preset)
        return self._opened_source

    @property
    def tokenizer(self) -> SimpleTokenizer:
        """The tokenizer; may be replaced by assignment."""
        if self._tokenizer is None:
            self._tokenizer = self._source.tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        self._tokenizer = tokenizer

    @property
    def schedule(self) -> Schedule:
        """The schedule that the diffusion model was trained with."""
        if self._schedule is None:
            self._schedule = self._source.schedule()
        return self._schedule

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_steps: int = 50,
        unconditional_guidance_scale: float = 7.5,
        seed: int | Sequence[int] | None = None,
        *,
        sampler: str | Sampler | None = None,
        spacing: str | Spacing | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: Guidance | None = None,
        callback: Callable[[Step], Any] | None = None,
        verbose: int = 1,
        noise: str = "cpu",
    ) -> np.ndarray:
        """Draw pictures of a text.

        Args:
            prompt: str, or a list of n texts.
            negative_prompt: what to move away from; str, one for each prompt, or `None`.
            batch_size: int, pictures of each prompt. The result holds n * batch_size pictures,
                those of the first prompt first.
            num_steps: int, steps of the sampler.
            unconditional_guidance_scale: float, how strongly the text is followed; at most 1 is
                off and takes half the time.
            seed: int; picture i of the result is the one that `seed + i` gives alone. A list
                holds one seed for each picture. `None` draws one at random.
            sampler: name, `Sampler`, or `None` for the checkpoint's own.
            spacing: `"leading"`, `"trailing"`, `"linspace"`, `"karras"`, or a pair such as
                `"leading+karras"`; `None` for the checkpoint's own.
            height: int, in pixels, a multiple of 8; `None` for `img_height`.
            width: int, in pixels, a multiple of 8; `None` for `img_width`.
            guidance: `Guidance`, or `None` for plain classifier-free guidance.
            callback: called with a `Step` after each step; `False` as an answer stops there and
                decodes the picture as it is.
            verbose: 0 for silence, 1 for a progress bar.
            noise: `"cpu"`, the noise that PyTorch draws on a CPU (diffusers, ComfyUI), or
                `"cuda"`, that which it draws on a GPU (AUTOMATIC1111).

        Returns:
            (n * batch_size, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, or if the result is not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check_positive("batch_size", batch_size)
        negatives = negative_prompt
        if negatives is not None and not isinstance(negatives, str):
            negatives = _repeat(_one_each("negative_prompt", list(negatives), len(prompts)), batch_size)
        return self._generate(
            np.repeat(self.encode_text(prompts), batch_size, axis=0),
            negatives,
            num_steps=num_steps,
            unconditional_guidance_scale=unconditional_guidance_scale,
            seed=seed,
            sampler=sampler,
            spacing=spacing,
            height=height,
            width=width,
            guidance=guidance,
            callback=callback,
            verbose=verbose,
            noise=noise,
        )

    def generate_image(
        self,
        encoded_text: Any,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_steps: int = 50,
        unconditional_guidance_scale: float = 7.5,
        diffusion_noise: Any = None,
        seed: int | Sequence[int] | None = None,
        *,
        sampler: str | Sampler | None = None,
        spacing: str | Spacing | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: Guidance | None = None,
        callback: Callable[[Step], Any] | None = None,
        verbose: int = 1,
        noise: str = "cpu",
    ) -> np.ndarray:
        """Draw pictures of encoded text, for example of a mixture of two prompts.

        Args:
            encoded_text: (tokens, width) or (1, tokens, width), repeated `batch_size` times; or
                (batch_size, tokens, width), one for each picture. What `encode_text` returns.
            negative_prompt: str, one for each picture, or `None`.
            batch_size: int, how many pictures; 1 also stands for as many as there are texts.
            num_steps: see `text_to_image`.
            unconditional_guidance_scale: see `text_to_image`.
            diffusion_noise: unit noise to start from, (height / 8, width / 8, 4) for all pictures
                or with a leading batch axis; in place of `seed`.
            seed: see `text_to_image`.
            sampler, spacing, height, width, guidance, callback, verbose, noise: see
                `text_to_image`.

        Returns:
            (pictures, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, if both `seed` and `diffusion_noise` are given,
                or if the result is not finite.
        """
        _check_positive("batch_size", batch_size)
        context = np.asarray(encoded_text, np.float32)
        if context.ndim == 2:
            context = context[None]
        if context.ndim != 3 or len(context) not in (1, batch_size) and batch_size != 1:
            raise ValueError(
                "`encoded_text` must have the shape (tokens, width), (1, tokens, width) or "
                f"(batch_size, tokens, width). Received: shape {np.shape(encoded_text)} with "
                f"batch_size={batch_size}"
            )
        if len(context) == 1:
            context = np.repeat(context, batch_size, axis=0)
        return self._generate(
            context,
            negative_prompt,
            num_steps=num_steps,
            unconditional_guidance_scale=unconditional_guidance_scale,
            diffusion_noise=diffusion_noise,
            seed=seed,
            sampler=sampler,
            spacing=spacing,
            height=height,
            width=width,
            guidance=guidance,
            callback=callback,
            verbose=verbose,
            noise=noise,
        )

    def encode_text(self, prompt: str | Sequence[str]) -> np.ndarray:
        """Encode texts for `generate_image`.

        Args:
            prompt: str, or a list of n texts.

        Returns:
            (n, 77, width) float32; n is 1 for a single text.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self.tokenizer.rows(prompts)
        context = self._encode_text_program(
            self.text_encoder, ops.convert_to_tensor(tokens, "int32")
        )
        return ops.convert_to_numpy(context)

    def decode(self, latents: Any) -> np.ndarray:
        """Turn latents into pictures, one after the other.

        Args:
            latents: (batch, height, width, 4) float32, as the diffusion model makes them.

        Returns:
            (batch, 8 * height, 8 * width, 3) uint8.

        Raises:
            ValueError: If a picture is not finite, also after a half-precision decoder was tried
                once more in float32.
        """
        latents = np.asarray(latents, np.float32)
        pictures = [self._decode_one(self.decoder, latents[i : i + 1]) for i in range(len(latents))]
        return to_uint8(np.concatenate(pictures))

    def save(self, path: str | os.PathLike) -> None:
        """Write all parts as a folder in diffusers' layout.

        Args:
            path: path of the folder, made if it is missing.
        """
        models = {
            "text_encoder": self.text_encoder,
            "image_encoder": self.image_encoder,
            "image_decoder": self.decoder,
            "diffusion_model": self.diffusion_model,
        }
        weights.save(
            path,
            models,
            self.tokenizer,
            self.schedule,
            self._source.sampling(),
            (self.img_height, self.img_width),
        )

    def _generate(
        self,
        context,
        negative_prompt,
        *,
        num_steps,
        unconditional_guidance_scale,
        seed,
        sampler,
        spacing,
        height,
        width,
        guidance,
        callback,
        verbose,
        noise,
        diffusion_noise=None,
    ):
        """What `text_to_image` and `generate_image` share; one context for each picture."""
        batch = len(context)
        shape = self._latent_shape(height, width)
        table = self._table(sampler, spacing, num_steps)
        streams = [noise_stream(s, noise) for s in _seeds(seed, batch, diffusion_noise)]
        start = _start_noise(diffusion_noise, streams, (batch, *shape))
        inputs = {"context": context}
        if unconditional_guidance_scale > 1.0:
            inputs = self._guided(context, negative_prompt, unconditional_guidance_scale, guidance)
        conditioning = self._conditioning(batch, shape)
        if conditioning is not None:
            inputs["conditioning"] = conditioning
        latents = generation.sample(
            self._denoise_program,
            self.diffusion_model,
            [table] * batch,
            np.float32(table.start_scale) * start,
            inputs,
            streams,
            _watcher(callback, verbose),
        )
        return self.decode(latents)

    def _latent_shape(self, height, width):
        codec = self._codec
        height, width = check_size(
            height or self.img_height, width or self.img_width, codec.downsampling
        )
        return (
            height // codec.downsampling,
            width // codec.downsampling,
            codec.latent_channels,
        )

    @property
    def _codec(self):
        return self.decoder.architecture

    def _table(self, sampler, spacing, num_steps):
        default_sampler, default = self._source.sampling()
        if sampler is None:
            sampler = default_sampler
            if sampler not in SAMPLERS:
                warnings.warn(
                    f"The checkpoint's scheduler names the sampler {sampler!r}, which is not "
                    "available; 'ddim' draws in its place.",
                    stacklevel=4,
                )
                sampler = "ddim"
        if spacing is None:
            spacing = default_spacing(sampler, default)
        return make_table(sampler, self.schedule, num_steps, Spacing.parse(spacing, default))

    def _guided(self, context, negative_prompt, scale, guidance):
        """The network's inputs for both halves of a guided batch."""
        batch = len(context)
        if negative_prompt is None or isinstance(negative_prompt, str):
            negative = np.repeat(self.encode_text(negative_prompt or ""), batch, axis=0)
        else:
            negative = self.encode_text(
                _one_each("negative_prompt", list(negative_prompt), batch)
            )
        return {
            "context": np.concatenate([negative, context]),
            "guidance_scale": np.full(batch, scale, np.float32),
            "guidance_rescale": np.full(batch, (guidance or Guidance()).rescale, np.float32),
        }

    def _conditioning(self, batch, shape):
        """What an inpainting network wants to know where everything is to be painted."""
        architecture = self.diffusion_model.architecture
        if architecture.in_channels == architecture.out_channels:
            return None
        height, width, _ = shape
        downsampling = self._codec.downsampling
        grey = np.zeros((1, height * downsampling, width * downsampling, 3), np.float32)
        masked = self._encode_image_program(self.image_encoder, ops.convert_to_tensor(grey))
        masked = ops.convert_to_numpy(masked["mean"])
        mask = np.ones((1, height, width, 1), np.float32)
        return np.repeat(np.concatenate([mask, masked], axis=-1), batch, axis=0)

    def _decode_one(self, decoder, latents):
        picture = ops.convert_to_numpy(
            self._decode_program(decoder, ops.convert_to_tensor(latents))
        )
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
        exact = type(decoder)(decoder.architecture, initialize=False, dtype="float32")
        weights.assign(exact, weights.arrays_of(decoder).items())
        return self._decode_one(exact, latents)


def _encode_text(model, tokens):
    return ops.cast(model(tokens)["context"], "float32")


def _encode_image(model, pictures):
    return model(pictures)


def _decode(model, latents):
    return ops.cast(model(latents), "float32")


def _seeds(seed, batch, diffusion_noise):
    if seed is not None and diffusion_noise is not None:
        raise ValueError(
            "`diffusion_noise` and `seed` both say where to start. Received: both. Give one."
        )
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, (list, tuple, np.ndarray)):
        return _one_each("seed", [int(s) for s in seed], batch)
    return [seed + i for i in range(batch)]


def _start_noise(diffusion_noise, streams, shape):
    if diffusion_noise is None:
        return np.stack([stream.draw(*shape[1:]) for stream in streams])
    start = np.asarray(diffusion_noise, np.float32)
    if start.shape not in (shape, shape[1:], (1, *shape[1:])):
        raise ValueError(
            f"`diffusion_noise` must have the shape {shape[1:]} or {shape}. "
            f"Received: shape {start.shape}"
        )
    return np.broadcast_to(start, shape)


def _watcher(callback, verbose):
    """One function for the progress bar and the callback, or `None` if nobody watches."""
    if not verbose:
        return callback
    bar: list[Any] = []

    def watch(step):
        if not bar:
            bar.append(keras.utils.Progbar(step.num_steps, verbose=verbose))
        bar[0].update(step.step)
        return callback(step) if callback else None

    return watch


def _one_each(name, values, count):
    if len(values) != count:
        raise ValueError(
            f"`{name}` must be one value or a list of {count}. Received: {len(values)} values"
        )
    return values


def _repeat(values, times):
    return [value for value in values for _ in range(times)]


def _check_positive(name, value):
    if value != int(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive whole number. Received: {name}={value}")
