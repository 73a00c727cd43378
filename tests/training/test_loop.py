"""The loop: what a step computes, what a resumed run computes, and what goes wrong."""

import errno
import signal
import time
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image
from tiny_trainer import SIZE, TinyData, TinyTrainer, TwoGroups

from kdiffusion.training import Loop, LoopSettings
from kdiffusion.training.loop import checkpoints, gradients, interruption
from kdiffusion.training.loop import loop as loop_module
from kdiffusion.training.loop import report
from kdiffusion.training.loop.report import read_log


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Plot no curves, which takes longer than training these."""
    monkeypatch.setattr(report, "plot_curves", lambda _: None)


def make(folder, trainer=None, optimizer=None, data=None, **settings):
    settings = {"batch_size": 8, "verbose": False, "jit_compile": False, **settings}
    return Loop(
        trainer or TinyTrainer(),
        optimizer or keras.optimizers.SGD(0.1),
        data or TinyData(),
        folder,
        LoopSettings(**settings),
    )


def values(variables):
    return [ops.convert_to_numpy(variable.value).copy() for variable in variables]


def weights(loop):
    return values(loop.trainer.trainable_variables)


def state(loop):
    return [
        *weights(loop),
        *values(loop.optimizers["model"].variables),
        *values(loop.averages.variables),
    ]


def norm(arrays):
    return np.sqrt(sum((np.asarray(array, np.float64) ** 2).sum() for array in arrays))


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_is_that_of_fit(tmp_path):
    trainer = TinyTrainer()
    trainer.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    trainer.fit({"images": TinyData().images}, batch_size=8, shuffle=False, verbose=0)
    loop = make(tmp_path)
    loop.run(4)
    for a, b in zip(weights(loop), values(trainer.trainable_variables), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_resumed_run_is_an_undisturbed_one(tmp_path):
    settings = {"accumulation": 2, "clip_norm": 0.2, "ema_decay": 0.9, "save_every": 3}
    settings |= {"log_every": 4}
    whole = make(tmp_path / "whole", optimizer=keras.optimizers.AdamW(0.01), **settings)
    whole.run(11)
    for steps in (5, 6, 11):
        part = make(tmp_path / "parts", optimizer=keras.optimizers.AdamW(0.01), **settings)
        last = part.run(steps)
    assert part.step == 11
    assert_equal(state(part), state(whole))
    logs = [read_log(tmp_path / name) for name in ("parts", "whole")]
    # Each part ends with a line of its own.
    assert [entry["step"] for entry in logs[0]] == [4, 5, 6, 8, 11]
    assert logs[0][3]["loss"] == pytest.approx(np.mean([e["loss"] for e in logs[1][1:2]]), abs=0.1)
    assert last == {name: logs[0][-1][name] for name in ("loss", "level", "gradient_norm")}


def test_the_log_of_a_killed_run_is_that_of_an_undisturbed_one(tmp_path):
    class Killed(TinyData):
        def batch(self, step, size):
            if step == 6:
                raise RuntimeError("killed")
            return super().batch(step, size)

    with pytest.raises(RuntimeError):
        make(tmp_path / "parts", data=Killed(), save_every=3, log_every=5).run(12)
    make(tmp_path / "parts", save_every=3, log_every=5).run(12)
    make(tmp_path / "whole", save_every=3, log_every=5).run(12)
    first, second = (
        [{**entry, "images_per_second": 0} for entry in read_log(tmp_path / name)]
        for name in ("parts", "whole")
    )
    assert first == second and [entry["step"] for entry in first] == [5, 10, 12]


def test_one_loop_can_run_on(tmp_path):
    loop = make(tmp_path / "a")
    loop.run(2)
    loop.run(2)
    loop.run(5)
    whole = make(tmp_path / "b")
    whole.run(5)
    assert_equal(weights(loop), weights(whole))


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    loops = [make(tmp_path / str(n), accumulation=n) for n in (1, 4)]
    for loop in loops:
        loop.run(3)
    for a, b in zip(*map(weights, loops), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_gradients_are_clipped_together(tmp_path):
    start = values(TinyTrainer().trainable_variables)
    free = make(tmp_path / "free", optimizer=keras.optimizers.SGD(1.0))
    size = free.run(1)["gradient_norm"]
    moved = [a - b for a, b in zip(weights(free), start)]
    assert norm(moved) == pytest.approx(size, rel=1e-4)
    clipped = make(tmp_path / "clip", optimizer=keras.optimizers.SGD(1.0), clip_norm=size / 4)
    assert clipped.run(1)["gradient_norm"] == pytest.approx(size, rel=1e-5)
    for part, whole in zip([a - b for a, b in zip(weights(clipped), start)], moved):
        np.testing.assert_allclose(part, whole / 4, atol=1e-6)
    loose = make(tmp_path / "loose", optimizer=keras.optimizers.SGD(1.0), clip_norm=size * 4)
    loose.run(1)
    assert_equal(weights(loose), weights(free))


def test_averages_follow_by_the_formula(tmp_path):
    loop = make(tmp_path, ema_decay=0.2, accumulation=2)
    expected = weights(loop)
    for step in range(4):
        loop.run(step + 1)
        decay = min(0.2, (1 + step) / (10 + step))
        expected = [decay * a + (1 - decay) * w for a, w in zip(expected, weights(loop))]
    for average, value in zip(values(loop.averages.variables), expected, strict=True):
        np.testing.assert_allclose(average, value, atol=1e-6)


def test_averaged_weights_are_lent(tmp_path):
    loop = make(tmp_path, ema_decay=0.9)
    loop.run(3)
    own, averages = weights(loop), values(loop.averages.variables)
    with pytest.raises(KeyError):
        with loop.averages.applied():
            assert_equal(weights(loop), averages)
            raise KeyError
    assert_equal(weights(loop), own)
    assert_equal(values(loop.averages.variables), averages)


def test_each_loss_moves_its_own_variables(tmp_path):
    optimizers = {"first": keras.optimizers.SGD(0.1), "second": keras.optimizers.SGD(0.01)}
    loop = make(tmp_path, TwoGroups(), optimizers)
    logs = loop.run(1)
    x = TinyData().images[:8].mean(axis=(0, 1, 2))
    np.testing.assert_allclose(values([loop.trainer.a])[0], 1 - 0.1 * (2 + x), rtol=1e-5)
    np.testing.assert_allclose(values([loop.trainer.b])[0], 1 - 0.01 * 2 * (3 + x), rtol=1e-5)
    assert logs["gradient_norm/second"] == pytest.approx(norm([2 * (3 + x)]), rel=1e-5)
    assert logs["loss/first"] == pytest.approx((2 + x).sum(), rel=1e-5)


def test_one_optimizer_is_copied_for_each_group(tmp_path):
    loop = make(tmp_path, TwoGroups(), keras.optimizers.Adam(0.5))
    assert len({id(optimizer) for optimizer in loop.optimizers.values()}) == 2
    loop.run(1)
    np.testing.assert_allclose(values([loop.trainer.b])[0], 0.5, atol=1e-4)


class Scalars(TinyTrainer):
    """A trainer with a variable of one number, as CLIP's temperature is."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def losses(self, batch, key, step):
        losses, figures = super().losses(batch, key, step)
        return {"model": losses["model"] * self.scale**2}, figures


