"""Trainers in Keras's own `fit`: what it does, and what is refused."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny_trainer import TinyTrainer, TwoGroups, pictures

from kdiffusion.training.trainers.base import sample_index
from kdiffusion.training.trainers.group_optimizer import GroupOptimizer


def compiled(jit_compile=False):
    trainer = TinyTrainer()
    trainer.compile(keras.optimizers.Adam(0.01), jit_compile=jit_compile)
    return trainer


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_learns(jit_compile):
    trainer = compiled(jit_compile)
    history = trainer.fit({"images": pictures(32)}, batch_size=8, epochs=4, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert int(ops.convert_to_numpy(trainer.steps.value)) == 16


def test_fit_draws_anew_at_each_step():
    trainer = compiled()
    trainer.optimizer.learning_rate.assign(0.0)
    images = {"images": pictures(8)}
    losses = trainer.fit(images, batch_size=8, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert len(set(losses)) == 3
    again = compiled()
    again.optimizer.learning_rate.assign(0.0)
    assert (
        again.fit(images, batch_size=8, epochs=3, shuffle=False, verbose=0).history["loss"]
        == losses
    )


def test_evaluation_moves_nothing():
    trainer = compiled()
    first = trainer.evaluate({"images": pictures(8)}, batch_size=8, verbose=0)
    assert trainer.evaluate({"images": pictures(8)}, batch_size=8, verbose=0) == first


def test_each_group_follows_its_own_optimizer():
    trainer = TwoGroups()
    optimizers = {"first": keras.optimizers.SGD(0.1), "second": keras.optimizers.SGD(0.0)}
    trainer.compile(GroupOptimizer(optimizers, trainer.groups), jit_compile=False)
    trainer.fit({"images": pictures(4)}, batch_size=4, verbose=0)
    moved = [np.any(variable.numpy() != 1.0) for variable in (trainer.a, trainer.b, trainer.c)]
    assert moved == [True, False, False]
    assert [v.name for v in trainer.non_trainable_variables if v is not trainer.steps] == ["c"]


def test_the_index_of_samples_is_given_or_counted():
    images = pictures(3)
    np.testing.assert_array_equal(sample_index({"images": images}), [0, 1, 2])
    np.testing.assert_array_equal(
        sample_index({"images": images, "index": np.array([4, 5, 6])}), [4, 5, 6]
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "mse"},
        {"metrics": ["mae"]},
        {"weighted_metrics": ["mae"]},
        {"loss_weights": [1.0]},
        {"optimizer": keras.optimizers.SGD(0.1, use_ema=True)},
        {"optimizer": keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)},
    ],
)
def test_what_fit_cannot_do_names_the_loop(settings):
    with pytest.raises(ValueError, match="kdiffusion.training.Loop"):
        TinyTrainer().compile(**{"optimizer": "sgd", **settings})


def test_weights_and_targets_are_refused():
    trainer, images = compiled(), {"images": pictures(8)}
    with pytest.raises(ValueError, match="takes no sample_weight"):
        trainer.fit(images, sample_weight=np.ones(8), verbose=0)
    with pytest.raises(ValueError, match="takes no class_weight"):
        trainer.fit(images, class_weight={0: 1.0}, verbose=0)
    with pytest.raises(ValueError, match="A batch must be one dictionary"):
        trainer.fit(images, np.zeros(8), verbose=0)


def test_several_devices_are_refused(monkeypatch):
    trainer = compiled()
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "DataParallel")
    with pytest.raises(ValueError, match="Received: 'DataParallel'.*kdiffusion.training.Loop"):
        trainer.fit({"images": pictures(8)}, verbose=0)
