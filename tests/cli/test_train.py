"""`kdiffusion train` with a stand-in for the job: options, files, exit codes.

`acceptance/training_command.py` trains whole models with it; `training/test_configuration.py` has
the configurations that are refused.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from tiny_trainer import TinyData, TinyTrainer

from kdiffusion import cli
from kdiffusion.training.config import build
from kdiffusion.training.loop import report
from kdiffusion.training.loop.report import read_log

ROOT = Path(__file__).parents[2]
# Plain graphs where there are any: compiling takes longer than these runs.
LOOP = {"batch_size": 4, "log_every": 1, "save_every": 2, "jit_compile": False, "ema_decay": 0.5}

pytestmark = pytest.mark.backend


class Saving(TinyTrainer):
    """A trainer whose saved model is a file of its weights."""

    def save(self, folder):
        folder.mkdir()
        np.savez(folder / "weights.npz", *[v.numpy() for v in self.trainable_variables])


@pytest.fixture(autouse=True)
def jobs(tmp_path, monkeypatch):
    """Give an empty folder, and the arguments of the jobs that are made."""
    made = []

    def make_job(configuration, progress, folder):
        made.append((configuration, progress, folder))
        return build.Job(Saving(), keras.optimizers.SGD(0.1), TinyData(), configuration)

    monkeypatch.setattr(build, "make_job", make_job)
    monkeypatch.setattr(report, "plot_curves", lambda _: None)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"))
    monkeypatch.chdir(tmp_path)
    return made


def train(*options, kind="diffusion", output="run", **values):
    command = ["train", kind, "--output", output, *options]
    if values:
        Path("config.json").write_text(json.dumps({"preset": "random-tiny", **values}))
        command += ["--config", "config.json"]
    return cli.main(command)


def losses(folder="run"):
    return [entry["loss"] for entry in read_log(Path(folder)) if "loss" in entry]


def weights(folder):
    with np.load(Path(folder) / "model" / "weights.npz") as file:
        return [file[name] for name in file.files]


def test_a_run_is_trained_written_and_resumed(jobs, capsys):
    assert train(output="whole", loop=LOOP, steps=4) == cli.OK
    assert capsys.readouterr().out == f"{Path('whole', 'model')}\n"
    made = json.loads(Path("whole/config.json").read_text())
    assert (made["kind"], made["preset"], made["steps"]) == ("diffusion", "random-tiny", 4)
    assert made["objective"]["caption_dropout"] == 0.1 and made["loop"]["clip_norm"] == 1.0
    averages = Path("whole/step-00000004/averages.safetensors").read_bytes()
    assert weights("whole")[0].tobytes() in averages

    # This is what a run leaves that was killed between the steps 2 and 4, and moved.
    shutil.copytree("whole", "run", ignore=shutil.ignore_patterns("step-00000004", "model"))
    Path("config.json").unlink()
    assert train("--resume") == cli.OK
    assert "Resumed from step-00000002" in capsys.readouterr().err
    assert losses() == losses("whole") and len(losses()) == 4
    for one, other in zip(weights("run"), weights("whole"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jobs[0][0] == jobs[1][0]
    assert [folder for *_, folder in jobs] == [Path("whole"), Path("run")]

    # A longer run takes the place of the model.
    assert train("--resume", "--steps", "6", "--quiet") == cli.OK
    assert capsys.readouterr() == (f"{Path('run', 'model')}\n", "")
    assert np.any(weights("run")[0] != weights("whole")[0])
    assert json.loads(Path("run/config.json").read_text())["steps"] == 6
    assert not [path for path in Path("run").iterdir() if path.name.startswith(".model")]


def test_options_go_over_the_file(jobs):
    values = {"data": {"folder": "there", "height": 8}, "seed": 3, "steps": 9}
    options = ["--data", "here", "--width", "16", "--cache", "cache", "--steps", "1"]
    options += ["--batch-size", "6", "--accumulation", "3", "--learning-rate", "1e-3"]
    assert train(*options, "--dtype", "mixed_bfloat16", **values) == cli.OK
    configuration, progress, _ = jobs[0]
    data, loop = configuration.data, configuration.loop
    assert (data.folder, data.height, data.width, data.cache) == ("here", 8, 16, "cache")
    assert (loop.batch_size, loop.accumulation, loop.seed, loop.verbose) == (6, 3, 3, True)
    assert configuration.optimizer.learning_rate == 1e-3
    assert (configuration.steps, configuration.dtype) == (1, "mixed_bfloat16")
    assert progress is not None


def test_a_quiet_run_says_nothing_of_the_cache(jobs, capsys):
    assert train("--preset", "random-tiny", "--steps", "1", "--quiet") == cli.OK
    assert jobs[0][1] is None
    assert capsys.readouterr().err == ""


def test_progress_of_the_cache_is_one_line_in_a_file(jobs, capsys):
    assert train("--preset", "random-tiny", "--steps", "1") == cli.OK
    capsys.readouterr()
    for done in (4, 8):
        jobs[0][1](done, 8)
    assert capsys.readouterr().err == "kdiffusion: cached 8\n"


def test_files_that_are_no_configurations(jobs, capsys):
    for text, message in (
        ("[1]", "holds a list"),
        ("{", "cannot be read as JSON"),
        ('{"steps": NaN}', "NaN is no number of JSON"),
        ('{"steps": 1, "steps": 2}', "the key 'steps' stands there twice"),
        ('{"kind": "clip"}', "is the configuration of a run of 'clip'"),
    ):
        Path("config.json").write_text(text)
        assert train("--config", "config.json") == cli.FAILED
        assert message in capsys.readouterr().err
    assert train("--config", "nowhere.json") == cli.FAILED
    assert "'nowhere.json' cannot be read" in capsys.readouterr().err
    assert not jobs and not Path("run").exists()


def test_a_folder_with_something_in_it_is_not_touched_unless_resumed(jobs, capsys):
    Path("run/step-00000001").mkdir(parents=True)
    assert train("--preset", "random-tiny") == cli.FAILED
    assert "continue a run by --resume" in capsys.readouterr().err
    assert not jobs and [path.name for path in Path("run").iterdir()] == ["step-00000001"]


def test_there_has_to_be_something_to_resume(jobs, capsys):
    assert train("--resume") == cli.FAILED
    assert "'run' holds no config.json to resume by" in capsys.readouterr().err
    assert not jobs


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["diffusion"],
        ["lora", "--output", "run"],
        ["clip", "--output", "run", "--steps", "0"],
        ["clip", "--output", "run", "--learning-rate", "-1"],
        ["clip", "--output", "run", "--learning-rate", "nan"],
    ],
)
def test_command_lines_that_are_wrong(arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", *arguments])
    assert left.value.code == 2


def test_a_signal_saves_and_leaves_with_its_code(monkeypatch, capsys):
    batch = TinyData.batch

    def signalling(data, step, size):
        if step == 5:  # of which a thread makes the batch, while another is trained with
            signal.raise_signal(signal.SIGINT)
        return batch(data, step, size)

    monkeypatch.setattr(TinyData, "batch", signalling)
    with pytest.raises(SystemExit) as left:
        train(loop=LOOP | {"save_every": 10**6}, steps=10**6)
    assert left.value.code == 130
    out, err = capsys.readouterr()
    assert out == "" and "SIGINT: stopping after this step" in err
    saved = [path.name for path in Path("run").glob("step-*")]
    assert saved == [f"step-{len(losses()):08d}"]
    assert not Path("run/model").exists()


def test_help_imports_no_framework():
    script = """
import sys
from kdiffusion import cli
try:
    cli.main(["train", "--help"])
finally:
    assert not {"keras", "tensorflow", "jax", "numpy"} & sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "" and "--resume" in done.stdout
