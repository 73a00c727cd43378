"""Contrastive training of CLIP: images and their captions are mapped to nearby vectors."""

from __future__ import annotations

import math
import os
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiffusion.models.architectures import (
    ImageTowerArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.records import fields
from kdiffusion.runtime import programs
from kdiffusion.runtime.programs import Program
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.training.trainers.base import Batch, Trainer
from kdiffusion.weights import clip_folder

# The logarithm of the inverse temperature starts at a temperature of 0.07 and is bounded, so that
# logits are scaled by 100 at most (Radford et al. 2021, section 2.5).
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)

# A shorter vector is not scaled to unit length, because its gradient would have no bound.
_EPSILON = 1e-6

# Captions also count as equal where these are: samples of one class or of one group.
_SAME = ("label", "group")


class CLIPTrainer(Trainer):
    """A trainer of an image tower and a text encoder (Radford et al. 2021, section 2.3).

    An image and its caption learn to be nearer to each other than to any other of the batch.
    Samples with equal captions are right answers to one another, and so are samples of equal
    `label` or `group`, if the batch has them and they are not negative.

    The loss compares all samples of a batch, so it is not the mean of the losses of its parts, and
    `Loop` refuses to accumulate.

    Args:
        image_tower: `ImageTower`.
        text_encoder: `TextEncoder` with a projection as wide as the image tower's.
        tokenizer: `SimpleTokenizer` of the captions, which `save` writes too, or `None`.
        logit_scale: float, logarithm of the inverse temperature to start with.
        seed, name: see `Trainer`. The losses need no random numbers.

    Raises:
        ValueError: If the two do not project to the same width, or the tokenizer is of another
            vocabulary.

    Example:

    ```python
    trainer = CLIPTrainer(ImageTower(...), TextEncoder(...))
    optimizer = exclude_from_decay(
        keras.optimizers.AdamW(5e-4, weight_decay=0.2, beta_2=0.98, epsilon=1e-6), trainer
    )
    trainer.compile(optimizer)
    trainer.fit(dataset)  # of {"images": ..., "tokens": ...}
    ```
    """

    separable = False

    def __init__(
        self,
        image_tower: ImageTower,
        text_encoder: TextEncoder,
        *,
        tokenizer: SimpleTokenizer | None = None,
        logit_scale: float = INITIAL_LOGIT_SCALE,
        seed: int = 0,
        name: str | None = None,
    ):
        super().__init__(seed=seed, name=name)
        check_towers(image_tower.architecture, text_encoder.architecture, tokenizer)
        if not 0 <= logit_scale <= MAX_LOGIT_SCALE:
            raise ValueError(
                f"`logit_scale` must be between 0 and {MAX_LOGIT_SCALE:.4f}, the logarithm of 100. "
                f"Received: logit_scale={logit_scale}"
            )
        self.image_tower = image_tower
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.logit_scale = self.add_weight(
            shape=(),
            dtype="float32",
            initializer=keras.initializers.Constant(logit_scale),
            constraint=_clip_logit_scale,
            autocast=False,
            name="logit_scale",
        )
        self._encode_program = Program(_unit_pooled, programs.use_jit("auto"))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, dtype: Any = None, **settings) -> CLIPTrainer:
        """Load what `save` has written, or any folder of transformers' CLIPModel.

        Args:
            folder: path of the folder.
            dtype: Keras dtype policy of both networks, or `None` for the global one.
            settings: `seed` and `name`.

        Raises:
            ValueError: If the folder holds no CLIP that is known here.
        """
        text_encoder, image_tower, logit_scale, tokenizer = clip_folder.load(folder, dtype)
        logit_scale = min(max(logit_scale, 0.0), MAX_LOGIT_SCALE)
        return cls(
            image_tower, text_encoder, tokenizer=tokenizer, logit_scale=logit_scale, **settings
        )

    @property
    def configuration(self) -> dict[str, Any]:
        """See `Trainer.configuration`."""
        return {
            "image_tower": fields(self.image_tower.architecture),
            "text_encoder": fields(self.text_encoder.architecture),
        }

    def losses(self, batch: Batch, key: Any = 0, step: Any = 0):
        """Compute the contrastive loss of each sample.

        Args:
            batch: `images` (batch, height, width, 3) float32 in [-1, 1], `tokens` (batch, length)
                int32, and, if there are any, `label` or `group` (batch,) int32.
            key, step: not used, because nothing is random.

        Returns:
            Losses of the group `"model"`; and `"image_to_text@1"` and `"text_to_image@1"`, (batch,)
            1 where the best match within the batch is a right one, and `"temperature"`, ().

        Raises:
            ValueError: If images or tokens are missing, or there are no two samples.
        """
        _check_batch(batch)
        images = unit_vectors(self.image_tower(batch["images"])["pooled"])
        texts = unit_vectors(self.text_encoder(batch["tokens"])["pooled"])
        logits = ops.exp(ops.convert_to_tensor(self.logit_scale)) * ops.matmul(
            images, ops.transpose(texts)
        )
        same = matches(batch)
        logs = {
            "image_to_text@1": finds_match(logits, same),
            "text_to_image@1": finds_match(ops.transpose(logits), same),
            "temperature": ops.exp(-self.logit_scale),
        }
        return {"model": contrastive_loss(logits, same)}, logs

    def encode_images(self, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """Compute the unit vectors of images.

        Args:
            images: (n, height, width, 3) in [-1, 1].
            batch_size: int, how many are computed at a time.

        Returns:
            (n, projection_width) float32.
        """
        return self._encode(self.image_tower, np.asarray(images, np.float32), batch_size)

    def encode_text(self, tokens: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Compute the unit vectors of texts.

        Args:
            tokens: (n, length) int32, rows of the tokenizer.
            batch_size: int, how many are computed at a time.

        Returns:
            (n, projection_width) float32.
        """
        return self._encode(self.text_encoder, np.asarray(tokens, np.int32), batch_size)

    def _encode(self, model, inputs, batch_size):
        parts = []
        for start in range(0, len(inputs), batch_size):
            part = inputs[start : start + batch_size]
            # The number of rows is always the same, so nothing is compiled for the last ones.
            rows = np.resize(part, (min(batch_size, len(inputs)), *part.shape[1:]))
            vectors = self._encode_program(model, ops.convert_to_tensor(rows))
            parts.append(ops.convert_to_numpy(vectors)[: len(part)])
        width = self.image_tower.architecture.projection_width
        return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)

    def save(self, folder: str | os.PathLike, dtype: str = "float32") -> None:
        """Write both networks as parts of the diffusers layout and as transformers' CLIPModel.

        Args:
            folder: path of a folder that does not exist, or is empty. See `clip_folder.save`.
            dtype: `"float32"`, `"float16"` or `"bfloat16"`, of the weights in the files.

        Raises:
            ValueError: If the folder is not empty, or a weight is not finite in this dtype.
        """
        logit_scale = float(ops.convert_to_numpy(self.logit_scale.value))
        clip_folder.save(
            folder, self.text_encoder, self.image_tower, logit_scale, self.tokenizer, dtype
        )


def unit_vectors(vectors):
    """Scale vectors to unit length, in float32.

    Args:
        vectors: (batch, width), of any floating dtype.

    Returns:
        (batch, width) float32; vectors shorter than 1e-6 stay shorter than 1.
    """
    vectors = ops.cast(vectors, "float32")
    square = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    return vectors * ops.rsqrt(ops.maximum(square, _EPSILON**2))


def matches(batch: Batch):
    """Tell the samples whose captions are right answers to one another's images.

    Args:
        batch: see `CLIPTrainer.losses`.

    Returns:
        (batch, batch) bool: rows of tokens are equal, or a `label` or `group` is equal and not
        negative.
    """
    tokens = ops.cast(batch["tokens"], "int32")
    same = ops.all(ops.equal(tokens[:, None], tokens[None]), axis=-1)
    for name in _SAME:
        if name in batch:
            number = ops.cast(batch[name], "int32")
            equal = ops.logical_and(ops.equal(number[:, None], number[None]), number[:, None] >= 0)
            same = ops.logical_or(same, equal)
    return same


def contrastive_loss(logits, same):
    """Compute symmetric InfoNCE with any number of right answers (Radford et al. 2021, figure 3).

    It is half the sum of the cross entropy of each image over the batch's captions and of each
    caption over its images. Several right answers have equal shares of the target, so k equal
    captions cost log k at best; with one right answer it is CLIP's loss.

    Args:
        logits: (batch, batch) float32, images in rows, captions in columns.
        same: (batch, batch) bool, symmetric, true on the diagonal.

    Returns:
        (batch,) float32.
    """
    targets = ops.cast(same, "float32")
    targets = targets / ops.sum(targets, axis=1, keepdims=True)
    of_image = ops.sum(targets * ops.log_softmax(logits, axis=1), axis=1)
    of_text = ops.sum(targets * ops.log_softmax(ops.transpose(logits), axis=1), axis=1)
    return -(of_image + of_text) / 2


def exclude_from_decay(optimizer: Any, trainer: keras.Model) -> Any:
    """Restrict an optimizer's weight decay to matrices.

    CLIP's paper decays "all weights that are not gains or biases" (Radford et al. 2021, section
    2.5). Temperatures and class tokens are vectors or scalars, too.

    Args:
        optimizer: keras optimizer that has not been built yet.
        trainer: Keras model, whose variables of less than two dimensions are not decayed.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the optimizer is built already.
    """
    vectors = [variable for variable in trainer.trainable_variables if len(variable.shape) < 2]
    getattr(optimizer, "inner_optimizer", optimizer).exclude_from_weight_decay(var_list=vectors)
    return optimizer


def _clip_logit_scale(value):
    return ops.clip(value, 0.0, MAX_LOGIT_SCALE)


def _unit_pooled(model, inputs):
    return unit_vectors(model(inputs)["pooled"])


def finds_match(logits, same):
    """Tell if a right answer has a higher logit than every wrong one, (batch,) float32."""
    right = ops.max(ops.where(same, logits, -math.inf), axis=1)
    wrong = ops.max(ops.where(same, -math.inf, logits), axis=1)
    return ops.cast(right > wrong, "float32")


def _check_batch(batch):
    missing = {"images", "tokens"} - set(batch)
    if missing:
        raise ValueError(
            f"A batch for CLIP needs `images` and `tokens`. Received: {sorted(batch)}, without "
            f"{sorted(missing)}. Give the data captions and a tokenizer."
        )
    if batch["tokens"].shape[0] == 1:
        raise ValueError(
            "A contrastive loss compares the samples of a batch. Received: a batch of one. "
            "Use two or more."
        )


def check_towers(
    image_tower: ImageTowerArchitecture,
    text_encoder: TextEncoderArchitecture,
    tokenizer: SimpleTokenizer | None,
) -> None:
    """Refuse networks and a tokenizer that do not belong together.

    Args:
        image_tower: architecture of the image tower.
        text_encoder: architecture of the text encoder.
        tokenizer: `SimpleTokenizer`, or `None`.

    Raises:
        ValueError: If the two do not project to the same width, or the tokenizer is of another
            vocabulary.
    """
    widths = (image_tower.projection_width, text_encoder.projection_width)
    if widths[0] != widths[1]:
        raise ValueError(
            "Image tower and text encoder must project to the same width. Received: "
            f"projection_width={widths[0]} and {widths[1]}"
        )
    if tokenizer is not None:
        check_tokenizer(tokenizer, text_encoder)


def check_tokenizer(tokenizer: SimpleTokenizer, text_encoder: TextEncoderArchitecture) -> None:
    """Refuse a tokenizer whose ids are not those of a text encoder.

    Args:
        tokenizer: `SimpleTokenizer`.
        text_encoder: architecture of the text encoder.

    Raises:
        ValueError: If the encoder has too few embeddings or positions, or ends texts with another
            id.
    """
    expected = (text_encoder.vocabulary_size, text_encoder.end_id)
    found = (len(tokenizer.vocab), tokenizer.end_of_text)
    if found[0] > expected[0] or found[1] != expected[1]:
        raise ValueError(
            f"The text encoder has {expected[0]} token embeddings and ends texts with id "
            f"{expected[1]}. Received: a tokenizer of {found[0]} tokens that ends them with "
            f"{found[1]}. Use vocabulary_size={found[0]} and end_id={found[1]}, or its tokenizer."
        )
    if tokenizer.max_length > text_encoder.max_length:
        raise ValueError(
            f"The text encoder reads rows of {text_encoder.max_length} tokens at most. Received: a "
            f"tokenizer whose rows have {tokenizer.max_length}. Use "
            f"max_length={tokenizer.max_length}, or another tokenizer."
        )
