"""The base of all trainers: one pure function of losses, for Keras's `fit` and for `Loop`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

Batch = Mapping[str, Any]


class Trainer(keras.Model):
    """A model's training objective, as a Keras model.

    `losses` is a pure function of a batch, the run's seed and the step. `Loop` calls it, and so
    does Keras: `compile(optimizer)` and `fit` train on one device. `fit` raises an error for what
    it cannot do exactly and `Loop` can.

    A batch is a dictionary of arrays that lead with the batch axis, such as `images`
    (batch, height, width, 3) float32 in [-1, 1]. Its `index`, (batch,) int32, is the index of each
    sample in the step's global batch; without it the indices are 0 to batch - 1.

    Args:
        seed: int, of the random numbers of `fit`. `Loop` has a seed of its own.
        name: str.

    Attributes:
        separable: bool, whether the loss of a batch is the mean of its samples' losses, each
            computed alone.
        steps: int32 variable, how many steps `fit` has made.
    """

    separable = True

    def __init__(self, seed: int = 0, name: str | None = None):
        super().__init__(name=name)
        self.seed = seed
        # The optimizer's own count cannot be used, because Keras on JAX hides it from the loss.
        self.steps = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="steps"
        )
        # The networks are built when they are made, and the trainer itself has nothing to build.
        self.built = True

    @property
    def groups(self) -> dict[str, list[keras.Variable]]:
        """The trainable variables that each loss moves."""
        return {"model": self.trainable_variables}

    @property
    def configuration(self) -> dict[str, Any]:
        """The values, as JSON holds them, that losses depend on besides weights and batch.

        `Loop` resumes a run only with the configuration that it began with.
        """
        return {}

    def losses(self, batch: Batch, key: Any, step: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compute the losses of a batch; pure, and the same for each sample however it is cut.

        Args:
            batch: see the class.
            key: int or uint32 scalar, the seed of all random numbers.
            step: int32 scalar, the optimizer step, from 0.

        Returns:
            A dictionary from each of `groups` to the samples' losses, (batch,) float32, whose mean
            over the global batch the group's variables minimise; and a dictionary of further
            figures for the log, (batch,) or () float32.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define `losses`.")

    def prepare(self, data: Any) -> None:
        """Take from the data what `samples` and `save` need; `Loop` calls it before it trains.

        Args:
            data: object with the method `batch(step, size)`, see `Data`.
        """

    def samples(self, count: int) -> np.ndarray | None:
        """Return images that show the progress of training.

        Args:
            count: int, how many.

        Returns:
            (count, height, width, 3) uint8, or `None` if there is nothing to show.
        """
        return None

    def save(self, folder: str | os.PathLike) -> None:
        """Write the trained networks in diffusers' layout, whole or not at all.

        Args:
            folder: path of a folder that does not exist, or is empty.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define `save`.")

    def compile(self, optimizer: Any = "rmsprop", **settings: Any) -> None:
        """Prepare for `fit`; see `keras.Model.compile`.

        Args:
            optimizer: keras optimizer or its name.
            settings: `jit_compile`, `run_eagerly`, `steps_per_execution` and `auto_scale_loss`.

        Raises:
            ValueError: For settings that `fit` would treat wrongly or not at all.
        """
        _check_compile(keras.optimizers.get(optimizer), settings)
        super().compile(optimizer=optimizer, **settings)

    def fit(self, *arguments, **settings):
        """Train on one device; see `keras.Model.fit`. Batches are dictionaries, see the class.

        Raises:
            ValueError: On several replicas, or for weights of samples or classes.
        """
        self._check_fit(settings)
        return super().fit(*arguments, **settings)

    def call(self, batch: Batch, training: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compute `losses` of a batch at the step of `fit`; count the step in training."""
        results = self.losses(batch, self.seed, ops.convert_to_tensor(self.steps))
        if training:
            self.steps.assign_add(1)
        return results

    def stateless_call(self, *arguments, return_losses=False, **settings):
        """See `keras.Layer.stateless_call`; `losses` is a function here, so no list is returned."""
        returned = super().stateless_call(*arguments, **settings)
        return (*returned, []) if return_losses else returned

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Return the mean loss, which `fit` minimises by all trainable variables."""
        if y is not None or sample_weight is not None:
            raise ValueError(
                "A batch must be one dictionary: targets and sample weights have no meaning here. "
                f"Received: targets {type(y).__name__}, weights {type(sample_weight).__name__}. "
                "Leave out samples, or weight the loss in the objective."
            )
        losses, _ = y_pred
        return sum(ops.mean(loss) for loss in losses.values())

    def _check_fit(self, settings):
        for name in ("sample_weight", "class_weight"):
            if settings.get(name) is not None:
                raise ValueError(
                    f"`fit` takes no {name}. Received: {name} of type "
                    f"{type(settings[name]).__name__}. Leave out samples in place of weights of 0."
                )
        check_one_device(self)


class PartTrainer(Trainer):
    """A trainer with networks that are in no group, which `fit` leaves as they are."""

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """The variables of all groups; others stay fixed without `trainable=False`."""
        return [variable for group in self.groups.values() for variable in group]

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """The variables that are in no group."""
        trained = {id(variable) for variable in self.trainable_variables}
        return [variable for variable in self.variables if id(variable) not in trained]

    trainable_weights = trainable_variables
    non_trainable_weights = non_trainable_variables


def sample_index(batch: Batch) -> Any:
    """Return the `index` of a batch, or 0 to batch - 1 if it has none.

    Args:
        batch: see `Trainer`.

    Returns:
        (batch,) int32.
    """
    if "index" in batch:
        return ops.cast(batch["index"], "int32")
    return ops.arange(ops.shape(next(iter(batch.values())))[0], dtype="int32")


def _check_compile(optimizer, settings):
    wrong = {
        "loss": "the trainer computes its own",
        "loss_weights": "the trainer computes its own losses",
        "metrics": "Loop logs what `losses` returns",
        "weighted_metrics": "Loop logs what `losses` returns",
    }
    for name, reason in wrong.items():
        if settings.get(name) is not None:
            raise ValueError(
                f"`compile` takes no `{name}`: {reason}. Received: {name}={settings[name]!r}. "
                "Leave it out, or train with kdiffusion.training.Loop."
            )
    check_optimizer(optimizer)


def check_one_device(trainer: keras.Model) -> None:
    """Refuse to train on several devices.

    Args:
        trainer: `Trainer`.

    Raises:
        ValueError: Under a strategy of `tf.distribute` or a `keras.distribution`.
    """
    strategy = getattr(trainer, "distribute_strategy", None)
    replicas = 1 if strategy is None else strategy.num_replicas_in_sync
    distribution = keras.distribution.distribution()
    if replicas > 1 or distribution is not None:
        received = f"{replicas} replicas" if distribution is None else repr(distribution)
        raise ValueError(
            "Training runs on one device. On several, Keras would draw the same noise for each, "
            f"scale losses wrongly and clip before it adds up. Received: {received}. For larger "
            "batches use kdiffusion.training.Loop and its `accumulation`."
        )


def check_optimizer(optimizer: keras.Optimizer) -> None:
    """Refuse an optimizer that averages or accumulates, which only `Loop` does exactly.

    Args:
        optimizer: keras optimizer.

    Raises:
        ValueError: For averages and accumulation.
    """
    if optimizer.use_ema:
        raise ValueError(
            "Keras would overwrite the weights with their average at the end. Received: an "
            "optimizer with use_ema=True. Use kdiffusion.training.Loop and its `ema_decay`."
        )
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            "Keras would draw the same noise for every part of a batch. Received: an optimizer "
            f"with gradient_accumulation_steps={optimizer.gradient_accumulation_steps}. "
            "Use kdiffusion.training.Loop and its `accumulation`."
        )
