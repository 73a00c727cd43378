"""The report of a run: a line of progress, a log, curves, grids of images, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdiffusion.files import replacing

LOG = "log.jsonl"
CURVES = "curves.png"

# A step is taken to last the median of so many; compilation and saves do not move it.
_TIMED_STEPS = 50
_SPEED = "images_per_second"


class Report:
    """The report of a run as it trains; a file that cannot be written is warned of.

    Args:
        folder: the run's folder.
        batch_size: int, images of a step.
        log_every: int, steps whose mean figures make a line of the log.
        verbose: bool, whether to print progress.
    """

    def __init__(self, folder: Path, batch_size: int, log_every: int, verbose: bool):
        self.folder = folder
        self._batch_size = batch_size
        self._log_every = log_every
        self._verbose = verbose
        self._durations: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._sums: dict[str, float] = {}
        self._count = 0
        self._tensorboard: Any = None
        self.last: dict[str, Any] = {}

    def resume(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Begin after a step, and drop the log's lines of later ones.

        Args:
            step: int.
            state: the value of `state` after that step.
        """
        state = state or {"sums": {}, "count": 0, "last": {}}
        self._sums, self._count = dict(state["sums"]), state["count"]
        self.last = dict(state["last"])
        self._write(lambda: _cut(self.folder / LOG, step))
        self._write(lambda: self._open_tensorboard(step))

    @property
    def state(self) -> dict[str, Any]:
        """The figures since the last line of the log, for `resume`."""
        return {"sums": self._sums, "count": self._count, "last": self.last}

    def step(self, step: int, steps: int, figures: Mapping[str, float], seconds: float) -> None:
        """Report a step that is done.

        Args:
            step: int, how many are done.
            steps: int, how many there will be.
            figures: dictionary of the figures to be averaged.
            seconds: float, how long it took.
        """
        self._durations.append(seconds)
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if step % self._log_every and step != steps:
            return
        means = {name: value / self._count for name, value in self._sums.items()}
        # JSON has no infinity.
        self.last = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
        self._sums, self._count = {}, 0
        seconds = statistics.median(self._durations)
        entry = {"step": step, **self.last, _SPEED: round(self._batch_size / seconds, 3)}
        self.event(entry)
        self._write(lambda: self._to_tensorboard(step, entry))
        self._print(_progress(entry, steps, (steps - step) * seconds), final=step == steps)

    def event(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        self._write(lambda: _append(self.folder / LOG, entry))

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._print(text, final=True)

    def images(self, step: int, images: np.ndarray) -> None:
        """Write images as a grid, `samples/step-00001000.png`.

        Args:
            step: int.
            images: (n, height, width, 3) uint8.
        """
        image = Image.fromarray(grid(images))

        def write():
            path = self.folder / "samples" / f"step-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                image.save(partial, format="png")

        self._write(write)
        self._write(lambda: self._image_to_tensorboard(step, image))

    def close(self) -> None:
        """Plot the curves and close TensorBoard's file."""
        self._write(lambda: plot_curves(self.folder))
        if self._tensorboard is not None:
            self._write(self._tensorboard.close)
            self._tensorboard = None

    def _write(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            warnings.warn(f"Training goes on, but its report is incomplete: {error}", stacklevel=3)

    def _print(self, text, final):
        if not self._verbose:
            return
        # On a terminal the line is written over; in a file each is one of its own.
        over = sys.stdout.isatty()
        print(
            f"\r{text}\x1b[K" if over else text, end="\n" if final or not over else "", flush=True
        )

    def _open_tensorboard(self, step):
        if importlib.util.find_spec("tensorboard") is None:
            return
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._tensorboard = EventFileWriter(str(self.folder / "tensorboard"))
        # TensorBoard then forgets the events of later steps.
        self._add_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def _to_tensorboard(self, step, entry):
        if self._tensorboard is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in entry.items()
            if name != "step" and value is not None
        ]
        self._add_event(step, summary=Summary(value=values))

    def _image_to_tensorboard(self, step, image):
        if self._tensorboard is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        content = BytesIO()
        image.save(content, format="png")
        summary = Summary.Image(
            width=image.width,
            height=image.height,
            colorspace=3,
            encoded_image_string=content.getvalue(),
        )
        self._add_event(step, summary=Summary(value=[Summary.Value(tag="samples", image=summary)]))

    def _add_event(self, step, **content):
        from tensorboard.compat.proto.event_pb2 import Event

        self._tensorboard.add_event(Event(wall_time=time.time(), step=step, **content))
        self._tensorboard.flush()


def grid(images: np.ndarray) -> np.ndarray:
    """Lay images side by side, in about as many rows as columns.

    Args:
        images: (n, height, width, 3) uint8.

    Returns:
        (rows * height, columns * width, 3) uint8, black where no images are left.
    """
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    whole = np.zeros((rows * columns, height, width, channels), np.uint8)
    whole[:count] = images
    whole = whole.reshape(rows, columns, height, width, channels)
    return whole.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log, without a last one that was cut short.

    Args:
        folder: the run's folder.

    Returns:
        One dictionary for each line: `step`, the mean figures since the line before, and
        `images_per_second`; or another event of a step.
    """
    path = folder / LOG
    return list(_entries(path)) if path.exists() else []


def plot_curves(folder: Path) -> Path | None:
    """Plot all figures of a run's log, one panel each, as `curves.png`.

    Args:
        folder: the run's folder.

    Returns:
        The path of the plot, or `None` without matplotlib or figures.
    """
    entries = [entry for entry in read_log(folder) if _SPEED in entry]
    names = list(dict.fromkeys(name for entry in entries for name in entry if name != "step"))
    if not names or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 2.8 * rows), layout="tight")
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
        axes.plot(*np.array(points or np.empty((0, 2))).T, color="#26323d", linewidth=1.0)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("step", fontsize=8)
    path = folder / CURVES
    figure.savefig(path)
    return path


def _progress(entry, steps, left):
    """Return a line of the step, the losses, the speed and the time left."""
    losses = " ".join(
        f"{name} {value:.4g}" for name, value in entry.items() if name.startswith("loss")
    )
    return f"{entry['step']}/{steps} {losses} {entry[_SPEED]:.4g} images/s {_clock(left)} left"


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _append(path, entry):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _entries(path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the process was killed while it wrote
            continue


def _cut(path, step):
    """Drop the lines of a log of later steps."""
    if not path.exists():
        return
    kept = [entry for entry in _entries(path) if entry["step"] <= step]
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
