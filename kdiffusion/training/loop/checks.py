"""Refuse what `Loop` would do wrongly; a run's configuration is checked by the same functions."""

from __future__ import annotations

import keras

from kdiffusion.training.trainers import base


def check_optimizer(optimizer: keras.Optimizer) -> None:
    """Refuse an optimizer that would clip, scale, average or accumulate beside the loop.

    Args:
        optimizer: keras optimizer of a group of variables.

    Raises:
        ValueError: For loss scaling, `global_clipnorm`, averages and accumulation.
    """
    base.check_optimizer(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.global_clipnorm:
        raise ValueError(
            "This loop clips by the global norm itself and does not scale losses. Received: "
            f"{type(optimizer).__name__} with global_clipnorm={optimizer.global_clipnorm}. "
            "Use `clip_norm` of LoopSettings, and bfloat16 rather than float16."
        )


def check_accumulation(accumulation: int, separable: bool, trainer: str) -> None:
    """Refuse to cut a batch whose samples are compared with one another.

    Args:
        accumulation: int, micro-batches of a step.
        separable: bool, see `Trainer.separable`.
        trainer: str, name of the trainer's class.

    Raises:
        ValueError: If the batch may not be cut and `accumulation` is above 1.
    """
    if accumulation > 1 and not separable:
        raise ValueError(
            f"The loss of {trainer} compares the samples of a batch with one another, so that "
            "parts of it have other losses than the whole. Received: "
            f"accumulation={accumulation}. Use 1, and gradient checkpointing or a smaller batch to "
            "save memory."
        )


def check_compute_dtype(dtype: str) -> None:
    """Refuse to compute in float16.

    Args:
        dtype: str, name of the dtype that a network computes in.

    Raises:
        ValueError: For float16.
    """
    if dtype == "float16":
        raise ValueError(
            "Gradients of float16 vanish without loss scaling, which this loop does not have. "
            "Received: a network that computes in float16. Use bfloat16, such as "
            "dtype='mixed_bfloat16'."
        )
