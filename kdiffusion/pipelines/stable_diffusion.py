"""Stable Diffusion: images from texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from kdiffusion import images
from kdiffusion.models.architectures import DiffusionArchitecture
from kdiffusion.pipelines.settings import (
    DrawSettings,
    Settings,
    check_count,
    one_each,
    shares_settings,
)
from kdiffusion.pipelines.starts import (
    Start,
    conditioning,
    image_start,
    inpainting_start,
    noise_start,
)
from kdiffusion.pipelines.text import TextPipeline, Texts
from kdiffusion.sampling.noise import NoiseStream


class StableDiffusion(TextPipeline):
    """Stable Diffusion 1.x and 2.x, from the public checkpoints.

    Nothing is read or downloaded before it is needed. All settings of a image are data: after
    the first image of a size, prompts, seeds, samplers, steps and guidance scales change without
    a new compilation.

    Args:
        img_height: int, default height of a image in pixels, a multiple of 8.
        img_width: int, default width of a image in pixels, a multiple of 8.
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

    @shares_settings
    def text_to_image(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_steps: int | Sequence[int] = 50,
        unconditional_guidance_scale: float | Sequence[float] = 7.5,
        seed: int | Sequence[int] | None = None,
        **settings: Unpack[DrawSettings],
    ) -> np.ndarray:
        """Generate images from a text.

        Prompts, negative prompts, seeds, steps, samplers and scales may be lists: n prompts make
        n * batch_size images, those of the first prompt first; every other list has one value for
        each image (a list of negative prompts: one for each prompt).

        Args:
            prompt: str, or a list of n texts.
            negative_prompt: what to move away from; str, a list, or `None`.
            batch_size: int, images of each prompt.
            num_steps: int, steps of the sampler.
            unconditional_guidance_scale: float, how strongly the text is followed; at most 1 is
                off and takes half the time.
            seed: int; image i of the result is the one that `seed + i` gives alone. `None` takes
                a random one.

        Returns:
            (n * batch_size, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, or if the result is not finite.

        Example:

        ```python
        images = model.text_to_image("a lighthouse", num_steps=20, sampler="dpmpp_2m", seed=42)
        ```
        """
        call = Settings(
            num_steps=num_steps, guidance_scale=unconditional_guidance_scale, seed=seed, **settings
        )
        texts = Texts.of_prompts(prompt, negative_prompt, batch_size)
        streams = call.streams(texts.count)
        start = noise_start(streams, self.latent_shape(call.height, call.width))
        return self._generate(texts, start, call, streams)

    @shares_settings
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
        **settings: Unpack[DrawSettings],
    ) -> np.ndarray:
        """Generate images from a text that start from a given image.

        Args:
            image: a PIL image, the path of a file, an array, or a list of one for each image of
                the result, see `images.to_model`.
            prompt: str, or a list of n texts.
            strength: float in (0, 1], the share of the noise range that is run: 0.3 changes
                little, 0.8 much.
            negative_prompt, batch_size, num_steps, unconditional_guidance_scale, seed: see
                `text_to_image`.

        Returns:
            (n * batch_size, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, an image that cannot be read, or if the
                result is not finite.

        Example:

        ```python
        model.image_to_image("sketch.png", "an oil painting of a harbour", strength=0.6)
        ```
        """
        call = Settings(
            num_steps=num_steps, guidance_scale=unconditional_guidance_scale, seed=seed, **settings
        )
        texts = Texts.of_prompts(prompt, negative_prompt, batch_size)
        streams = call.streams(texts.count)
        known = self.encode_pictures(self._pictures(image, call, texts.count))
        return self._generate(texts, image_start(known, strength, streams), call, streams)

    @shares_settings
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
        **settings: Unpack[DrawSettings],
    ) -> np.ndarray:
        """Repaint a part of an image.

        An inpainting checkpoint is conditioned on the mask and the image around it. With any other
        the latents outside the mask are set back to the image's after each step.

        Args:
            image: a PIL image, the path of a file, an array, or a list of one for each image of
                the result, see `images.to_model`.
            mask: likewise, 1 or white where the image is repainted, see `images.to_mask`.
            prompt: str, or a list of n texts.
            strength: float in (0, 1]; 1 forgets what was under the mask.
            negative_prompt, batch_size, num_steps, unconditional_guidance_scale, seed: see
                `text_to_image`.

        Returns:
            (n * batch_size, height, width, 3) uint8.

        Raises:
            ValueError: For a setting out of range, an image that cannot be read, or if the
                result is not finite.

        Example:

        ```python
        image, mask = images.pad_for_outpainting("portrait.png", left=128, right=128)
        model.inpaint(image, mask, "a portrait in a garden")
        ```
        """
        call = Settings(
            num_steps=num_steps, guidance_scale=unconditional_guidance_scale, seed=seed, **settings
        )
        texts = Texts.of_prompts(prompt, negative_prompt, batch_size)
        streams = call.streams(texts.count)
        pictures = self._pictures(image, call, texts.count)
        height, width = pictures.shape[1:3]
        masks = images.to_mask(mask, height, width, texts.count)
        known = masked = None
        if not self._is_conditioned or strength < 1.0:
            known = self.encode_pictures(pictures)
        if self._is_conditioned:
            masked = self.encode_pictures(images.masked_image(pictures, masks))
        mask = images.latent_mask(masks, self.architecture("image_decoder").downsampling)
        start = inpainting_start(known, masked, mask, strength, streams)
        return self._generate(texts, start, call, streams)

    @shares_settings
    def generate_image(
        self,
        encoded_text: Any,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_steps: int | Sequence[int] = 50,
        unconditional_guidance_scale: float | Sequence[float] = 7.5,
        diffusion_noise: Any = None,
        seed: int | Sequence[int] | None = None,
        **settings: Unpack[DrawSettings],
    ) -> np.ndarray:
        """Generate images from encoded text, for example from a mixture of two prompts.

        Args:
            encoded_text: (tokens, width) or (1, tokens, width), repeated `batch_size` times; or
                (batch_size, tokens, width), one for each image. What `encode_text` returns.
            negative_prompt: str, a list of one for each image, or `None`.
            batch_size: int, how many images; 1 also stands for as many as there are texts.
            diffusion_noise: unit noise to start from, (height / 8, width / 8, 4) for all images
                or with a leading batch axis; in place of `seed`.
            num_steps, unconditional_guidance_scale, seed: see `text_to_image`.

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
        call = Settings(
            num_steps=num_steps, guidance_scale=unconditional_guidance_scale, seed=seed, **settings
        )
        texts = Texts.of_context(context, negative_prompt)
        streams = call.streams(texts.count)
        shape = self.latent_shape(call.height, call.width)
        start = noise_start(streams, shape, diffusion_noise, seed)
        return self._generate(texts, start, call, streams)

    @classmethod
    def _check_architecture(cls, architecture: DiffusionArchitecture) -> None:
        if architecture.context_width is None or architecture.num_classes is not None:
            raise ValueError(
                "StableDiffusion draws with networks that are given a text and nothing else. "
                f"Received: a network with context_width={architecture.context_width}, "
                f"num_classes={architecture.num_classes}. Use LatentDiffusion or PixelDiffusion."
            )

    @property
    def _is_conditioned(self):
        """Tell if this is an inpainting network, whose input has further channels."""
        return self.architecture("diffusion_model").conditioning_channels > 0

    def _generate(
        self, texts: Texts, start: Start, settings: Settings, streams: Sequence[NoiseStream]
    ) -> np.ndarray:
        """Encode the texts, denoise and decode."""
        downsampling = self.architecture("image_decoder").downsampling
        height, width = (downsampling * side for side in start.noise.shape[1:3])
        conditions = texts.context or self.conditions(texts.prompts, (height, width))
        negatives = None
        if settings.is_guided(texts.count):
            negatives = self.negative_conditions(texts.negatives, (height, width))
            negatives = _repeated(negatives, texts.count)
        if self._is_conditioned and start.conditioning is None:
            start = start._replace(conditioning=self._all_repainted(start))
        conditions = _repeated(conditions, texts.count)
        return self.decode(self.denoise(start, conditions, negatives, settings, streams))

    def _all_repainted(self, start):
        """Return the conditioning of an inpainting network for an image without a mask."""
        count, height, width, _ = start.noise.shape
        downsampling = self.architecture("image_decoder").downsampling
        grey = np.zeros((1, downsampling * height, downsampling * width, 3), np.float32)
        mask = np.ones((1, height, width, 1), np.float32)
        return np.repeat(conditioning(mask, self.encode_pictures(grey).mean), count, axis=0)

    def _check_context(self, encoded_text, batch_size):
        context = np.asarray(encoded_text, np.float32)
        if context.ndim == 2:
            context = context[None]
        width = self.architecture("diffusion_model").context_width
        fits = context.ndim == 3 and context.shape[-1] == width
        if not fits or (len(context) != 1 and batch_size not in (1, len(context))):
            raise ValueError(
                f"`encoded_text` must have the shape (tokens, {width}), (1, tokens, {width}) or "
                f"(batch_size, tokens, {width}). Received: shape {np.shape(encoded_text)} with "
                f"batch_size={batch_size}"
            )
        return np.repeat(context, batch_size, axis=0) if len(context) == 1 else context

    def _pictures(self, image, settings, count):
        """Read the image that each of a batch starts from, (count, height, width, 3)."""
        multiple = self.architecture("image_decoder").downsampling
        pictures = images.to_model(image, settings.height, settings.width, multiple)
        if len(pictures) == 1:
            return np.repeat(pictures, count, axis=0)
        return np.stack(one_each("image", pictures, count))


def _repeated(conditions, count):
    """Repeat each row of some conditions until there is one for each image."""
    return {name: np.repeat(rows, count // len(rows), axis=0) for name, rows in conditions.items()}
