"""The identity of a run: what its results depend on, compared when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kdiffusion.files import json_sha256
from kdiffusion.training.loop import checkpoints
from kdiffusion.training.loop.settings import FREE, LoopSettings
from kdiffusion.training.trainers.base import Trainer
from weights_conversion import CheckpointMismatch


def identity(
    trainer: Trainer, optimizers: Mapping[str, Any], data: Any, settings: LoopSettings
) -> dict[str, Any]:
    """Return what a run's results depend on, as values that JSON holds.

    Args:
        trainer: `Trainer`.
        optimizers: `optimizer_fields` of each group.
        data: object with the method `batch`. The names, shapes and whole numbers of its first
            batch count, such as tokens and labels, because no image decoder changes them.
        settings: `LoopSettings`.
    """
    groups = trainer.groups
    trained = {id(variable) for group in groups.values() for variable in group}
    fixed = [
        variable
        for variable in trainer.variables
        if id(variable) not in trained and variable is not trainer.steps
    ]
    return _plain(
        {
            "trainer": {"class": type(trainer).__name__, **trainer.configuration},
            "trained": {name: _shapes(trainer, group) for name, group in groups.items()},
            "fixed": checkpoints.fingerprint(checkpoints.named(trainer, fixed)),
            "optimizers": optimizers,
            "settings": settings_fields(settings),
            "data": _first_batch(data, settings.batch_size),
        }
    )


def settings_fields(settings: LoopSettings) -> dict[str, Any]:
    """Return the settings that a run's results depend on, by name."""
    return {name: value for name, value in asdict(settings).items() if name not in FREE}


def optimizer_fields(optimizer: keras.Optimizer) -> dict[str, Any]:
    """Return an optimizer's class and settings, without its name."""
    fields = {name: value for name, value in optimizer.get_config().items() if name != "name"}
    return {"class": type(optimizer).__name__, **fields}


def check_same(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse to resume another run.

    Args:
        path: the checkpoint, for the message.
        saved, own: `identity` of the run that it holds, and of the one to be resumed.

    Raises:
        CheckpointMismatch: If they differ.
    """
    saved_values, own_values = dict(_leaves("", saved)), dict(_leaves("", own))
    _compare(path, saved_values, own_values, {**saved_values, **own_values})


def check_known(folder: Path, known: Mapping[str, Any]) -> None:
    """Refuse a folder whose newest checkpoint belongs to another run, as far as that is known.

    It reads a manifest only, so it can be called before a model is opened.

    Args:
        folder: the run's folder, which need not exist.
        known: some of the values of `identity`, under the same keys.

    Raises:
        CheckpointMismatch: If one of them differs.
    """
    saved = checkpoints.peek(folder)
    if saved is not None:
        own = dict(_leaves("", _plain(known)))
        _compare(saved.path, dict(_leaves("", saved.notes["identity"])), own, own)


def _compare(path, saved_values, own_values, names):
    """Refuse values of two runs that differ."""
    names = [name for name in names if saved_values.get(name) != own_values.get(name)]
    if names:
        differences = "; ".join(
            f"{name} was {saved_values.get(name)!r} and is {own_values.get(name)!r}"
            for name in names[:5]
        )
        raise CheckpointMismatch(
            f"{path} belongs to another run: {differences}. Use the settings, model and data that "
            "it began with, or another folder."
        )


def _shapes(trainer, group):
    rows = checkpoints.named(trainer, group).items()
    return json_sha256(
        [[name, list(variable.shape), str(variable.dtype)] for name, variable in rows]
    )


def _first_batch(data, size):
    batch = {name: np.asarray(array) for name, array in data.batch(0, size).items()}
    return {
        name: [list(array.shape), json_sha256(array.tolist()) if array.dtype.kind in "iu" else ""]
        for name, array in sorted(batch.items())
    }


def _plain(value):
    """Return a value as JSON reads it back: lists for tuples, texts for keys."""
    return json.loads(json.dumps(value))


def _leaves(name, value):
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{name}/{key}" if name else key, part)
    else:
        yield name, value
