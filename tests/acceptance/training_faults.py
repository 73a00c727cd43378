"""Training and what goes wrong around it: full disks, damaged checkpoints, NaN, signals.

    python tests/acceptance/training_faults.py

Each fault is met by a process of its own. The newest checkpoint must survive it, and the message
must say what to do.
"""

import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from training_runs import Run, TellingData, slow_saves, tiny_loop

from kdiffusion.training.loop import checkpoints
from kdiffusion.training.loop.report import read_log

NOBODY = 65534


def main():
    failures = []
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o777)
        for check in CHECKS:
            folder = Path(root) / check.__name__
            folder.mkdir(mode=0o777)
            os.chmod(folder, 0o777)
            try:
                print(f"{check.__name__.removeprefix('check_').replace('_', ' ')}: {check(folder)}")
            except AssertionError as error:
                failures.append(f"{check.__name__}: {error}")
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


@contextlib.contextmanager
def telling_warnings(say):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: say(f"warning {message}")
        yield


def train(say, folder, steps, data=None, **settings):
    with telling_warnings(say):
        tiny_loop(folder, say, data, **{"save_every": 2, **settings}).run(steps)


def begin(folder, steps=4):
    expect(Run(train, folder, steps).end() == 0, "training failed")


def expect(condition, failure):
    if not condition:
        raise AssertionError(failure)


def warned(run, *words):
    texts = [text for text in run.said if text.startswith("warning")]
    return any(all(word in text for word in words) for text in texts)


def refused(run, *words):
    code = run.end()
    texts = [text for text in run.said if text.startswith("error")]
    expect(code == 1, f"exit code {code}")
    expect(any(all(w in text for w in words) for text in texts), f"said only {run.said[-2:]}")


def survives(folder, run, step):
    """Training went on after failed saves, failed only in the end, and kept its checkpoint."""
    refused(run, "could not be saved", f"that of step {step}", "still in memory")
    expect(warned(run, f"that of step {step}. Training goes on"), "no warning")
    expect(f"done {step + 4}" in run.said, "training stopped")
    saved = checkpoints.newest(folder)
    expect(saved.step == step, f"the newest checkpoint is of step {saved.step}")
    expect(not list(folder.glob(".step-*")), "remains of a save are left")
    return f"warned, trained on, and kept the checkpoint of step {step}"


def check_disk_full(folder):
    begin(folder)

    def limited(say):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        train(say, folder, 10)

    return survives(folder, Run(limited), 4)


def check_disk_full_before_the_save(folder):
    begin(folder)

    def limited(say):
        usage = shutil.disk_usage(folder)._replace(free=1000)
        shutil.disk_usage = lambda path: usage
        train(say, folder, 10)

    return survives(folder, Run(limited), 4)


def check_read_only_folder(folder):
    begin(folder)
    for path in (folder, *folder.rglob("*")):
        os.chmod(path, 0o777 if path.is_dir() else 0o666)

    def limited(say):
        loop = tiny_loop(folder, say, save_every=2)
        loop.run(4)
        os.chmod(folder, 0o555)
        if os.getuid() == 0:  # who may write everywhere
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        with telling_warnings(say):
            loop.run(10)

    result = survives(folder, Run(limited), 4)
    os.chmod(folder, 0o777)
    return result


