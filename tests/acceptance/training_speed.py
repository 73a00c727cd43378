"""Training speed against PyTorch, and a full-size Stable Diffusion 1.5 within 20 GiB.

    python tests/acceptance/training_speed.py [--only ratio|full]

The ratio: a step of AdamW on the same U-Net, batch and float32, here and with diffusers, in two
processes that take turns; the median of the pairs' ratios. The full size: five steps of AdamW at
256 x 256 pixels, batch 1, with gradient checkpointing and cached latents and texts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

RATIO = 0.9  # of PyTorch's speed, at least
PAIRS = 7
LIMIT = 20 * 2**30  # bytes, of the whole process at its peak
STEPS = 5
BATCH, SIDE, TOKENS, WIDTH = 4, 32, 77, 256
ARCHITECTURE = {
    "channels": (128, 256, 384),
    "depths": (1, 1, 1),
    "num_heads": (8, 8, 8),
    "context_width": WIDTH,
}
RATE = 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("ratio", "full"))
    parser.add_argument("--worker", choices=("ours", "theirs", "full"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        WORKERS[arguments.worker]()
        return
    passed = []
    if arguments.only != "full":
        passed.append(compare())
    if arguments.only != "ratio":
        passed.append(full_size())
    sys.exit(not all(passed))


# ── the ratio ─────────────────────────────────────────────────────────────────────────────────


def compare():
    ours, theirs = Worker("ours"), Worker("theirs")
    pairs = []
    for _ in range(2):  # compilation, and what settles after it
        ours.step(), theirs.step()
    for pair in range(PAIRS):
        # Who comes first takes turns too.
        order = (ours, theirs) if pair % 2 else (theirs, ours)
        seconds = {worker: worker.step() for worker in order}
        pairs.append((seconds[ours], seconds[theirs]))
    assert ours.ask("parameters") == theirs.ask("parameters")
    ours.close(), theirs.close()
    for mine, other in pairs:
        print(f"ours {mine:6.2f} s, PyTorch {other:6.2f} s, ratio {other / mine:.3f}")
    ratio = float(np.median([other / mine for mine, other in pairs]))
    print(f"median of {PAIRS} pairs: {ratio:.3f} of PyTorch's speed, bar {RATIO}", flush=True)
    return ratio >= RATIO


class Worker:
    """A process that makes a step of training each time it is asked to."""

    def __init__(self, name):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what):
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def step(self):
        return self.ask("step")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(step, parameters):
    """Answer questions from the standard input until it ends."""
    for line in sys.stdin:
        if line.strip() == "parameters":
            print(json.dumps(parameters), flush=True)
            continue
        begin = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - begin), flush=True)


def our_worker():
    import keras
    from keras import ops

    from kdiffusion import DiffusionModel, Schedule
    from kdiffusion.models.architectures import DiffusionArchitecture
    from kdiffusion.training import DiffusionTrainer
    from kdiffusion.training.loop import gradients

    network = DiffusionModel(DiffusionArchitecture(**ARCHITECTURE))
    trainer = DiffusionTrainer(network, Schedule())
    optimizers = {"model": keras.optimizers.AdamW(RATE, weight_decay=1e-2)}
    optimizers["model"].build(trainer.groups["model"])
    programs = gradients.programs(trainer, optimizers, ())
    batch = cached_batch(BATCH, SIDE, TOKENS, WIDTH)

    def step():
        found = programs.gradients(None, batch, 0, 0)
        ops.convert_to_numpy(found.losses["model"])
        programs.apply(found.sums, {"model": 1.0}, 0.0)
        ops.convert_to_numpy(trainer.groups["model"][-1].value)

    serve(step, network.count_params())


def their_worker():
    import diffusers
    import torch

    network = diffusers.UNet2DConditionModel(
        block_out_channels=ARCHITECTURE["channels"],
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
    ).train()
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    batch = cached_batch(BATCH, SIDE, TOKENS, WIDTH)
    mean, logvar = (
        torch.from_numpy(batch[name].transpose(0, 3, 1, 2).copy()) for name in ("mean", "logvar")
    )
    context = torch.from_numpy(batch["context"])

    def step():
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (BATCH,))
        noisy = schedule.add_noise(latents, noise, timesteps)
        output = network(noisy, timesteps, encoder_hidden_states=context).sample
        torch.nn.functional.mse_loss(output, noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    serve(step, sum(parameter.numel() for parameter in network.parameters()))


def cached_batch(size, side, tokens, width):
    generator = np.random.default_rng(0)
    return {
        "mean": generator.standard_normal((size, side, side, 4), np.float32),
        "logvar": np.full((size, side, side, 4), -4.0, np.float32),
        "context": generator.standard_normal((size, tokens, width), np.float32),
        "index": np.arange(size, dtype=np.int32),
    }


# ── the full size ─────────────────────────────────────────────────────────────────────────────


def full_size():
    done = subprocess.run([sys.executable, __file__, "--worker", "full"])
    return done.returncode == 0


def full_worker():
    import keras
    from keras import ops

    from kdiffusion import DiffusionModel, Schedule
    from kdiffusion.training import DiffusionTrainer
    from kdiffusion.training.loop import gradients

    keras.utils.set_random_seed(0)
    network = DiffusionModel(gradient_checkpointing=True)
    trainer = DiffusionTrainer(network, Schedule())
    optimizers = {"model": keras.optimizers.AdamW(RATE, weight_decay=1e-2)}
    optimizers["model"].build(trainer.groups["model"])
    programs = gradients.programs(trainer, optimizers, (), jit_compile=False)
    batch = cached_batch(1, 256 // 8, TOKENS, network.architecture.context_width)
    print(f"{network.count_params():,} parameters, {os.uname().machine}", flush=True)
    losses = []
    for step in range(STEPS + 1):  # the last one only to see the loss
        begin = time.monotonic()
        # The same noise and timestep each time, so that losses can be compared.
        found = programs.gradients(None, batch, 0, 0)
        losses.append(float(ops.convert_to_numpy(found.losses["model"])[0]))
        if step < STEPS:
            programs.apply(found.sums, {"model": 1.0}, 0.0)
            done = f"step {step + 1}: {time.monotonic() - begin:5.1f} s, "
        else:
            done = "afterwards: "
        del found
        print(f"{done}loss {losses[-1]:.4f}, peak {peak() / 2**30:.2f} GiB", flush=True)
    falling = losses[-1] < losses[0] and np.isfinite(losses).all()
    print(
        f"{STEPS} steps of AdamW: loss {losses[0]:.4f} to {losses[-1]:.4f}, peak "
        f"{peak() / 2**30:.2f} GiB, limit {LIMIT / 2**30:.0f} GiB",
        flush=True,
    )
    sys.exit(not (falling and peak() <= LIMIT))


def peak():
    """Bytes, the largest resident size that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


WORKERS = {"ours": our_worker, "theirs": their_worker, "full": full_worker}

if __name__ == "__main__":
    main()
