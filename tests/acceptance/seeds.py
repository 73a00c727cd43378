"""Picture i of a batch is the picture of its seed alone; the noise is PyTorch's.

    python tests/acceptance/seeds.py [--preset PRESET] [--size PIXELS]

The comparison with `torch.randn` needs PyTorch; without it that part fails.
"""

import argparse
import sys

import numpy as np

from kdiffusion import StableDiffusion
from kdiffusion.sampling.noise import noise_stream
from kdiffusion.sampling.samplers import SAMPLERS

# Published by AUTOMATIC1111 (stable-diffusion-webui, modules/rng_philox.py), seed 0.
PHILOX = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]
SHAPES = [(1,), (15,), (16,), (17,), (4, 3), (3, 100), (2, 4, 17, 9)]
SHAPES += [(1, 4, 32, 32), (1, 4, 64, 64)]
SEEDS = [0, 42, 2**32 - 1, 2**32 + 42, 2**63 + 5]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="random-tiny")
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    failures = [*check_batches(arguments), *check_torch(), *check_philox()]
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


def check_batches(arguments):
    model = StableDiffusion(arguments.size, arguments.size, preset=arguments.preset)
    for sampler in SAMPLERS:
        settings = {"sampler": sampler, "num_steps": 6, "verbose": 0}
        batch = model.text_to_image("a red circle", batch_size=4, seed=100, **settings)
        alone = [model.text_to_image("a red circle", seed=100 + i, **settings)[0] for i in range(4)]
        largest = np.abs(batch.astype(int) - np.stack(alone).astype(int)).max()
        apart = np.abs(batch[0].astype(int) - batch[1].astype(int)).mean()
        print(f"{sampler:14s} image i of 4 against its seed alone: {largest}/255, bar 1/255")
        if largest > 1:
            yield f"{sampler}: an image of a batch is not that of its seed"
        if apart < 1:
            yield f"{sampler}: the images of a batch are alike"


def check_torch():
    import torch

    largest = 0.0
    for seed in SEEDS:
        generator = torch.Generator("cpu").manual_seed(seed)
        stream = noise_stream(seed, "cpu")
        for shape in SHAPES:  # successive draws of one stream
            theirs = torch.randn(shape, generator=generator).numpy()
            largest = max(largest, float(np.abs(stream.normal(shape) - theirs).max()))
    draws = f"{len(SEEDS)} seeds, {len(SHAPES)} successive shapes each"
    print(f"cpu noise against torch.randn, {draws}: {largest:.1e}, bar 1e-6")
    if largest > 1e-6:
        yield "the cpu noise is not torch.randn's"


def check_philox():
    largest = float(np.abs(noise_stream(0, "cuda").normal((3, 4)) - PHILOX).max())
    print(f"cuda noise against the published Philox values: {largest:.1e}, bar 1e-6")
    if largest > 1e-6:
        yield "the cuda noise is not the published one"


if __name__ == "__main__":
    main()
