"""The reports of a run: its log, its progress, its curves and grids."""

import json

import numpy as np
import pytest
from PIL import Image

from kdiffusion.training.loop import report
from kdiffusion.training.loop.report import Report, grid, plot_curves, read_log


def test_a_log_holds_means_between_its_lines(tmp_path, capsys):
    running = Report(tmp_path, batch_size=4, log_every=2, verbose=True)
    running.resume(0)
    for step in range(1, 6):
        running.step(step, 5, {"loss": float(step), "gradient_norm": 1.0}, seconds=2.0)
    entries = read_log(tmp_path)
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(2, 1.5), (4, 3.5), (5, 5.0)]
    assert entries[0]["images_per_second"] == 2.0
    assert running.last == {"loss": 5.0, "gradient_norm": 1.0}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2/5 loss 1.5 2 images/s 0:06 left"
    assert len(lines) == 3


def test_the_log_is_cut_where_a_run_is_resumed(tmp_path):
    running = Report(tmp_path, batch_size=1, log_every=2, verbose=False)
    running.resume(0)
    for step in range(1, 4):
        running.step(step, 9, {"loss": float(step)}, 1.0)
    state = json.loads(json.dumps(running.state))
    running.step(4, 9, {"loss": 4.0}, 1.0)
    running.event({"step": 4, "skipped": [1]})
    with open(tmp_path / report.LOG, "a") as file:
        file.write('{"step": 6, "lo')
    again = Report(tmp_path, batch_size=1, log_every=2, verbose=False)
    again.resume(3, state)
    assert [entry["step"] for entry in read_log(tmp_path)] == [2]
    again.step(4, 9, {"loss": 6.0}, 1.0)
    assert read_log(tmp_path)[-1]["loss"] == 4.5


def test_what_is_not_finite_is_null(tmp_path):
    running = Report(tmp_path, batch_size=1, log_every=1, verbose=False)
    running.resume(0)
    running.step(1, 2, {"loss": 1.0, "psnr": float("inf")}, 1.0)
    running.step(2, 2, {"loss": 1.0, "psnr": 20.0}, 1.0)
    assert [entry["psnr"] for entry in read_log(tmp_path)] == [None, 20.0]
    assert "Infinity" not in (tmp_path / report.LOG).read_text()
    running.close()
    assert (tmp_path / report.CURVES).exists()


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path):
    running = Report(tmp_path / "missing", batch_size=1, log_every=1, verbose=False)
    with pytest.warns(UserWarning, match="Training goes on, but its report is incomplete"):
        running.step(1, 2, {"loss": 1.0}, 1.0)


def test_grids_are_nearly_square():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((5, 2, 3, 3), np.uint8)
    whole = grid(pictures)
    assert whole.shape == (4, 9, 3)
    np.testing.assert_array_equal(whole[::2, ::3, 0], [[0, 1, 2], [3, 4, 0]])
    assert grid(pictures[:1]).shape == (2, 3, 3)


def test_pictures_are_replaced(tmp_path):
    running = Report(tmp_path, batch_size=1, log_every=1, verbose=False)
    for value in (1, 2):
        running.images(7, np.full((1, 4, 4, 3), value, np.uint8))
    picture = np.asarray(Image.open(tmp_path / "samples" / "step-00000007.png"))
    assert (picture == 2).all()
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_curves_need_figures(tmp_path):
    assert plot_curves(tmp_path) is None
    (tmp_path / report.LOG).write_text('{"step": 1, "skipped": [3]}\n')
    assert plot_curves(tmp_path) is None


def test_tensorboard_is_told(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    running = Report(tmp_path, batch_size=1, log_every=1, verbose=False)
    running.resume(0)
    for step in (1, 2, 3):
        running.step(step, 3, {"loss": float(step)}, 1.0)
    running.images(3, np.zeros((1, 4, 4, 3), np.uint8))
    running.close()
    running.resume(2)
    running.step(3, 3, {"loss": 5.0}, 1.0)
    running.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 5),
    ]
    assert events.Images("samples") == []  # of a step that was done anew
