"""Training of diffusion models: in pixels or in latents, unconditional, of classes or of texts."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.records import fields
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.training import random
from kdiffusion.training.trainers.base import Batch, PartTrainer, sample_index
from kdiffusion.training.trainers.diffusion_objective import (
    LossCoefficients,
    Objective,
    loss_coefficients,
    noisy,
    squared_error,
    target,
    timesteps,
)
from kdiffusion.weights.save import save
from kdiffusion.weights.variables import rebuilt


class DiffusionTrainer(PartTrainer):
    """A trainer of a diffusion model, new or to be fine-tuned (Rombach et al. 2022, section 3.2).

    A batch holds `images`, or the cached `mean` and `logvar` of their latents, (batch, height,
    width, channels), as the image encoder returns them; latents are sampled anew at each step. For
    a model of texts it holds `tokens`, (batch, n) int32, or the cached `context`, (batch, n,
    width), of the text encoder. For a model of classes it holds `label`, (batch,) int32.

    Args:
        diffusion_model: `DiffusionModel`, the network to be trained.
        schedule: `Schedule`, with the network's kind of prediction.
        image_encoder: `ImageEncoder` of the latents; `None` if the network generates pixels or all
            latents are cached.
        text_encoder: `TextEncoder`; `None` if there is no text or all contexts are cached.
        objective: `Objective`.
        train_text_encoder: bool, whether the text encoder learns too.
        empty: dictionary of `tokens`, (n,) int32, or `context`, (n, width) float32, of the empty
            caption, which caption dropout puts in place of others.
        draw: function from a number to that many generated images, for sample grids; `None` for
            none.
        seed: int, of the random numbers of Keras's `fit`; `Loop` has a seed of its own.

    Attributes:
        pipeline: the whole model, if `from_model` made the trainer; `save` writes all of it.

    Raises:
        ValueError: If parts do not fit each other.

    Example:

    ```python
    network = DiffusionModel({"in_channels": 3, "out_channels": 3, "context_width": None})
    trainer = DiffusionTrainer(network, Schedule(prediction="v"))
    trainer.compile(keras.optimizers.AdamW(1e-4))
    trainer.fit({"images": images}, batch_size=16, epochs=10)
    ```
    """

    def __init__(
        self,
        diffusion_model: DiffusionModel,
        schedule: Schedule,
        *,
        image_encoder: ImageEncoder | None = None,
        text_encoder: TextEncoder | None = None,
        objective: Objective = Objective(),
        train_text_encoder: bool = False,
        empty: dict[str, Any] | None = None,
        draw: Callable[[int], np.ndarray] | None = None,
        seed: int = 0,
    ):
        super().__init__(seed=seed)
        self.diffusion_model = diffusion_model
        self.schedule = schedule
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.objective = objective
        self.train_text_encoder = train_text_encoder
        self.empty = {name: np.asarray(value) for name, value in (empty or {}).items()}
        check_parts(
            diffusion_model.architecture,
            _architecture(image_encoder),
            _architecture(text_encoder),
            objective,
            train_text_encoder,
        )
        self._coefficients = loss_coefficients(schedule, objective)
        self._generate = draw
        self.pipeline: Any = None

    @classmethod
    def from_model(
        cls,
        model: Any,
        *,
        cached: Collection[str] = (),
        gradient_checkpointing: bool = False,
        **settings,
    ) -> DiffusionTrainer:
        """Make a trainer of a whole model, of which `save` then writes all parts.

        Args:
            model: `StableDiffusion`, `LatentDiffusion` or `PixelDiffusion`; it generates with the
                trained weights.
            cached: names of the cached values of batches, `"latents"` or `"context"`; their
                encoders are not loaded.
            gradient_checkpointing: bool, whether the diffusion model is rebuilt with it, see
                `DiffusionModel`.
            settings: further arguments of the class.

        Returns:
            A `DiffusionTrainer`.

        Raises:
            ValueError: If parts do not fit each other.

        Example:

        ```python
        model = StableDiffusion.from_preset("stable-diffusion-v1-5")
        trainer = DiffusionTrainer.from_model(model, gradient_checkpointing=True)
        ```
        """
        for name in cached:
            if name not in ("latents", "context"):
                raise ValueError(
                    f"`cached` may name 'latents' and 'context'. Received: cached={cached!r}"
                )
        if gradient_checkpointing and not model.diffusion_model.gradient_checkpointing:
            model.diffusion_model = rebuilt(model.diffusion_model, gradient_checkpointing=True)
        parts: dict[str, Any] = {"empty": {}}
        if "image_encoder" in model.components() and "latents" not in cached:
            parts["image_encoder"] = model.image_encoder
        if "text_encoder" in model.components() and "context" not in cached:
            parts["text_encoder"] = model.text_encoder
            parts["empty"] = {"tokens": model.tokenizer.rows([""])[0]}
        trainer = cls(model.diffusion_model, model.schedule, **{**parts, **settings})
        trainer.pipeline = model
        return trainer

    @property
    def groups(self) -> dict[str, list[keras.Variable]]:
        """The variables of the diffusion model, and of the text encoder if it learns too."""
        variables = list(self.diffusion_model.trainable_variables)
        if self.train_text_encoder and self.text_encoder is not None:
            # The projection makes the pooled vector, which no loss uses.
            variables += [
                variable
                for variable in self.text_encoder.trainable_variables
                if not variable.path.startswith("projection/")
            ]
        return {"model": variables}

    @property
    def configuration(self) -> dict[str, Any]:
        """See `Trainer.configuration`."""
        return {
            "architecture": fields(self.diffusion_model.architecture),
            "schedule": fields(self.schedule),
            "objective": fields(self.objective),
            "train_text_encoder": self.train_text_encoder,
            "empty": {name: zlib.crc32(value.tobytes()) for name, value in self.empty.items()},
        }

    def losses(self, batch: Batch, key: Any, step: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `Trainer.losses`.

        The figures are the mean squared errors of the noise and of the denoised latents that follow
        from the prediction. They can be compared between kinds of prediction.
        """
        index = sample_index(batch)
        uniform = functools.partial(random.uniform, key, step, index)
        normal = functools.partial(random.normal, key, step, index)
        objective, schedule = self.objective, self.schedule
        timestep = timesteps(key, step, index, schedule.num_timesteps, objective.stratified)
        level = self._coefficients_at(timestep)
        latents = self.latents(batch, normal)
        noise = normal(latents.shape[1:], random.NOISE)
        if objective.offset_noise:
            offset = normal((1, 1, latents.shape[-1]), random.OFFSET)
            noise = noise + objective.offset_noise * offset
        input_noise = noise
        if objective.input_perturbation:
            perturbation = normal(latents.shape[1:], random.PERTURBATION)
            input_noise = noise + objective.input_perturbation * perturbation
        a, s = (ops.reshape(scale, (-1, 1, 1, 1)) for scale in (level.a, level.s))
        inputs = {
            "latents": noisy(latents, input_noise, a, s),
            "timestep": ops.cast(timestep, "float32"),
            **self.conditions(batch, uniform),
        }
        wanted = target(schedule.prediction, latents, noise, a, s)
        error = squared_error(self.diffusion_model(inputs), wanted)
        figures = {
            "epsilon_error": level.to_epsilon * error,
            "denoised_error": level.to_denoised * error,
        }
        return {"model": level.weight * error}, figures

    def samples(self, count: int) -> np.ndarray | None:
        """See `Trainer.samples`; `draw` makes the images."""
        return None if self._generate is None else self._generate(count)

    def save(self, folder: str | os.PathLike) -> None:
        """Write a folder in diffusers' layout, whole or not at all.

        It holds the whole model if the trainer was made of one, else the trained networks and the
        schedule.

        Args:
            folder: path of a folder that does not exist, or is empty.

        Raises:
            ValueError: If the folder exists already.
        """
        if self.pipeline is not None:
            self.pipeline.save(folder)
            return
        models: dict[str, Any] = {"diffusion_model": self.diffusion_model}
        if self.train_text_encoder:
            models["text_encoder"] = self.text_encoder
        save(folder, models, self.schedule)

    def _coefficients_at(self, timestep):
        """Return the `LossCoefficients` of timesteps, (batch,) float32 each."""
        tables = (ops.convert_to_tensor(x, "float32") for x in self._coefficients)
        return LossCoefficients(*(ops.take(table, timestep) for table in tables))

    def latents(self, batch: Batch, normal: Callable[[Sequence[int], int], Any]) -> Any:
        """Sample the latents of a batch, or take its pixels for a model of pixels.

        Args:
            batch: see the class.
            normal: function of a shape and a purpose, see `random.normal`.

        Returns:
            (batch, height, width, channels) float32.
        """
        if "mean" in batch:
            mean, logvar = batch["mean"], batch["logvar"]
        elif self.image_encoder is not None:
            distribution = self.image_encoder(_of(batch, "images"))
            mean, logvar = (ops.stop_gradient(distribution[name]) for name in ("mean", "logvar"))
        else:
            return ops.cast(_of(batch, "images"), "float32")
        mean, logvar = ops.cast(mean, "float32"), ops.cast(logvar, "float32")
        return mean + ops.exp(0.5 * logvar) * normal(mean.shape[1:], random.POSTERIOR)

    def conditions(
        self, batch: Batch, uniform: Callable[[Sequence[int], int], Any]
    ) -> dict[str, Any]:
        """Return the inputs that condition the network; some samples lose all of them.

        Args:
            batch: see the class.
            uniform: function of a shape and a purpose, see `random.uniform`.

        Returns:
            Dictionary of `context`, (batch, n, width) float32, and `label`, (batch,) int32, as far
            as the network takes them.
        """
        architecture = self.diffusion_model.architecture
        conditions = {}
        dropped = None
        if self.objective.caption_dropout:
            dropped = uniform((), random.CAPTION_DROPOUT) < self.objective.caption_dropout
        if "context" in architecture.inputs:
            conditions["context"] = self._context(batch, dropped)
        if "label" in architecture.inputs:
            label = ops.cast(_of(batch, "label"), "int32")
            if dropped is not None:
                label = ops.where(dropped, architecture.num_classes, label)
            conditions["label"] = label
        return conditions

    def _context(self, batch, dropped):
        if "context" in batch and not self.train_text_encoder:
            context = ops.cast(batch["context"], "float32")
            return self._without_captions("context", context, dropped)
        if self.text_encoder is None:
            raise ValueError(
                "A batch without `context` needs the trainer's `text_encoder`. "
                f"Received: a batch of {sorted(batch)}."
            )
        tokens = ops.cast(_of(batch, "tokens"), "int32")
        tokens = self._without_captions("tokens", tokens, dropped)
        context = ops.cast(self.text_encoder(tokens)["context"], "float32")
        return context if self.train_text_encoder else ops.stop_gradient(context)

    def _without_captions(self, name, values, dropped):
        """Put the empty caption's tokens or context in place of dropped ones."""
        if dropped is None:
            return values
        shape = tuple(values.shape[1:])
        if name not in self.empty or self.empty[name].shape != shape:
            received = self.empty[name].shape if name in self.empty else None
            raise ValueError(
                f"Caption dropout needs `empty` with the {name} of the empty caption, of shape "
                f"{shape}. Received: {name} of shape {received}."
            )
        empty = ops.convert_to_tensor(self.empty[name], values.dtype)
        return ops.where(ops.reshape(dropped, (-1,) + (1,) * len(shape)), empty[None], values)