def damage(folder, how):
    file = max(folder.glob("step-*")) / "weights.safetensors"
    content = bytearray(file.read_bytes())
    if how == "cut":
        del content[-100:]
    else:
        content[len(content) // 2] ^= 16
    file.write_bytes(content)


def check_cut_checkpoint(folder, how="cut"):
    begin(folder)
    damage(folder, how)
    run = Run(train, folder, 6)
    expect(run.end() == 0, "training failed")
    expect(warned(run, "step-00000004 is damaged", "the one before it is used"), "no warning")
    steps = [int(word.split()[1]) for word in run.said if word.startswith("done")]
    expect(steps[1:] == [2, 3, 4, 5], f"steps {steps}")
    return "set aside, with a warning, and trained on from the one before"


def check_flipped_bit(folder):
    return check_cut_checkpoint(folder, "flip")


def check_no_whole_checkpoint(folder):
    begin(folder, 2)
    damage(folder, "flip")
    refused(Run(train, folder, 4), "None of the 1 checkpoints", "Move them away")
    return "refused, and nothing begun anew"


def check_other_settings(folder):
    begin(folder)

    def other(say):
        train(say, folder, 6, seed=5)

    refused(Run(other), "settings/seed was 0 and is 5", "or another folder")
    return "refused"


def check_second_process(folder):
    first = Run(train, folder, 100_000)
    while first.hear() != "done 3":
        pass
    refused(Run(train, folder, 10), "Another process trains in")
    first.kill()
    first.end()
    return "refused"


class Nan(TellingData):
    """Sample 5 is NaN from a step on."""

    first = 3

    def batch(self, step, size):
        batch = super().batch(step, size)
        if step >= self.first:
            batch["images"] = batch["images"].copy()
            batch["images"][5] = np.nan
        return batch


def check_nan(folder):
    def broken(say):
        train(say, folder, 20, Nan(say), max_skipped=2)

    run = Run(broken)
    refused(run, "at step 5, samples [13]", "3 steps in a row", "lower learning rate")
    expect(warned(run, "at step 3, samples [29]", "skipped"), "no warning")
    skipped = [entry["skipped"] for entry in read_log(folder) if "skipped" in entry]
    expect(skipped == [[29], [5], [13]], f"the log has {skipped}")
    saved = checkpoints.newest(folder)
    arrays = [
        array
        for path in saved.path.glob("*.safetensors")
        for array in checkpoints.open_safetensors(path).values()
    ]
    expect(all(np.isfinite(array).all() for array in arrays), "the checkpoint is not finite")
    return "two steps skipped and counted, stopped at the third; the checkpoint is finite"


def check_signals(folder):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = Run(train, folder / number.name, 100_000)
        while run.hear() != "done 7":
            pass
        run.kill(number)
        ended = run.end()
        expect(ended == code, f"{number.name} gave {ended}")
        last = max(int(word.split()[1]) for word in run.said if word.startswith("done"))
        saved = checkpoints.newest(folder / number.name)
        expect(saved.step == last + 1, f"step {last + 1} was the last, {saved.step} is saved")
    return "SIGTERM gave 143 and SIGINT 130, with a checkpoint of the last step"


def check_second_signal(folder):
    class Slow(TellingData):
        def batch(self, step, size):
            batch = super().batch(step, size)
            if step == 5:
                time.sleep(60)
            return batch

    def slow(say):
        train(say, folder, 10, Slow(say))

    run = Run(slow)
    while run.hear() != "done 5":
        pass
    begin = time.monotonic()
    run.kill(signal.SIGINT)
    time.sleep(0.5)
    run.kill(signal.SIGTERM)
    code, seconds = run.end(), time.monotonic() - begin
    expect(code == 143, f"exit code {code}")
    expect(seconds < 20, f"it took {seconds:.0f} s")
    expect(checkpoints.newest(folder).step == 4, "the checkpoint is lost")
    return "exited at once, within a step of a minute"


def check_signal_within_a_save(folder):
    def saving(say):
        with slow_saves(say, 0):
            train(say, folder, 100)

    run = Run(saving)
    while run.hear() != "save 4":
        pass
    run.kill(signal.SIGTERM)
    expect(run.end() == 143, "wrong exit code")
    expect(checkpoints.newest(folder).step >= 4, "the save was not ended")
    return "the save was ended"


CHECKS = (
    check_disk_full,
    check_disk_full_before_the_save,
    check_read_only_folder,
    check_cut_checkpoint,
    check_flipped_bit,
    check_no_whole_checkpoint,
    check_other_settings,
    check_second_process,
    check_nan,
    check_signals,
    check_second_signal,
    check_signal_within_a_save,
)

if __name__ == "__main__":
    main()
