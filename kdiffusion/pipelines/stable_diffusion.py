"""Stable Diffusion: a sentence in, pictures out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdiffusion import images
from kdiffusion.models.architectures import DiffusionArchitecture
from kdiffusion.pipelines.base import TextComponents
from kdiffusion.pipelines.drawing import denoised
from kdiffusion.pipelines.settings import Settings, check_count, one_each
from kdiffusion.pipelines.starts import (
    Start,
    conditioning_of,
    image_start,
    inpainting_start,
    noise_start,
)
from kdiffusion.sampling.guidance import Guidance
from kdiffusion.sampling.run import State, Step
from kdiffusion.sampling.samplers import Sampler
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.weights.variables import save


class StableDiffusion(TextComponents):
    """Stable Diffusion 1.x and 2.x, from the public checkpoints.

    Nothing is read or downloaded before it is needed. All settings of a picture are data: after
    the first picture of a size, prompts, seeds, samplers, steps and guidance scales change without
    a new compilation.

    Args:
        img_height: int, default height of a picture in pixels, a multiple of 8.
        img_width: int, default width of a picture in pixels, a multiple of 8.
        jit_compile: `True`, `False` or `"auto"`, whether to compile with XLA. Automatic means
            everywhere but on TensorFlow's CPU, where a plain graph is faster.
        preset: a name in `weights.presets.PRESETS`, the path of a folder in diffusers'
            layout or of a single file, or `"hf://organisation/repository"`.
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

    # The autoencoders of all public checkpoints halve three times, that of `shapes` twice.
    _multiple = 8

    def __init__(
        self,
        img_height: int = 512,
        img_width: int = 512,
        jit_compile: bool | str = "auto",
        *,
        preset: str | os.PathLike = "stable-diffusion-v1-4",
        dtype: Any = None,
    ):
        super().__init__(img_height, img_width, jit_compile, preset=preset, dtype=dtype)

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_steps: int | Sequence[int] = 50,
        unconditional_guidance_scale: float | Sequence[float] = 7.5,
        seed: int | Sequence[int] | None = None,
        *,
        sampler: str | Sampler | Sequence[str | Sampler] | None = None,
        spacing: str | Spacing | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: Guidance | None = None,
        callback: Callable[[Step], Any] | None = None,
        verbose: int = 1,
        noise: str = "cpu",
        resume: State | None = None,
    ) -> np.ndarray:
        """Draw pictures of a text.

        Prompts, negative prompts, seeds, steps, samplers and scales may be lists: n prompts make
        n * batch_size images, those of the first prompt first; every other list has one value for
        each image (a list of negative prompts: one for each prompt).

        Args:
            prompt: str, or a list of n texts.
            negative_prompt: what to move away from; str, a list, or `None`.
            batch_size: int, pictures of each prompt.
            num_steps: int, steps of the sampler.
            unconditional_guidance_scale: float, how strongly the text is followed; at most 1 is
                off and takes half the time.
            seed: int; image i of the result is the one that `seed + i` gives alone. `None` draws
                one at random.
            sampler: name in `SAMPLERS`, `Sampler`, or `None` for the checkpoint's own.
            spacing: `"leading"`, `"trailing"`, `"linspace"`, `"karras"`, `"exponential"`,
                `"beta"`, or a pair such as `"leading+karras"`; `None` for the checkpoint's own.
            height: int, in pixels, a multiple of 8; `None` for `img_height`.
            width: int, in pixels, a multiple of 8; `None` for `img_width`.
            guidance: `Guidance`, or `None` for plain classifier-free guidance.
            callback: called with a `Step` after each step; `False` as an answer stops there and
                decodes the picture as it is.
            verbose: 0 for silence, 1 for a progress bar.
            noise: `"cpu"`, the noise that PyTorch draws on a CPU (diffusers, ComfyUI), or
                `"cuda"`, that which it draws on a GPU (AUTOMATIC1111).
            resume: `Step.state` of an interrupted call with the same settings; the result is the
                one that the uninterrupted call would have given.

        Returns:
            (n * batch_size, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, or if the result is not finite.

        Example:

        ```python
        images = model.text_to_image("a lighthouse", num_steps=20, sampler="dpmpp_2m", seed=42)
        ```
        """
        context, negative = self._contexts(prompt, negative_prompt, batch_size)
        settings = Settings(
            num_steps, unconditional_guidance_scale, seed, sampler, spacing,
            guidance, callback, verbose, noise, resume,
        )  # fmt: skip
        streams = settings.streams(len(context))
        start = noise_start(streams, self._latent_shape(height, width))
        return self._draw(context, negative, settings, streams, start)

    def image_to_image(
        self,
        image: Any,
        prompt: str | Sequence[str],
        strength: float = 0.8,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_steps: int | Sequence[int] = 50,
        unconditional_guidance_scale: float | Sequence[float] = 7.5,
        seed: int | Sequence[int] | None = None,
        *,
        sampler: str | Sampler | Sequence[str | Sampler] | None = None,
        spacing: str | Spacing | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: Guidance | None = None,
        callback: Callable[[Step], Any] | None = None,
        verbose: int = 1,
        noise: str = "cpu",
        resume: State | None = None,
    ) -> np.ndarray:
        """Draw pictures of a text that start from a given picture.

        Args:
            image: a PIL image, the path of a file, an array, or a list of one for each image of
                the result, see `images.to_model`.
            prompt: str, or a list of n texts.
            strength: float in (0, 1], the share of the noise range that is run: 0.3 changes
                little, 0.8 much.
            height: int, in pixels, a multiple of 8; `None` for the picture's own, rounded down.
            width: int, in pixels, a multiple of 8; `None` for the picture's own, rounded down.
            negative_prompt, batch_size, num_steps, unconditional_guidance_scale, seed, sampler,
                spacing, guidance, callback, verbose, noise, resume: see `text_to_image`.

        Returns:
            (n * batch_size, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, a picture that cannot be read, or if the
                result is not finite.

        Example:

        ```python
        model.image_to_image("sketch.png", "an oil painting of a harbour", strength=0.6)
        ```
        """
        context, negative = self._contexts(prompt, negative_prompt, batch_size)
        settings = Settings(
            num_steps, unconditional_guidance_scale, seed, sampler, spacing,
            guidance, callback, verbose, noise, resume,
        )  # fmt: skip
        streams = settings.streams(len(context))
        pictures = self._pictures(image, height, width, len(context))
        start = image_start(self, pictures, strength, streams)
        return self._draw(context, negative, settings, streams, start)

    def inpaint(
        self,
        image: Any,
        mask: Any,
        prompt: str | Sequence[str],
        strength: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_steps: int | Sequence[int] = 50,
        unconditional_guidance_scale: float | Sequence[float] = 7.5,
        seed: int | Sequence[int] | None = None,
        *,
        sampler: str | Sampler | Sequence[str | Sampler] | None = None,
        spacing: str | Spacing | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: Guidance | None = None,
        callback: Callable[[Step], Any] | None = None,
        verbose: int = 1,
        noise: str = "cpu",
        resume: State | None = None,
    ) -> np.ndarray:
        """Repaint a part of a picture.

        An inpainting checkpoint is told the mask and what is around it; any other is kept to the
        picture outside the mask after each step.

        Args:
            image: a PIL image, the path of a file, an array, or a list of one for each image of
                the result, see `images.to_model`.
            mask: likewise, 1 or white where the picture is repainted, see `images.to_mask`.
            prompt: str, or a list of n texts.
            strength: float in (0, 1]; 1 forgets what was under the mask.
            height: int, in pixels, a multiple of 8; `None` for the picture's own, rounded down.
            width: int, in pixels, a multiple of 8; `None` for the picture's own, rounded down.
            negative_prompt, batch_size, num_steps, unconditional_guidance_scale, seed, sampler,
                spacing, guidance, callback, verbose, noise, resume: see `text_to_image`.

        Returns:
            (n * batch_size, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, a picture that cannot be read, or if the
                result is not finite.

        Example:

        ```python
        image, mask = images.pad_for_outpainting("portrait.png", left=128, right=128)
        model.inpaint(image, mask, "a portrait in a garden")
        ```
        """
        context, negative = self._contexts(prompt, negative_prompt, batch_size)
        settings = Settings(
            num_steps, unconditional_guidance_scale, seed, sampler, spacing,
            guidance, callback, verbose, noise, resume,
        )  # fmt: skip
        streams = settings.streams(len(context))
        pictures = self._pictures(image, height, width, len(context))
        rows, columns = pictures.shape[1:3]
        masks = images.to_mask(mask, rows, columns, len(context))
        start = inpainting_start(self, pictures, masks, strength, streams)
        return self._draw(context, negative, settings, streams, start)

    def generate_image(
        self,
        encoded_text: Any,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_steps: int | Sequence[int] = 50,
        unconditional_guidance_scale: float | Sequence[float] = 7.5,
        diffusion_noise: Any = None,
        seed: int | Sequence[int] | None = None,
        *,
        sampler: str | Sampler | Sequence[str | Sampler] | None = None,
        spacing: str | Spacing | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: Guidance | None = None,
        callback: Callable[[Step], Any] | None = None,
        verbose: int = 1,
        noise: str = "cpu",
        resume: State | None = None,
    ) -> np.ndarray:
        """Draw pictures of encoded text, for example of a mixture of two prompts.

        Args:
            encoded_text: (tokens, width) or (1, tokens, width), repeated `batch_size` times; or
                (batch_size, tokens, width), one for each image. What `encode_text` returns.
            negative_prompt: str, a list of one for each image, or `None`.
            batch_size: int, how many images; 1 also stands for as many as there are texts.
            diffusion_noise: unit noise to start from, (height / 8, width / 8, 4) for all images
                or with a leading batch axis; in place of `seed`.
            num_steps, unconditional_guidance_scale, seed, sampler, spacing, height, width,
                guidance, callback, verbose, noise, resume: see `text_to_image`.

        Returns:
            (images, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, if both `seed` and `diffusion_noise` are given,
                or if the result is not finite.

        Example:

        ```python
        cat, dog = model.encode_text("a cat"), model.encode_text("a dog")
        model.generate_image((cat + dog) / 2, seed=42)
        ```
        """
        context = self._check_context(encoded_text, check_count("batch_size", batch_size))
        settings = Settings(
            num_steps, unconditional_guidance_scale, seed, sampler, spacing,
            guidance, callback, verbose, noise, resume,
        )  # fmt: skip
        streams = settings.streams(len(context))
        shape = self._latent_shape(height, width)
        start = noise_start(streams, shape, diffusion_noise, seed)
        return self._draw(context, negative_prompt, settings, streams, start)

    def save(self, path: str | os.PathLike) -> None:
        """Write all parts as a folder in diffusers' layout.

        Args:
            path: path of the folder; it must not exist, or be empty.

        Raises:
            ValueError: If the folder exists already.
        """
        models = {
            "text_encoder": self.text_encoder,
            "image_encoder": self.image_encoder,
            "image_decoder": self.decoder,
            "diffusion_model": self.diffusion_model,
        }
        network = self.diffusion_model.architecture
        inpaints = network.in_channels > network.out_channels
        save(
            path,
            models,
            self.schedule,
            self._source.sampling(),
            (self.img_height, self.img_width),
            self.tokenizer,
            pipeline="StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline",
        )

    @classmethod
    def _check_architecture(cls, architecture: DiffusionArchitecture) -> None:
        if architecture.context_width is None or architecture.num_classes is not None:
            raise ValueError(
                "StableDiffusion draws with networks that are given a text and nothing else. "
                f"Received: a network with context_width={architecture.context_width}, "
                f"num_classes={architecture.num_classes}. Use LatentDiffusion or PixelDiffusion."
            )

    def _draw(self, context, negative, settings, streams, start: Start):
        """What all drawing methods share; one context and noise stream for each image."""

        def negatives():
            return {"context": self._encode_negative(negative, len(context))}

        start = start._replace(conditioning=conditioning_of(self, start))
        latents = denoised(self, {"context": context}, negatives, settings, streams, start)
        return self.decode(latents)

    def _contexts(self, prompt, negative_prompt, batch_size):
        """The context and the negative prompt of each image, prompt-major."""
        batch_size = check_count("batch_size", batch_size)
        context = self.encode_text(prompt)
        count = len(context) * batch_size
        if isinstance(negative_prompt, (list, tuple)):
            negative_prompt = one_each("negative_prompt", negative_prompt, len(context))
            negative_prompt = [text for text in negative_prompt for _ in range(batch_size)]
        return np.repeat(context, batch_size, axis=0)[:count], negative_prompt

    def _encode_negative(self, negative, count):
        if negative is None or isinstance(negative, str):
            return np.repeat(self.encode_text(negative or ""), count, axis=0)
        return self.encode_text(one_each("negative_prompt", negative, count))

    def _check_context(self, encoded_text, batch_size):
        context = np.asarray(encoded_text, np.float32)
        if context.ndim == 2:
            context = context[None]
        width = self._architecture("diffusion_model").context_width
        fits = context.ndim == 3 and context.shape[-1] == width
        if not fits or (len(context) != 1 and batch_size not in (1, len(context))):
            raise ValueError(
                f"`encoded_text` must have the shape (tokens, {width}), (1, tokens, {width}) or "
                f"(batch_size, tokens, {width}). Received: shape {np.shape(encoded_text)} with "
                f"batch_size={batch_size}"
            )
        return np.repeat(context, batch_size, axis=0) if len(context) == 1 else context

    def _pictures(self, image, height, width, count):
        multiple = self.decoder.architecture.downsampling
        pictures = images.to_model(image, height, width, multiple)
        if len(pictures) == 1:
            return np.repeat(pictures, count, axis=0)
        return np.stack(one_each("image", pictures, count))
