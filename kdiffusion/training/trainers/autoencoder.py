"""Training of autoencoders, with a KL penalty or a codebook (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiffusion.images import to_uint8
from kdiffusion.models.architectures import AutoencoderArchitecture
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.records import fields
from kdiffusion.runtime import backend
from kdiffusion.training import random
from kdiffusion.training.trainers.base import Batch, PartTrainer, sample_index
from kdiffusion.training.trainers.discriminator import (
    adaptive_weight,
    generator_loss,
    hinge_loss,
)
from kdiffusion.training.trainers.group_optimizer import GroupOptimizer
from kdiffusion.training.trainers.latent_scale import code, measure, scaled
from kdiffusion.training.trainers.quantizer import (
    codebook_loss,
    perplexity,
    straight_through,
)
from kdiffusion.weights.save import save

LATENT_SCALES = ("global", "channel", "keep")


@dataclass(frozen=True)
class AutoencoderObjective:
    """The weights of an autoencoder's losses; the defaults are those of LDM-KL.

    With a KL penalty, the loss of reconstruction is a sum over the numbers of the image, and the
    penalty one over those of the latents. With a codebook, all losses are means. So `kl_weight`
    does not depend on the size of images, and the other weights mean the same in both.

    Args:
        pixel: `"l1"`, absolute, or `"l2"`, squared differences of pixels.
        perceptual_weight: float, of the perceptual distance beside the pixels' mean.
        kl_weight: float, of the divergence from a unit normal.
        codebook_weight: float, of `quantizer.codebook_loss`.
        commitment: float, see `quantizer.codebook_loss`.
        legacy: bool, see `quantizer.codebook_loss`.
        adversarial_weight: float, of the adversarial loss, times the adaptive weight; LDM's is 0.5
            with a KL penalty and 0.75 with a codebook.
        disc_start: int, the step at which the discriminator starts to learn.
        disc_warmup: int, steps that it learns before the adversarial loss counts. An untrained
            discriminator's gradient, scaled up by the adaptive weight, can spoil the autoencoder.

    Raises:
        ValueError: If a value is out of range.
    """

    pixel: str = "l1"
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    commitment: float = 0.25
    legacy: bool = True
    adversarial_weight: float = 0.5
    disc_start: int = 50_001
    disc_warmup: int = 0

    def __post_init__(self):
        if self.pixel not in ("l1", "l2"):
            raise ValueError(f"`pixel` must be 'l1' or 'l2'. Received: pixel={self.pixel!r}")
        for name, value in vars(self).items():
            if name != "pixel" and not 0 <= value < np.inf:
                raise ValueError(f"`{name}` must be 0 or positive. Received: {name}={value!r}")


class AutoencoderTrainer(PartTrainer):
    """A trainer of an image encoder and an image decoder (Esser et al. 2021; Rombach et al. 2022).

    The architecture's `codebook_size` decides between a KL penalty and a codebook. Images are
    compared pixel by pixel, by a perceptual network, and by a discriminator that is trained at the
    same time; the last two are optional.

    With a discriminator there are two groups of variables, `"autoencoder"` and `"discriminator"`,
    and both losses come from one forward pass. Neither loss has a gradient to the other group's
    variables. One optimizer serves both groups as two of its kind; a dictionary of optimizers by
    group makes them differ, here and in `Loop`. The discriminator normalizes over the whole batch,
    so its loss is no mean of its samples' losses, and `Loop` refuses to accumulate.

    Args:
        image_encoder: `ImageEncoder`.
        image_decoder: `ImageDecoder` of the same architecture.
        perceptual: function of two batches of images, (batch, height, width, 3) in [-1, 1], to
            their distances (batch,), such as `Perceptual`. The weights of a Keras model stay
            fixed.
        discriminator: `Discriminator`, or any model from images to logits that keeps no statistics.
        objective: `AutoencoderObjective`.
        latent_scale: how the latents are scaled when they are saved: `"global"`, by one number,
            `"channel"`, by one for each channel, measured over the images that `prepare` takes;
            or `"keep"`, by the numbers of the encoder's architecture.
        seed, name: see `Trainer`.

    Raises:
        ValueError: If the two halves do not belong together.

    Example:

    ```python
    trainer = AutoencoderTrainer(
        ImageEncoder(), ImageDecoder(), perceptual=perceptual, discriminator=Discriminator()
    )
    trainer.compile(keras.optimizers.Adam(4.5e-6 * 12, beta_1=0.5, beta_2=0.9))
    trainer.fit({"images": images}, batch_size=12)
    trainer.prepare(images)
    trainer.save("autoencoder")
    ```
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        image_decoder: ImageDecoder,
        *,
        perceptual: Callable[[Any, Any], Any] | None = None,
        discriminator: keras.Model | None = None,
        objective: AutoencoderObjective = AutoencoderObjective(),
        latent_scale: str = "global",
        seed: int = 0,
        name: str | None = None,
    ):
        super().__init__(seed=seed, name=name)
        if image_encoder.architecture != image_decoder.architecture:
            raise ValueError(
                "The image encoder and decoder must have the same architecture. Received: "
                f"{image_encoder.architecture} and {image_decoder.architecture}"
            )
        check_latent_scale(latent_scale, image_encoder.architecture)
        self.image_encoder = image_encoder
        self.image_decoder = image_decoder
        self.perceptual = perceptual
        self.discriminator = discriminator
        self.objective = objective
        self.latent_scale = latent_scale
        self.separable = discriminator is None
        self._sample: np.ndarray | None = None

    # These are cached, not set, because Keras would list them beside the networks that hold them.
    @functools.cached_property
    def _codebook(self) -> Any:
        has_codebook = self.image_decoder.architecture.codebook_size is not None
        return self.image_decoder.get_layer("codebook") if has_codebook else None

    @functools.cached_property
    def _last(self) -> Any:
        return self.image_decoder.get_layer("conv_out")

    @functools.cached_property
    def _features(self) -> keras.Model:
        """The decoder between the code and its last layer."""
        start = self._codebook or self.image_decoder.get_layer("unscale")
        return keras.Model(start.output, self._last.input)

    @property
    def groups(self) -> dict[str, list[keras.Variable]]:
        """The variables of both halves, and those of the discriminator."""
        halves = self.image_encoder, self.image_decoder
        groups = {"autoencoder": [v for half in halves for v in half.trainable_variables]}
        if self.discriminator is not None:
            groups["discriminator"] = list(self.discriminator.trainable_variables)
        return groups

    @property
    def configuration(self) -> dict[str, Any]:
        """See `Trainer.configuration`."""
        return {
            "architecture": fields(self.image_decoder.architecture),
            "objective": asdict(self.objective),
            "perceptual": _name(self.perceptual),
            "discriminator": _name(self.discriminator),
        }

    def compile(self, optimizer: Any = "adam", **settings: Any) -> None:
        """Prepare for `fit`; see `Trainer.compile`.

        Args:
            optimizer: keras optimizer or its name, for all variables; or a dictionary of one for
                each of `groups`.
            settings: see `Trainer.compile`.

        Raises:
            ValueError: For settings that `fit` would treat wrongly or not at all.
        """
        if isinstance(optimizer, Mapping):
            optimizer = GroupOptimizer(optimizer, self.groups)
        super().compile(optimizer, **settings)

    def losses(self, batch: Batch, key: Any, step: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `Trainer.losses`.

        The figures are the terms before they are weighted, the peak signal-to-noise ratio of the
        reconstructions in dB, and the mean logits of images and of reconstructions.
        """
        if "images" not in batch:
            raise ValueError(f"A batch needs `images`. Received: a batch of {sorted(batch)}.")
        images = ops.cast(batch["images"], "float32")
        start, penalty, figures = self._code(images, key, step, sample_index(batch))
        features = self._features(start)
        reconstruction = self._image(features, self._last.kernel)
        loss, terms = self._difference(images, reconstruction)
        figures = {"psnr": _psnr(images, reconstruction), **terms, **figures}
        if self.discriminator is None:
            return {"autoencoder": loss + penalty}, figures
        fake = self._logits(reconstruction)
        real, seen = map(self.discriminator, (images, ops.stop_gradient(reconstruction)))
        terms = {
            "generator": generator_loss(fake),
            "hinge": hinge_loss(real, seen),
            "adversarial_weight": self._adversarial_weight(images, features, step),
            "logits_real": ops.mean(real, axis=(1, 2, 3)),
            "logits_fake": ops.mean(fake, axis=(1, 2, 3)),
        }
        losses = {
            "autoencoder": loss + penalty + terms["adversarial_weight"] * terms["generator"],
            "discriminator": _from(self.objective.disc_start, step) * terms["hinge"],
        }
        return losses, {**figures, **terms}

    def prepare(self, data: Any, count: int = 64) -> None:
        """Keep images for `samples` to show, and for `save` to measure the latent scale.

        Args:
            data: the data of `Loop`, such as `Data`; or an array of images, (n, height, width, 3)
                float32 in [-1, 1].
            count: int, how many images to keep.

        Raises:
            ValueError: If there are none.
        """
        images = data[:count] if isinstance(data, np.ndarray) else data.batch(0, count)["images"]
        if not len(images):
            raise ValueError("`data` must hold at least one image. Received: none")
        self._sample = np.asarray(images, np.float32)

    def samples(self, count: int) -> np.ndarray | None:
        """Return the images that `prepare` has kept, each followed by its reconstruction.

        Args:
            count: int, how many images and reconstructions together.

        Returns:
            (count, height, width, 3) uint8 or fewer; `None` without `prepare`.
        """
        if self._sample is None:
            return None
        shown = []
        for image in self._sample[: (count + 1) // 2, None]:
            latents = self.image_encoder(image)["mean"]
            reconstruction = ops.cast(self.image_decoder(latents), "float32")
            shown += [image, ops.convert_to_numpy(reconstruction)]
        return to_uint8(np.concatenate(shown[:count]))

    def scaled(self) -> tuple[ImageEncoder, ImageDecoder]:
        """Return the image encoder and decoder as they are saved: with the measured latent scale.

        Raises:
            ValueError: If there are no images to measure it over.
        """
        if self.latent_scale == "keep":
            return self.image_encoder, self.image_decoder
        if self._sample is None:
            raise ValueError(
                "The latent scale is measured over images, and there are none. Call "
                "`prepare(data)` first, or make the trainer with latent_scale='keep'."
            )
        scale, shift = measure(self.image_encoder, self._sample, self.latent_scale == "channel")
        return scaled(self.image_encoder, self.image_decoder, scale, shift)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the autoencoder as `vae` in diffusers' layout, whole or not at all.

        Args:
            folder: path of a folder that does not exist, or is empty.

        Raises:
            ValueError: If the folder exists already, there are no images to measure the latent
                scale over, or diffusers has no autoencoder like this one.
        """
        encoder, decoder = self.scaled()
        size = None if self._sample is None else self._sample.shape[1:3]
        save(folder, {"image_encoder": encoder, "image_decoder": decoder}, size=size)

    def _code(self, images, key, step, index):
        """Compute the decoder's input, the penalty on the code, (batch,), and figures."""
        objective = self.objective
        mean, logvar = code(self.image_encoder, images)
        if self._codebook is None:
            noise = random.normal(key, step, index, mean.shape[1:], random.POSTERIOR)
            divergence = 0.5 * ops.square(mean) + 0.5 * (ops.exp(logvar) - 1.0 - logvar)
            divergence = ops.sum(divergence, axis=(1, 2, 3))
            sample = mean + ops.exp(0.5 * logvar) * noise
            return sample, objective.kl_weight * divergence, {"kl": divergence}
        chosen = self._codebook.nearest(mean)
        vectors = self._codebook.vectors(chosen)
        loss = codebook_loss(mean, vectors, objective.commitment, objective.legacy)
        figures = {"codebook": loss, "perplexity": perplexity(chosen, self._codebook.size)}
        return straight_through(mean, vectors), objective.codebook_weight * loss, figures

    def _image(self, features, kernel):
        """Compute the decoder's last layer as a function of its kernel."""
        kernel = ops.cast(kernel, features.dtype)
        x = ops.conv(features, kernel, padding="same", data_format="channels_last")
        return ops.cast(x, "float32") + ops.cast(self._last.bias, "float32")

    def _difference(self, images, reconstruction):
        """Compute the loss of reconstruction, (batch,), and its terms."""
        error = images - reconstruction
        error = ops.abs(error) if self.objective.pixel == "l1" else ops.square(error)
        terms = {"pixel": ops.mean(error, axis=(1, 2, 3))}
        loss = terms["pixel"]
        if self.perceptual is not None:
            distance = ops.cast(self.perceptual(images, reconstruction), "float32")
            terms["perceptual"] = ops.reshape(distance, (-1,))
            loss = loss + self.objective.perceptual_weight * terms["perceptual"]
        if self._codebook is None:
            loss = loss * math.prod(images.shape[1:])
        return loss, terms

    def _logits(self, images):
        """Compute the discriminator's logits without a gradient to its variables."""
        model: Any = self.discriminator
        fixed = [ops.stop_gradient(ops.convert_to_tensor(value)) for value in model.variables]
        with backend.with_weights(model, fixed):
            return model(images)

    def _adversarial_weight(self, images, features, step):
        """Compute the weight of the adversarial loss, ()."""
        features = ops.stop_gradient(features)

        def reconstruction(kernel):
            return ops.mean(self._difference(images, self._image(features, kernel))[0])

        def generator(kernel):
            return ops.mean(generator_loss(self._logits(self._image(features, kernel))))

        weight = adaptive_weight(reconstruction, generator, ops.cast(self._last.kernel, "float32"))
        objective = self.objective
        start = objective.disc_start + objective.disc_warmup
        return _from(start, step) * objective.adversarial_weight * weight


def check_latent_scale(latent_scale: str, architecture: AutoencoderArchitecture | None) -> None:
    """Refuse a way to scale the latents that is unknown, or that no file can hold.

    Args:
        latent_scale: see `AutoencoderTrainer`.
        architecture: `AutoencoderArchitecture`; `None` if it is not known yet.

    Raises:
        ValueError: If it is not one of `LATENT_SCALES`, or by channel with a codebook.
    """
    if latent_scale not in LATENT_SCALES:
        raise ValueError(
            f"`latent_scale` must be one of {', '.join(LATENT_SCALES)}. "
            f"Received: latent_scale={latent_scale!r}"
        )
    codebook_size = None if architecture is None else architecture.codebook_size
    if latent_scale == "channel" and codebook_size is not None:
        raise ValueError(
            "diffusers scales the latents of an autoencoder with a codebook by one number. "
            f"Received: latent_scale={latent_scale!r}, codebook_size={codebook_size}. Use "
            "latent_scale='global'."
        )


def _name(part):
    """Return the name of a function, or of an object's class."""
    return getattr(part, "__name__", type(part).__name__)


def _from(start, step):
    """Return 1 from a step on, 0 before it."""
    return ops.cast(ops.cast(step, "int32") >= start, "float32")


def _psnr(images, reconstruction):
    """Compute the peak signal-to-noise ratio of images in [-1, 1], (batch,) in dB."""
    error = ops.clip(reconstruction, -1.0, 1.0) - images
    error = ops.mean(ops.square(error), axis=(1, 2, 3))
    return 10.0 * ops.log10(4.0 / ops.maximum(error, 1e-10))
