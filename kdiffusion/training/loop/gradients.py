"""Gradients and the optimizers' steps as compiled programs, for TensorFlow and for JAX.

There are two programs: one adds the gradients of a micro-batch to those before it, the other moves
the weights. On TensorFlow, weights, slots and averages are variables that change in place. On JAX
they are arguments whose memory the results take over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np
from keras import ops

from kdiffusion.runtime import backend
from kdiffusion.runtime.programs import use_jit
from kdiffusion.training.trainers.base import Trainer

# TensorFlow's graph moves so many bytes of variables at a time. It starts every operation that can
# start, so with all variables at once it would hold temporary copies of all of them.
_CHUNK = 1 << 26

Optimizers = Mapping[str, keras.Optimizer]


class Gradients(NamedTuple):
    """The results of a micro-batch.

    Args:
        sums: dictionary from each group to its variables' gradients, added up over micro-batches.
        squares: dictionary from each group to the sum of the squares of `sums`.
        losses: dictionary from each group to the samples' losses, (micro-batch,) float32.
        figures: dictionary of further figures.
    """

    sums: dict[str, list[Any]]
    squares: dict[str, Any]
    losses: dict[str, Any]
    figures: dict[str, Any]


class Programs(Protocol):
    """The two programs of a trainer."""

    def gradients(self, sums: Any, batch: Mapping[str, np.ndarray], seed: int, step: int):
        """Add the gradients of a micro-batch's mean losses to those before it.

        Args:
            sums: `Gradients.sums` of the micro-batches before; `zeros()` for the first of several,
                `None` for an only one.
            batch: the micro-batch.
            seed: int, the run's seed.
            step: int, the optimizer step.

        Returns:
            `Gradients`.
        """

    def zeros(self) -> dict[str, list[Any]]:
        """Return the gradients of no micro-batch."""

    def apply(self, sums: Any, scales: Mapping[str, float], decay: float) -> None:
        """Move the weights, then their averages.

        Args:
            sums: `Gradients.sums`.
            scales: dictionary of the factor of each group's gradients.
            decay: float, how much of the averages stays.
        """


def programs(
    trainer: Trainer,
    optimizers: Optimizers,
    averages: Sequence[keras.Variable],
    jit_compile: bool | str = "auto",
) -> Programs:
    """Return the programs of a trainer on Keras's backend.

    Args:
        trainer: `Trainer`.
        optimizers: a built optimizer for each of the trainer's groups.
        averages: variables that follow all groups' variables, in order; empty for none.
        jit_compile: bool or `"auto"`, whether TensorFlow uses XLA, see `programs.use_jit`.
    """
    if backend.name() == "jax":
        return _JaxPrograms(trainer, optimizers, averages)
    return _TensorFlowPrograms(trainer, optimizers, averages, use_jit(jit_compile))


class _TensorFlowPrograms:
    def __init__(self, trainer, optimizers, averages, jit_compile):
        import tensorflow as tf

        self._trainer = trainer
        self._groups = trainer.groups
        self._optimizers = optimizers
        self._averages = _by_group(self._groups, averages)
        compiled = tf.function(autograph=False, jit_compile=jit_compile)
        self._gradients = compiled(self._trace_gradients)
        self._apply = compiled(self._trace_apply)

    def gradients(self, sums, batch, seed, step):
        batch = {name: ops.convert_to_tensor(array) for name, array in batch.items()}
        seed = ops.convert_to_tensor(seed, "uint32")
        return self._gradients(sums, batch, seed, ops.convert_to_tensor(step, "int32"))

    def zeros(self):
        return _zeros(self._groups)

    def apply(self, sums, scales, decay):
        scales = {name: ops.convert_to_tensor(scale, "float32") for name, scale in scales.items()}
        self._apply(sums, scales, ops.convert_to_tensor(decay, "float32"))

    def _trace_gradients(self, sums, batch, seed, step):
        import tensorflow as tf

        sources = _values(self._groups)
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            for group in sources.values():
                for source in group:
                    tape.watch(source)
            losses, figures = self._trainer.losses(batch, seed, step)
            losses = {name: ops.cast(loss, "float32") for name, loss in losses.items()}
            means = {name: ops.mean(loss) for name, loss in losses.items()}
        added = {}
        for name, group in sources.items():
            found = tape.gradient(means[name], group, unconnected_gradients="zero")
            # An embedding gives slices; these are made dense.
            found = [ops.cast(tf.convert_to_tensor(gradient), "float32") for gradient in found]
            added[name] = found if sums is None else [a + b for a, b in zip(sums[name], found)]
        # This makes no temporary copy, as ops.sum(ops.square(x)) would.
        squares = {
            name: 2.0 * sum(tf.nn.l2_loss(gradient) for gradient in group)
            for name, group in added.items()
        }
        return Gradients(added, squares, losses, figures)

    def _trace_apply(self, sums, scales, decay):
        for name, optimizer in self._optimizers.items():
            rows = list(zip(self._groups[name], sums[name], self._averages[name]))
            self._trace_optimizer(optimizer, rows, scales[name], decay)

    def _trace_optimizer(self, optimizer, rows, scale, decay):
        """Make one step of an optimizer, some variables after the other."""
        import tensorflow as tf

        # Scalars such as the step's number belong to no variable, and move once.
        shared = [v for v in optimizer.variables if len(v.shape) == 0]
        start = [ops.copy(v.value) for v in shared]
        before: list[Any] = []
        for chunk in chunks(rows):
            variables, gradients, averages = zip(*chunk)
            with tf.control_dependencies(before):
                for variable, value in zip(shared, start if before else ()):
                    variable.assign(value)
                optimizer.apply([scale * gradient for gradient in gradients], variables)
                for average, variable in zip(averages, variables):
                    if average is not None:
                        average.assign(_follow(average.value, variable.value, decay))
                before = [tf.group(*(tf.identity(v.value) for v in (*variables, *shared)))]


class _JaxPrograms:
    def __init__(self, trainer, optimizers, averages):
        import jax

        self._trainer = trainer
        self._groups = trainer.groups
        self._optimizers = optimizers
        self._averages = averages
        trained = {id(variable) for group in self._groups.values() for variable in group}
        self._fixed = [v for v in trainer.variables if id(v) not in trained]
        self._gradients = jax.jit(self._trace_gradients, donate_argnums=2)
        self._apply = jax.jit(self._trace_apply, donate_argnums=(0, 1, 2))

    def gradients(self, sums, batch, seed, step):
        trained, fixed = _values(self._groups), [variable.value for variable in self._fixed]
        return self._gradients(trained, fixed, sums, batch, np.uint32(seed), np.int32(step))

    def zeros(self):
        return _zeros(self._groups)

    def apply(self, sums, scales, decay):
        slots = {name: optimizer.variables for name, optimizer in self._optimizers.items()}
        moved = (self._groups, slots, {"all": self._averages})
        scales = {name: np.float32(scale) for name, scale in scales.items()}
        values = self._apply(*map(_values, moved), sums, scales, np.float32(decay))
        for groups, new in zip(moved, values):
            for name, group in groups.items():
                for variable, value in zip(group, new[name]):
                    variable.assign(value)

    def _trace_gradients(self, trained, fixed, sums, batch, seed, step):
        import jax

        def losses_of(changed, name):
            """Compute a group's mean loss from its variables; return all losses and figures too."""
            values = {**trained, name: changed}
            mapping = [
                pair for group in self._groups for pair in zip(self._groups[group], values[group])
            ]
            with keras.StatelessScope(state_mapping=[*mapping, *zip(self._fixed, fixed)]):
                losses, figures = self._trainer.losses(batch, seed, step)
            losses = {group: ops.cast(loss, "float32") for group, loss in losses.items()}
            return ops.mean(losses[name]), (losses, figures)

        added: dict[str, list[Any]] = {}
        squares = {}
        # With several groups the forward pass is traced for each; XLA computes it once.
        for name, group in trained.items():
            found, (losses, figures) = jax.grad(losses_of, has_aux=True)(group, name)
            found = [ops.cast(gradient, "float32") for gradient in found]
            added[name] = found if sums is None else [a + b for a, b in zip(sums[name], found)]
            squares[name] = sum(ops.sum(ops.square(gradient)) for gradient in added[name])
        return Gradients(added, squares, losses, figures)

    def _trace_apply(self, trained, slots, averages, sums, scales, decay):
        for name, optimizer in self._optimizers.items():
            gradients = [scales[name] * gradient for gradient in sums[name]]
            new, new_slots = optimizer.stateless_apply(slots[name], gradients, trained[name])
            trained, slots = {**trained, name: new}, {**slots, name: new_slots}
        followed = [value for name in self._groups for value in trained[name]]
        averages = [_follow(a, v, decay) for a, v in zip(averages["all"], followed)]
        return trained, slots, {"all": averages}


def _zeros(groups):
    return {name: [ops.zeros(v.shape, "float32") for v in group] for name, group in groups.items()}


def _values(groups):
    return {name: [variable.value for variable in group] for name, group in groups.items()}


def _follow(average, value, decay):
    return average + (1.0 - decay) * (ops.cast(value, average.dtype) - average)


def _by_group(groups, averages):
    """Split the averages by group; without averages use `None` for each variable."""
    rest = iter(averages)
    return {name: [next(rest, None) for _ in group] for name, group in groups.items()}


def chunks(rows: Iterable[tuple]) -> Iterator[list[tuple]]:
    """Yield rows of (variable, ...) in chunks of limited size, small variables in the last."""
    small: list[Any] = []
    chunk: list[Any] = []
    size = 0
    for row in sorted(rows, key=lambda row: -_bytes(row[0])):
        if _bytes(row[0]) < _CHUNK // 16:
            small.append(row)
            continue
        if chunk and size + _bytes(row[0]) > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += _bytes(row[0])
    if chunk and small:
        yield chunk
        chunk = []
    yield chunk + small


def _bytes(variable):
    return 4 * int(np.prod(variable.shape))
