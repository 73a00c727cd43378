"""Gradient checkpointing: the same loss and gradients, and a peak of memory a third lower.

    python tests/acceptance/training_checkpointing.py [--jit auto|on|off]

A U-Net of more than 50 million parameters makes the gradients of a batch in fresh processes, with
and without checkpointing, on the backend in use. The peak is that of the whole process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BAR = 0.35  # share of the peak that checkpointing saves at least
CLOSE = 1e-4  # largest error of a gradient, relative to its variable's largest
BATCH, SIDE, TOKENS = 8, 32, 77
ARCHITECTURE = {
    "channels": (128, 256, 384),
    "depths": (1, 1, 1),
    "num_heads": (8, 8, 8),
    "context_width": 256,
}
JIT = {"auto": "auto", "on": True, "off": False}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jit", choices=sorted(JIT), default="auto", help="whether to use XLA")
    parser.add_argument("--only", choices=("plain", "checkpointed"), help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        plain, checkpointed = (
            in_a_fresh_process(arguments.jit, only, Path(folder, f"{only}.npz"))
            for only in ("plain", "checkpointed")
        )
        error = largest_error(Path(folder))
    saved = 1 - checkpointed["peak"] / plain["peak"]
    print(f"{plain['parameters'] / 1e6:.1f} million parameters, XLA {arguments.jit}")
    for name, figures in (("plain", plain), ("checkpointed", checkpointed)):
        print(
            f"{name:13s} peak {figures['peak'] / 2**20:6.0f} MiB, {figures['seconds']:5.1f} s, "
            f"loss {figures['loss']:.7f}"
        )
    loss_error = abs(checkpointed["loss"] / plain["loss"] - 1)
    print(f"loss differs by {loss_error:.1e}, gradients by {error:.1e}, bar {CLOSE:.0e}")
    print(f"peak lower by {saved:.1%}, bar {BAR:.0%}")
    large = plain["parameters"] >= 50e6
    sys.exit(not (saved >= BAR and error <= CLOSE and loss_error <= CLOSE and large))


def in_a_fresh_process(jit, only, path):
    command = [sys.executable, __file__, "--jit", jit, "--only", only, "--gradients", path]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def largest_error(folder):
    with np.load(folder / "plain.npz") as plain, np.load(folder / "checkpointed.npz") as other:
        assert set(plain) == set(other)
        errors = {}
        for path in plain:
            wanted = plain[path]
            errors[path] = np.abs(other[path] - wanted).max() / np.abs(wanted).max()
    return max(errors.values())


def measure(arguments):
    """Gradients twice, for the compilation to be done; prints a line of JSON."""
    import keras
    from keras import ops

    from kdiffusion import DiffusionModel, Schedule
    from kdiffusion.models.architectures import DiffusionArchitecture
    from kdiffusion.training import DiffusionTrainer
    from kdiffusion.training.loop import gradients

    keras.utils.set_random_seed(0)
    network = DiffusionModel(
        DiffusionArchitecture(**ARCHITECTURE),
        gradient_checkpointing=arguments.only == "checkpointed",
    )
    generator = np.random.default_rng(0)
    for variable in network.variables:  # the same weights on both backends
        scale = np.prod(variable.shape[:-1]) ** -0.5 if len(variable.shape) > 1 else 0.1
        variable.assign(scale * generator.standard_normal(variable.shape, np.float32))
    trainer = DiffusionTrainer(network, Schedule(prediction="v"))
    optimizer = keras.optimizers.SGD()
    optimizer.build(trainer.groups["model"])
    programs = gradients.programs(trainer, {"model": optimizer}, (), JIT[arguments.jit])
    batch = {
        "mean": generator.standard_normal((BATCH, SIDE, SIDE, 4), np.float32),
        "logvar": np.full((BATCH, SIDE, SIDE, 4), -4.0, np.float32),
        "context": generator.standard_normal((BATCH, TOKENS, 256), np.float32),
        "index": np.arange(BATCH, dtype=np.int32),
    }
    for _ in range(2):
        begin = time.monotonic()
        found = programs.gradients(None, batch, 0, 0)
        loss = float(np.mean(ops.convert_to_numpy(found.losses["model"])))
        seconds = time.monotonic() - begin
    highest = peak()
    paths = [variable.path for variable in trainer.groups["model"]]
    arrays = map(ops.convert_to_numpy, found.sums["model"])
    np.savez(arguments.gradients, **dict(zip(paths, arrays)))
    figures = {"peak": highest, "seconds": seconds, "loss": loss}
    print(json.dumps({**figures, "parameters": network.count_params()}))


def peak():
    """Bytes, the largest resident size that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main()