@pytest.mark.parametrize("optimizer", ["Nadam", "AdamW", "Adafactor"])
def test_optimizers_move_chunks_as_they_move_all(tmp_path, monkeypatch, optimizer):
    loops = []
    for chunk in (1 << 26, 1024):
        monkeypatch.setattr(gradients, "_CHUNK", chunk)
        loop = make(tmp_path / str(chunk), Scalars(), getattr(keras.optimizers, optimizer)(0.01))
        loop.run(3)
        loops.append(loop)
    rows = [(variable,) for variable in loops[0].trainer.trainable_variables]
    assert len(list(gradients.chunks(rows))) > 1
    for a, b in zip(*map(state, loops), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


class BrokenData(TinyData):
    """Data whose sample 19 is NaN in some epochs."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs

    def batch(self, step, size):
        batch = super().batch(step, size)
        if step * size // 32 in self.epochs:
            batch["images"] = np.where(
                (batch["sample"] == 19)[:, None, None, None], np.float32("nan"), batch["images"]
            )
        return batch


def test_a_step_that_is_not_finite_is_skipped(tmp_path):
    loop = make(tmp_path, data=BrokenData([0]), ema_decay=0.9, max_skipped=1)
    loop.run(2)
    before = state(loop)
    with pytest.warns(UserWarning, match=r"step 2, samples \[19\]: the step is skipped"):
        loop.run(3)
    assert_equal(state(loop), before)
    loop.run(8)
    assert {"step": 3, "skipped": [19]} in read_log(tmp_path)
    assert np.isfinite(norm(state(loop)))
    assert int(values([loop.optimizers["model"].iterations])[0]) == 7


def test_too_many_steps_in_a_row_stop_the_run(tmp_path):
    class Hopeless(TinyData):
        def batch(self, step, size):
            batch = super().batch(step, size)
            if step >= 3:
                batch["images"] = batch["images"] * np.float32("inf")
            return batch

    loop = make(tmp_path, data=Hopeless(), max_skipped=2, save_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"at step 5, samples \[8, 9,.*3 steps in a row"):
            loop.run(20)
    assert checkpoints.newest(tmp_path).step == 4
    # The count goes on where it was.
    loop = make(tmp_path, data=Hopeless(), max_skipped=2, save_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"at step 5, .*3 steps in a row"):
            loop.run(20)


@pytest.mark.parametrize("change", ["seed", "batch_size", "clip_norm", "optimizer", "data", "loss"])
def test_another_run_is_refused(tmp_path, change, monkeypatch):
    make(tmp_path).run(1)
    changes = {
        "seed": {"seed": 1},
        "batch_size": {"batch_size": 16},
        "clip_norm": {"clip_norm": 1.0},
        "optimizer": {"optimizer": keras.optimizers.SGD(0.2)},
        "data": {},
        "loss": {},
    }
    if change == "data":
        monkeypatch.setattr(TinyData, "batch", lambda *_: {"label": np.arange(8)})
    if change == "loss":
        monkeypatch.setattr(TinyTrainer, "configuration", {"caption_dropout": 0.5})
    loop = make(tmp_path, **changes[change])
    before = weights(loop)
    with pytest.raises(ValueError, match="belongs to another run.*was .* and is "):
        loop.run(2)
    assert_equal(weights(loop), before)


def test_other_fixed_weights_are_another_run(tmp_path):
    class Frozen(TinyTrainer):
        @property
        def groups(self):
            return {"model": self.trainable_variables[2:]}

    make(tmp_path, Frozen()).run(1)
    trainer = Frozen()
    trainer.trainable_variables[0].assign(trainer.trainable_variables[0] + 1.0)
    with pytest.raises(ValueError, match="another run: fixed was"):
        make(tmp_path, trainer).run(2)


def test_what_computes_nothing_may_change(tmp_path):
    make(tmp_path, accumulation=1, save_every=1).run(2)
    assert make(tmp_path, accumulation=4, save_every=9, log_every=1, keep=5).run(3)


def test_a_failed_save_keeps_the_one_before(tmp_path, monkeypatch):
    loop = make(tmp_path, save_every=2)
    loop.run(2)
    write = checkpoints.write_safetensors

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_safetensors", fail)
    with pytest.warns(UserWarning, match="step 4 could not be saved: .*No space left.*of step 2"):
        with pytest.raises(ValueError, match="step 5 could not be saved.*still in memory"):
            loop.run(5)
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-00000002"]
    monkeypatch.setattr(checkpoints, "write_safetensors", write)
    loop.run(6)
    assert checkpoints.newest(tmp_path).step == 6


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_saves(tmp_path, capfd, monkeypatch, number, code):
    entered = []

    class Watched(interruption.Interruption):
        def __enter__(self):
            entered.append(self)
            return super().__enter__()

    class Signalling(TinyData):
        def batch(self, step, size):
            if step == 3:
                # Not `os.kill`, whose signal may go to one of the backend's threads, and come late.
                signal.raise_signal(number)
                while not entered[0].signal:  # a thread notes it
                    time.sleep(0.01)
            return super().batch(step, size)

    monkeypatch.setattr(loop_module, "Interruption", Watched)
    with pytest.raises(SystemExit) as exit_:
        make(tmp_path, data=Signalling()).run(100)
    assert exit_.value.code == code
    assert checkpoints.newest(tmp_path).step == 4
    assert "once more to stop at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_pictures_are_drawn_with_averaged_weights(tmp_path):
    seen = []

    class Drawing(TinyTrainer):
        def samples(self, count):
            seen.append(values(self.trainable_variables))
            return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones(
                (1, SIZE, SIZE, 3), np.uint8
            )

    loop = make(tmp_path, Drawing(), ema_decay=0.9, sample_every=2, num_samples=3)
    loop.run(2)
    assert_equal(seen[0], values(loop.averages.variables))
    picture = np.asarray(Image.open(tmp_path / "samples" / "step-00000002.png"))
    assert picture.shape == (2 * SIZE, 2 * SIZE, 3)
    assert [picture[0, 0, 0], picture[0, SIZE, 0], picture[SIZE, 0, 0], picture[-1, -1, 0]] == [
        *(0, 1, 2),
        0,
    ]


def test_a_folder_serves_one_process(tmp_path):
    with checkpoints.locked(tmp_path):
        with pytest.raises(ValueError, match="Another process trains in"):
            make(tmp_path).run(1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        make(tmp_path / "file" / "run").run(1)


def test_what_cannot_be_done_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compares the samples of a batch"):
        make(tmp_path, TwoGroups(), accumulation=2)
    with pytest.raises(ValueError, match=r"each of the groups \['first', 'second'\]"):
        make(tmp_path, TwoGroups(), {"first": keras.optimizers.SGD()})
    for name in ("use_ema", "gradient_accumulation_steps", "global_clipnorm"):
        with pytest.raises(ValueError, match=name):
            make(tmp_path, optimizer=keras.optimizers.SGD(0.1, **{name: 2}))
    with pytest.raises(ValueError, match="float16 rather|rather than float16"):
        inner = keras.optimizers.SGD(0.1)
        make(tmp_path, optimizer=keras.optimizers.LossScaleOptimizer(inner))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"batch_size": 8.0},
        {"accumulation": 3},
        {"clip_norm": 0.0},
        {"ema_decay": 1.0},
        {"seed": -1},
        {"keep": 1},
        {"sample_every": 0},
        {"max_skipped": True},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`.*Received|must be a multiple"):
        LoopSettings(**{"batch_size": 8, **settings})
