"""Trainers small enough for tests, with what makes training hard to repeat: noise, dropout."""

import keras
import numpy as np
from keras import ops

from kdiffusion.training import random
from kdiffusion.training.trainers.base import PartTrainer, Trainer, sample_index

SIZE = 8


class TinyTrainer(Trainer):
    """A network of two layers that predicts the noise in pictures of 8 x 8 pixels."""

    def __init__(self, seed=0):
        super().__init__(seed=seed, name="tiny_trainer")
        inputs = keras.Input((SIZE, SIZE, 3))
        hidden = keras.layers.Conv2D(8, 3, padding="same", activation="silu", name="first")(inputs)
        outputs = keras.layers.Conv2D(3, 3, padding="same", name="second")(hidden)
        self.network = keras.Model(inputs, outputs, name="network")
        generator = np.random.default_rng(1)  # one start on both backends
        for variable in self.network.variables:
            variable.assign(0.1 * generator.standard_normal(variable.shape))

    def losses(self, batch, key, step):
        images, index = ops.convert_to_tensor(batch["images"]), sample_index(batch)
        noise = random.normal(key, step, index, (SIZE, SIZE, 3), random.NOISE)
        kept = random.uniform(key, step, index, (), random.CAPTION_DROPOUT) >= 0.1
        kept = ops.reshape(ops.cast(kept, "float32"), (-1, 1, 1, 1))
        level = ops.reshape(random.stratified(key, step, index), (-1, 1, 1, 1))
        error = self.network(kept * images + level * noise) - noise
        loss = ops.mean(error**2, axis=(1, 2, 3))
        return {"model": loss}, {"level": ops.reshape(level, (-1,))}


class TwoGroups(PartTrainer):
    """Two losses of three variables; each moves its own, and no loss moves the third."""

    separable = False

    def __init__(self):
        super().__init__(name="two_groups")
        self.a, self.b, self.c = (
            self.add_weight(shape=(3,), initializer="ones", name=name) for name in "abc"
        )

    @property
    def groups(self):
        return {"first": [self.a], "second": [self.b]}

    def losses(self, batch, key, step):
        x = self.c * ops.mean(ops.convert_to_tensor(batch["images"]), axis=(1, 2))
        first = ops.sum(self.a * self.b * (2.0 + x), axis=-1)
        second = ops.sum(self.a * self.b**2 * (3.0 + x), axis=-1)
        return {"first": first, "second": second}, {}


def pictures(count, seed=0):
    """Draw (count, 8, 8, 3) float32 in [-1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, SIZE, SIZE, 3)).astype(np.float32)


class TinyData:
    """Batches of `pictures`, as a pure function of the step."""

    def __init__(self, count=32):
        self.images = pictures(count)

    def batch(self, step, size):
        chosen = np.arange(step * size, (step + 1) * size) % len(self.images)
        return {
            "images": self.images[chosen],
            "index": np.arange(size, dtype=np.int32),
            "sample": chosen,
        }