def _of(batch, name):
    if name not in batch:
        raise ValueError(
            f"This model's batches need `{name}`. Received: a batch of {sorted(batch)}."
        )
    return batch[name]


def check_parts(
    network: DiffusionArchitecture,
    autoencoder: AutoencoderArchitecture | None,
    text_encoder: TextEncoderArchitecture | None,
    objective: Objective,
    train_text_encoder: bool = False,
) -> None:
    """Refuse parts that cannot be trained together; their architectures tell, without weights.

    Args:
        network: architecture of the diffusion model.
        autoencoder: architecture of the image encoder; `None` if there is none.
        text_encoder: architecture of the text encoder; `None` if there is none.
        objective: `Objective`.
        train_text_encoder: bool, whether the text encoder learns too.

    Raises:
        ValueError: If the parts do not fit each other.
    """
    check_network(network)
    if autoencoder is not None and autoencoder.latent_channels != network.out_channels:
        raise ValueError(
            "The image encoder's latents must have the network's channels. Received: "
            f"latent_channels={autoencoder.latent_channels}, out_channels={network.out_channels}."
        )
    if text_encoder is not None and text_encoder.width != network.context_width:
        raise ValueError(
            "The text encoder's states must have the network's context width. Received: "
            f"width={text_encoder.width}, context_width={network.context_width}."
        )
    if train_text_encoder and text_encoder is None:
        raise ValueError("`train_text_encoder=True` needs a `text_encoder`. Received: None.")
    if objective.caption_dropout and not network.inputs:
        raise ValueError(
            "An unconditional network has no captions or classes to drop. Received: "
            f"caption_dropout={objective.caption_dropout}. Use 0."
        )


def check_network(network: DiffusionArchitecture) -> None:
    """Refuse a network with inputs that no batch has.

    Args:
        network: architecture of the diffusion model.

    Raises:
        ValueError: If it takes more than latents, a timestep, a context and a label.
    """
    unknown = sorted(set(network.inputs) - {"context", "label"})
    if unknown:
        raise ValueError(
            "This trainer conditions a network on a context and a label. Received: a network with "
            f"the inputs {', '.join(network.inputs)}. Use one without {', '.join(unknown)}."
        )
    if network.conditioning_channels:
        raise ValueError(
            "An inpainting network takes a mask and an image beside the latents, which no batch "
            f"has. Received: in_channels={network.in_channels}, "
            f"out_channels={network.out_channels}. Use the model that it was made of."
        )


def _architecture(model):
    return None if model is None else model.architecture
