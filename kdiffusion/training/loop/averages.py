"""Exponential moving averages of weights, which generate better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import keras
from keras import ops


def warmed_up(decay: float, updates: int) -> float:
    """Return the decay of one update, which is lower at first, so that the start is forgotten.

    Args:
        decay: float in [0, 1), the final decay.
        updates: int, how many updates came before.

    Returns:
        `min(decay, (1 + updates) / (10 + updates))`, as `tf.train.ExponentialMovingAverage` has it.
    """
    return min(decay, (1.0 + updates) / (10.0 + updates))


class Averages:
    """Averages of trainable variables; one step of the optimizers is one update.

    Args:
        groups: dictionary of lists of variables, see `Trainer.groups`.
        decay: float in [0, 1), or `None` for no averages.
    """

    def __init__(self, groups: Mapping[str, Sequence[keras.Variable]], decay: float | None):
        self.decay = decay
        self._followed = [] if decay is None else [v for group in groups.values() for v in group]
        # These are copies, because JAX lets a variable take over a value's memory.
        self.variables = [
            keras.Variable(ops.copy(v.value), dtype="float32", trainable=False, name=f"average_{i}")
            for i, v in enumerate(self._followed)
        ]

    def decay_at(self, updates: int) -> float:
        """Return the decay of the next update, see `warmed_up`."""
        return warmed_up(self.decay or 0.0, updates)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model its averaged weights within a scope.

        The weights are kept and put back bit by bit. That takes the memory that gradients have
        during a step.
        """
        kept = [ops.copy(variable.value) for variable in self._followed]
        try:
            for average, variable in zip(self.variables, self._followed):
                variable.assign(ops.cast(average.value, variable.dtype))
            yield
        finally:
            for value, variable in zip(kept, self._followed):
                variable.assign(value)
