"""Killed and resumed training is undisturbed training, step by step and bit by bit.

    python tests/acceptance/training_resume.py [--kills N] [--steps N]

First a small run is killed again and again, at random moments and inside saves; each time the
newest checkpoint must verify and be at most one interval old. Then a diffusion model with texts is
trained with accumulation, averages and caption dropout, killed, interrupted and resumed.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import keras
from training_runs import (
    Latents,
    Run,
    TellingData,
    arrays,
    differing,
    diffusion_trainer,
    largest_difference,
    slow_saves,
    tiny_loop,
)

from kdiffusion.training import Loop, LoopSettings
from kdiffusion.training.loop import checkpoints
from kdiffusion.training.loop.report import read_log

INTERVAL = 3
LOSS_BAR = 1e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        check_kills(Path(folder), arguments.kills, arguments.steps, failures)
        check_diffusion(Path(folder), arguments.steps, failures)
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


def train_tiny(say, folder, steps, seed):
    with slow_saves(say, seed):
        tiny_loop(folder, say, save_every=INTERVAL).run(steps)


def check_kills(folder, kills, steps, failures):
    whole = folder / "whole"
    expect(Run(train_tiny, whole, steps, 0).end() == 0, "the undisturbed run failed", failures)
    choose = random.Random(0)
    inside, oldest, runs, part = 0, 0, 0, folder / "part-0"
    for kill in range(kills):
        run = Run(train_tiny, part, steps, kill)
        done = kill_at_random(run, choose)
        saving = any(word.startswith(("save ", "before", "after")) for word in run.said[-1:])
        inside += saving
        if done is None and not run.said:
            failures.append(f"kill {kill}: the process said nothing")
            continue
        saved = checkpoints.newest(part) if done else None
        age = (done or 0) - (saved.step if saved else 0)
        oldest = max(oldest, age)
        expect(age <= INTERVAL, f"kill {kill}: the checkpoint is {age} steps old", failures)
        if saved is not None and saved.step >= steps - INTERVAL:
            finish(part, whole, steps, failures)
            runs += 1
            part = folder / f"part-{runs}"
    finish(part, whole, steps, failures)
    print(
        f"{kills} kills, {inside} of them inside saves: the newest checkpoint always verified and "
        f"was at most {oldest} steps old, one every {INTERVAL}"
    )
    print(f"{runs + 1} runs of {steps} steps that were killed, compared with an undisturbed one")
    expect(inside >= kills // 4, f"only {inside} kills fell inside saves", failures)


def kill_at_random(run, choose):
    """Kill a run some words after it began; returns how many steps were done then."""
    left = choose.randint(1, 40)
    while left and run.hear():
        left -= 1
    time.sleep(choose.uniform(0.0, 0.02))
    run.kill()
    run.end()
    steps = [int(word.split()[1]) for word in run.said if word.startswith(("done", "save "))]
    return max(steps, default=None)


def finish(part, whole, steps, failures):
    """Let a killed run end, and compare it with the undisturbed one."""
    code = Run(train_tiny, part, steps, 0).end()
    expect(code == 0, f"a resumed run ended with {code}", failures)
    compare(part, whole, failures)


def compare(part, whole, failures):
    different = differing(arrays(part), arrays(whole))
    loss = largest_difference(read_log(part), read_log(whole), "loss")
    expect(different == 0, f"{part.name}: {different} arrays are not bit-equal", failures)
    expect(loss <= LOSS_BAR, f"{part.name}: losses differ by {loss:.2g}", failures)
    return different, loss


def train_diffusion(say, folder, steps):
    settings = LoopSettings(
        batch_size=4,
        accumulation=2,
        clip_norm=1.0,
        ema_decay=0.999,
        save_every=7,
        log_every=1,
        verbose=False,
        jit_compile=False,
    )
    data = TellingData(say, Latents())
    Loop(diffusion_trainer(), keras.optimizers.AdamW(1e-3), data, folder, settings).run(steps)


def check_diffusion(folder, steps, failures):
    whole, part = folder / "diffusion-whole", folder / "diffusion-part"
    expect(Run(train_diffusion, whole, steps).end() == 0, "the undisturbed run failed", failures)
    plan = ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130))
    for number, (kind, expected) in enumerate(plan, 1):
        run = Run(train_diffusion, part, steps)
        stop = f"done {number * steps // 4}"
        while (word := run.hear()) and word != stop:
            pass
        run.kill(kind)
        code = run.end()
        expect(code == expected, f"{kind.name} gave the exit code {code}", failures)
    expect(Run(train_diffusion, part, steps).end() == 0, "the last part failed", failures)
    different, loss = compare(part, whole, failures)
    count = len(arrays(whole)[1])
    print(
        f"diffusion model, {steps} steps, stopped three times: {count - different} of {count} "
        f"arrays bit-equal, losses equal to {loss:.1g}"
    )


def expect(condition, failure, failures):
    if not condition:
        failures.append(failure)


if __name__ == "__main__":
    main()
