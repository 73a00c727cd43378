"""Pipelines of latents: an autoencoder before and behind the diffusion model."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from keras import ops

from kdiffusion import images
from kdiffusion.pipelines.base import Component, Pipeline
from kdiffusion.pipelines.starts import Posterior
from kdiffusion.pipelines.tiling import MAX_CELLS, decode_in_tiles
from kdiffusion.runtime.programs import Program
from kdiffusion.sampling.noise import noise_stream
from kdiffusion.weights.variables import rebuilt


class LatentPipeline(Pipeline):
    """A diffusion model of an autoencoder's latents (Rombach et al. 2022)."""

    image_encoder = Component("image_encoder", "Images to latents, see `ImageEncoder`.")
    decoder = Component("image_decoder", "Latents to images, see `ImageDecoder`.")

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._image_encoder: Any = None
        self._decoder: Any = None
        self._encode_image_program = Program(encode_pixels, self.jit_compile)
        self._decode_program = Program(_decode, self.jit_compile)

    def encode_image(
        self,
        image: Any,
        height: int | None = None,
        width: int | None = None,
        *,
        seed: int | None = None,
    ) -> np.ndarray:
        """Encode images as latents.

        Args:
            image: a PIL image, the path of a file, an array, or a list of these, see
                `images.to_model`.
            height: int, in pixels, a multiple of the downsampling factor; `None` for the image's
                own.
            width: int, likewise.
            seed: int, samples the latents' distribution, image i with `seed + i`; `None` gives its
                mean.

        Returns:
            (batch, height / 8, width / 8, 4) float32, for Stable Diffusion.

        Raises:
            ValueError: If something is no image.
        """
        multiple = self.architecture("image_decoder").downsampling
        posterior = self.encode_pictures(images.to_model(image, height, width, multiple))
        if seed is None:
            return posterior.mean
        return posterior.sample([noise_stream(seed + i) for i in range(len(posterior.mean))])

    def encode_pictures(self, pictures: np.ndarray) -> Posterior:
        """Encode prepared images, one after the other.

        Args:
            pictures: (batch, height, width, 3) float32 in [-1, 1], see `images.to_model`.

        Returns:
            The `Posterior` of their latents.
        """
        means, deviations = [], []
        for index in range(len(pictures)):
            picture = ops.convert_to_tensor(pictures[index : index + 1])
            distribution = self._encode_image_program(self.image_encoder, picture)
            means.append(ops.convert_to_numpy(distribution["mean"]))
            deviations.append(np.exp(0.5 * ops.convert_to_numpy(distribution["logvar"])))
        return Posterior(np.concatenate(means), np.concatenate(deviations))

    def decode(self, latents: Any) -> np.ndarray:
        """Turn latents into images, one after the other; above a megapixel tile by tile.

        Args:
            latents: (batch, height, width, 4) float32, as the diffusion model makes them.

        Returns:
            (batch, 8 * height, 8 * width, 3) uint8.

        Raises:
            ValueError: If an image is not finite, also after a half-precision decoder was tried
                once more in float32.
        """
        latents = np.asarray(latents, np.float32)
        pictures = [self._decode_picture(latents[i : i + 1]) for i in range(len(latents))]
        return images.to_uint8(np.concatenate(pictures))

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Estimate the images of latents that are not denoised to the end.

        Args:
            latents: (batch, height, width, channels) float32, such as `Step.denoised`.

        Returns:
            (batch, rows, columns, 3) uint8: half the size of the image, by one matrix for each
            latent cell, where the family has one; else the decoder's images.
        """
        codec, family = self.architecture("image_decoder"), self.source.family
        matrix = np.array(family.preview or ())
        # The matrix is of the family's public autoencoder, which its scale tells from others.
        if (len(matrix), family.latent_scale) != (codec.latent_channels, codec.latent_scale):
            return self.decode(latents)
        return images.preview(latents, max(codec.downsampling // 2, 1), matrix)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """See `Pipeline.latent_shape`."""
        codec = self.architecture("image_decoder")
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


def encode_pixels(model: Any, pictures: Any) -> dict[str, Any]:
    """Return the distribution of images' latents as a `Program` computes it.

    Args:
        model: `ImageEncoder`.
        pictures: (batch, height, width, 3) float32 in [-1, 1].

    Returns:
        Dictionary of `mean` and `logvar`, (batch, height / 8, width / 8, channels) for Stable
        Diffusion.
    """
    return model(pictures)


def _decode(model, latents):
    return ops.cast(model(latents), "float32")
