"""The training loop: accumulation, clipping, averages, exact resumption, and failures."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiffusion.training.loop import checkpoints, checks, gradients
from kdiffusion.training.loop.averages import Averages
from kdiffusion.training.loop.identity import check_same, identity, optimizer_fields
from kdiffusion.training.loop.interruption import Interruption
from kdiffusion.training.loop.report import Report
from kdiffusion.training.loop.settings import LoopSettings
from kdiffusion.training.trainers.base import Trainer, check_one_device
from weights_conversion import CheckpointError


class Loop:
    """A training run on one device, in a folder that it can be resumed from.

    The folder holds checkpoints, `log.jsonl`, `curves.png` with matplotlib, `samples/`, and
    TensorBoard's events if it is installed. A run that was killed and resumed computes the same as
    an uninterrupted one, step by step.

    Args:
        trainer: `Trainer`.
        optimizer: keras optimizer, or a dictionary of one for each of the trainer's groups.
        data: object with the method `batch(step, size)`, see `kdiffusion.training.data.batches`.
            If its batches hold `sample`, (size,) int, errors name samples by these numbers.
        folder: path of the run's folder.
        settings: `LoopSettings`.

    Attributes:
        step: int, how many steps are done.
        averages: `Averages`, the averaged weights.

    Raises:
        ValueError: If the parts do not fit each other.

    Example:

    ```python
    settings = LoopSettings(batch_size=64, accumulation=8, clip_norm=1.0, ema_decay=0.9999)
    loop = Loop(trainer, keras.optimizers.AdamW(1e-5), data, "runs/flowers", settings)
    loop.run(10_000)
    with loop.averages.applied():
        trainer.save("flowers")
    ```
    """

    def __init__(
        self,
        trainer: Trainer,
        optimizer: keras.Optimizer | Mapping[str, keras.Optimizer],
        data: Any,
        folder: str | os.PathLike,
        settings: LoopSettings,
    ):
        groups = trainer.groups
        self.trainer = trainer
        self.optimizers = _optimizers(optimizer, groups)
        self.data = data
        self.folder = Path(folder)
        self.settings = settings
        _check(trainer, self.optimizers, settings)
        for name, group in groups.items():
            self.optimizers[name].build(group)
        # They are read here, before anything is restored into the optimizers.
        self._optimizer_fields = {name: optimizer_fields(o) for name, o in self.optimizers.items()}
        self.averages = Averages(groups, settings.ema_decay)
        self._programs = gradients.programs(
            trainer, self.optimizers, self.averages.variables, settings.jit_compile
        )
        self._report = Report(
            self.folder, settings.batch_size, settings.log_every, settings.verbose
        )
        self.step = 0
        self._updates = 0
        self._skipped = 0
        self._saved: int | None = None
        self._started = False

    def run(self, steps: int) -> dict[str, float]:
        """Train until a number of steps is done, from the newest checkpoint if there is one.

        After Ctrl-C or SIGTERM the step ends, a checkpoint is saved, and the process exits with
        code 130 or 143. A second signal exits at once. A save that fails is warned of, and training
        continues.

        Args:
            steps: int, how many steps are to be done in all.

        Returns:
            The figures of the last line of the log.

        Raises:
            ValueError: If the folder holds a run with another configuration, if it is in use or
                cannot be written; if too many steps in a row had NaN or infinite gradients; or if
                the last save failed.
        """
        with checkpoints.locked(self.folder), Interruption() as interruption:
            self._start()
            try:
                while self.step < steps and not interruption.signal:
                    self._train_step(steps)
                    self._keep_up(final=self.step == steps or bool(interruption.signal))
            finally:
                self._report.close()
            if interruption.signal:
                raise SystemExit(128 + interruption.signal)
        return self._report.last

    def _start(self):
        """Resume the run in the folder or begin one; later calls continue it."""
        if self._started:
            self._report.resume(self.step, self._report.state)
            return
        checkpoints.remove_leftovers(self.folder)
        self.trainer.prepare(self.data)
        self._identity = identity(self.trainer, self._optimizer_fields, self.data, self.settings)
        saved = checkpoints.newest(self.folder)
        if saved is None:
            self._report.resume(0)
        else:
            self._restore(saved)
        self._started = True

    def _restore(self, saved):
        check_same(saved.path, saved.notes["identity"], self._identity)
        checkpoints.restore(saved, self._variables())
        progress = saved.notes["progress"]
        self.step = self._saved = saved.step
        self._updates, self._skipped = progress["updates"], progress["skipped"]
        self._report.resume(self.step, progress["report"])
        self._report.say(f"Resumed from {saved.path.name}.")

    def _train_step(self, steps):
        begin = time.monotonic()
        settings = self.settings
        batch = dict(self.data.batch(self.step, settings.batch_size))
        identities = batch.pop("sample", None)
        totals, losses, figures = self._accumulate(batch)
        norms = {
            name: math.sqrt(float(square)) / settings.accumulation
            for name, square in totals.squares.items()
        }
        finite = all(map(math.isfinite, norms.values()))
        finite = finite and all(np.isfinite(loss).all() for loss in losses.values())
        if finite:
            scales = {name: _scale(norm, settings) for name, norm in norms.items()}
            decay = self.averages.decay_at(self._updates)
            self._programs.apply(totals.sums, scales, decay)
            self._updates += 1
            self._skipped = 0
        else:
            self._skip(losses, identities)
        self.step += 1
        if finite:
            means = {_label("loss", name): _mean(loss) for name, loss in losses.items()}
            means |= {name: _mean(values) for name, values in figures.items()}
            means |= {_label("gradient_norm", name): norm for name, norm in norms.items()}
            self._report.step(self.step, steps, means, time.monotonic() - begin)

    def _accumulate(self, batch):
        """Compute a whole batch's gradients, and its losses and figures on the host."""
        size, parts = self.settings.batch_size, self.settings.accumulation
        batch.setdefault("index", np.arange(size, dtype=np.int32))
        totals, parts_of = None, []
        sums = self._programs.zeros() if parts > 1 else None
        for part in range(parts):
            window = slice(part * size // parts, (part + 1) * size // parts)
            micro = {name: array[window] for name, array in batch.items()}
            totals = self._programs.gradients(sums, micro, self.settings.seed, self.step)
            sums = totals.sums
            parts_of.append((totals.losses, totals.figures))
        losses, figures = (
            {name: np.concatenate([_flat(group[name]) for group in groups]) for name in groups[0]}
            for groups in zip(*parts_of)
        )
        return totals, losses, figures

    def _skip(self, losses, identities):
        """Note a step whose gradients are NaN or infinite and whose update is left out."""
        self._skipped += 1
        wrong = np.zeros(self.settings.batch_size, bool)
        for loss in losses.values():
            wrong |= ~np.isfinite(loss) if loss.shape == wrong.shape else False
        # If all losses are finite, any sample may be the cause.
        indices = np.flatnonzero(wrong if wrong.any() else ~wrong)
        samples = (indices if identities is None else np.asarray(identities)[indices]).tolist()
        self._report.event({"step": self.step + 1, "skipped": samples})
        what = "samples" if identities is not None else "places of the batch"
        message = f"NaN or infinite loss or gradients at step {self.step}, {what} {samples}"
        if self._skipped > self.settings.max_skipped:
            raise ValueError(
                f"{message}: {self._skipped} steps in a row, where max_skipped="
                f"{self.settings.max_skipped} are allowed. Training has stopped; the newest "
                "checkpoint is from before. Use a lower learning rate, `clip_norm` or float32, and "
                "look at these samples."
            )
        warnings.warn(f"{message}: the step is skipped.", stacklevel=4)

    def _keep_up(self, final):
        """Save a checkpoint and sample images when it is time to."""
        settings = self.settings
        if final or self.step % settings.save_every == 0:
            self._save(final)
        if settings.sample_every and self.step % settings.sample_every == 0:
            with self.averages.applied():
                images = self.trainer.samples(settings.num_samples)
            if images is not None:
                self._report.images(self.step, images)

    def _save(self, final):
        progress = {
            "updates": self._updates,
            "skipped": self._skipped,
            "report": self._report.state,
        }
        notes = {"identity": self._identity, "progress": progress}
        try:
            checkpoints.save(self.folder, self.step, self._variables(), notes)
            checkpoints.prune(self.folder, self.settings.keep)
            self._saved = self.step
        except (OSError, CheckpointError) as error:
            kept = "none" if self._saved is None else f"that of step {self._saved}"
            message = (
                f"The checkpoint of step {self.step} could not be saved: {error} "
                f"The newest is {kept}."
            )
            if final:
                raise CheckpointError(
                    f"{message} The trained weights are still in memory."
                ) from error
            warnings.warn(f"{message} Training goes on.", stacklevel=3)

    def _variables(self):
        trained = [variable for group in self.trainer.groups.values() for variable in group]
        files = {
            "weights": checkpoints.named(self.trainer, trained),
            "optimizers": checkpoints.slots(self.optimizers),
        }
        if self.averages.variables:
            files["averages"] = dict(zip(files["weights"], self.averages.variables))
        return files


def _optimizers(optimizer, groups):
    """Return an optimizer for each group."""
    if isinstance(optimizer, Mapping):
        if optimizer.keys() != groups.keys():
            raise ValueError(
                f"There must be an optimizer for each of the groups {sorted(groups)}. "
                f"Received: optimizers for {sorted(optimizer)}"
            )
        return dict(optimizer)
    if len(groups) == 1:
        return dict.fromkeys(groups, optimizer)
    return {name: optimizer.from_config(optimizer.get_config()) for name in groups}


def _check(trainer, optimizers, settings):
    """Refuse what this loop would do wrongly."""
    check_one_device(trainer)
    for optimizer in optimizers.values():
        checks.check_optimizer(optimizer)
    name = type(trainer).__name__
    checks.check_accumulation(settings.accumulation, trainer.separable, name)
    for layer in trainer.layers:
        checks.check_compute_dtype(layer.compute_dtype)


def _scale(norm, settings):
    """Return the factor that makes a sum over micro-batches a mean of limited norm."""
    limit = settings.clip_norm
    within = 1.0 if limit is None or norm <= limit else limit / norm
    return within / settings.accumulation


def _label(figure, group):
    return figure if group == "model" else f"{figure}/{group}"


def _flat(values):
    return np.reshape(ops.convert_to_numpy(values), -1)


def _mean(values):
    return float(np.mean(values, dtype=np.float64))
