"""One Keras optimizer made of several, each for a group of variables."""

from __future__ import annotations

from collections.abc import Mapping

import keras

from kdiffusion.training.trainers.base import check_optimizer


class GroupOptimizer(keras.optimizers.Optimizer):
    """An optimizer that applies to each group of variables one of its own, in one step of `fit`.

    Keras compiles a model with a single optimizer. Clipping, decay and schedules are those of the
    group's optimizer.

    Args:
        optimizers: dictionary of keras optimizers by group.
        groups: dictionary of the variables of each group.

    Raises:
        ValueError: If they are not for the same groups, or one of them averages or accumulates,
            which only `Loop` does exactly.

    Example:

    ```python
    GroupOptimizer(
        {"autoencoder": keras.optimizers.Adam(1e-4), "discriminator": keras.optimizers.Adam(4e-4)},
        trainer.groups,
    )
    ```
    """

    def __init__(
        self,
        optimizers: Mapping[str, keras.optimizers.Optimizer],
        groups: Mapping[str, list[keras.Variable]],
    ):
        super().__init__(learning_rate=0.0, name="group_optimizer")
        if set(optimizers) != set(groups):
            raise ValueError(
                f"Each of the groups {sorted(groups)} needs one optimizer. "
                f"Received: optimizers of {sorted(optimizers)}."
            )
        self.optimizers = {
            group: keras.optimizers.get(optimizer) for group, optimizer in optimizers.items()
        }
        for optimizer in self.optimizers.values():
            check_optimizer(optimizer)
        # The keys are ids, because a Keras optimizer takes variables in its attributes as its own.
        self._group_of = {id(v): group for group, members in groups.items() for v in members}

    def build(self, variables):
        for group, optimizer in self.optimizers.items():
            optimizer.build([v for v in variables if self._group_of[id(v)] == group])
        super().build(variables)

    @property
    def variables(self):
        """The variables of all optimizers, and the count of steps."""
        own = super().variables
        return own + [v for optimizer in self.optimizers.values() for v in optimizer.variables]

    @property
    def learning_rate(self):
        raise AttributeError(
            "Each group has a learning rate of its own: `optimizers[group].learning_rate`."
        )

    def apply(self, grads, trainable_variables=None):
        """Apply gradients, one for each variable that this was built with."""
        if trainable_variables is None:
            trainable_variables = self._trainable_variables
        pairs = list(zip(grads, trainable_variables))
        for group, optimizer in self.optimizers.items():
            own = [pair for pair in pairs if self._group_of[id(pair[1])] == group]
            optimizer.apply([gradient for gradient, _ in own], [v for _, v in own])
        self._iterations.assign_add(1)
