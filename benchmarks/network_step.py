"""One guided step of the diffusion model beside diffusers', as a ratio measured in one run.

    python benchmarks/network_step.py [--full] [--side CELLS] [--pairs N]

Both sides compute the same architecture at the same size in float32, in turn, after a warm-up; the
median of the ratios of each pair is what counts. `--full` takes SD 1.5's size instead of one with
a tenth of its width. Needs the extra `parity`; its table is printed, nothing is asserted.
"""

import argparse
import statistics
import time

import diffusers
import numpy as np
import torch

from kdiffusion import DiffusionModel
from kdiffusion.generation import Program
from kdiffusion.presets import DiffusionArchitecture


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="SD 1.5's width")
    parser.add_argument("--side", type=int, default=32, help="latent cells along a side")
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    channels = (320, 640, 1280, 1280) if arguments.full else (32, 64, 128, 128)
    generator = np.random.default_rng(0)
    latents = generator.normal(size=(2, arguments.side, arguments.side, 4)).astype("float32")
    context = generator.normal(size=(2, 77, 768)).astype("float32")
    ours, theirs = make_ours(channels, latents, context), make_theirs(channels, latents, context)
    ours(), theirs()
    seconds = [(measure(ours), measure(theirs)) for _ in range(arguments.pairs)]
    ratio = statistics.median(mine / other for mine, other in seconds)
    for name, values in zip(("kdiffusion", "diffusers"), zip(*seconds)):
        print(f"{name:12s} {statistics.median(values):8.3f} s")
    print(f"{'ratio':12s} {ratio:8.3f}, median of {arguments.pairs} pairs")


def make_ours(channels, latents, context):
    model = DiffusionModel(DiffusionArchitecture(channels=channels))
    program = Program(lambda model, inputs: model(inputs), jit_compile=True)
    inputs = {
        "latents": latents,
        "timestep": np.full(2, 981.0, np.float32),
        "context": context,
    }
    return lambda: np.asarray(program(model, inputs))


def make_theirs(channels, latents, context):
    network = diffusers.UNet2DConditionModel(
        block_out_channels=channels, cross_attention_dim=768, attention_head_dim=8
    ).eval()
    inputs = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()), torch.full((2,), 981)

    def step():
        with torch.no_grad():
            return network(*inputs, torch.from_numpy(context)).sample.numpy()

    return step


def measure(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
