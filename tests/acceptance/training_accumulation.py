"""Four micro-batches of 8 make the step of one batch of 32.

    python tests/acceptance/training_accumulation.py [--steps N]

Weights and averages after several steps, of a small network and of a diffusion model with caption
dropout, on the backend in use, with XLA and without.
"""

import argparse
import sys
import tempfile

import keras
import numpy as np
from training_runs import Latents, TinyData, TinyTrainer, diffusion_trainer, values

from kdiffusion.runtime import backend
from kdiffusion.training import Loop, LoopSettings

BAR = 1e-6
MODELS = {
    "small network": (TinyTrainer, lambda: TinyData(count=96)),
    "diffusion model": (diffusion_trainer, Latents),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    failed = False
    for name, (make_trainer, make_data) in MODELS.items():
        for jit_compile in (False, True) if backend.name() == "tensorflow" else (True,):
            results = [
                train(make_trainer(), make_data(), accumulation, jit_compile, steps)
                for accumulation in (1, 4)
            ]
            moved, difference = compare(*results)
            failed |= not difference <= BAR < moved
            print(
                f"{name}, {'XLA' if jit_compile else 'graph'}: weights moved by up to {moved:.1g} "
                f"in {steps} steps; 4 x 8 differs from 32 by {difference:.1g}"
            )
    sys.exit(failed)


def train(trainer, data, accumulation, jit_compile, steps):
    """The weights before, and weights and averages after some steps."""
    before = values(trainer.groups["model"])
    settings = LoopSettings(
        batch_size=32,
        accumulation=accumulation,
        clip_norm=1.0,
        ema_decay=0.99,
        verbose=False,
        jit_compile=jit_compile,
    )
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(trainer, keras.optimizers.SGD(0.1, momentum=0.9), data, folder, settings)
        loop.run(steps)
    return before, values(trainer.groups["model"]), values(loop.averages.variables)


def compare(whole, parts):
    """Return how far the weights have moved, and how far the two runs have come apart."""
    moved = max(np.abs(a - b).max() for a, b in zip(whole[0], whole[1]))
    pairs = [pair for kind in (1, 2) for pair in zip(whole[kind], parts[kind])]
    return moved, max(np.abs(a - b).max() for a, b in pairs)


if __name__ == "__main__":
    main()
