"""Make the optimizer of a configuration."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from kdiffusion.training.config.sections import OptimizerSettings


def make_optimizer(settings: OptimizerSettings, steps: int) -> keras.Optimizer:
    """Make the optimizer that a configuration asks for.

    Args:
        settings: `OptimizerSettings`.
        steps: int, of the whole run.

    Raises:
        ValueError: If there is no such optimizer, or it does not take an argument.
    """
    classes: dict[str, Any] = {
        name.lower(): value
        for name, value in vars(keras.optimizers).items()
        if inspect.isclass(value) and issubclass(value, keras.Optimizer)
    }
    del classes["optimizer"]
    if settings.name.lower() not in classes:
        raise ValueError(
            f"optimizer.name must be one of {', '.join(sorted(classes))}. "
            f"Received: {settings.name!r}"
        )
    try:
        return classes[settings.name.lower()](_learning_rate(settings, steps), **settings.settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.settings: {error}") from error


def _learning_rate(settings, steps):
    """Return the learning rate of each step, as a number where it is always the same."""
    if settings.decay == "constant" and not settings.warmup_steps:
        return settings.learning_rate
    return keras.optimizers.schedules.CosineDecay(
        0.0 if settings.warmup_steps else settings.learning_rate,
        decay_steps=max(steps - settings.warmup_steps, 1),
        # This is the share of the highest rate at the end: a cosine between equal numbers is
        # constant.
        alpha=1.0 if settings.decay == "constant" else 0.0,
        warmup_target=settings.learning_rate if settings.warmup_steps else None,
        warmup_steps=settings.warmup_steps,
    )
