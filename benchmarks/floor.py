"""Compute the least time that the arithmetic and the weights of a measure take on this machine.

    python -m benchmarks.floor CHECKPOINT DTYPE NUM_STEPS MEASURE:SIDE ...

It prints a JSON list of seconds, `null` for a measure without a floor. The floor of a network call
is the larger of two times (the roofline, Williams, Waterman & Patterson 2009): its floating-point
operations at the rate of a large matrix product, and its weights at the rate of a large copy.
PyTorch counts the operations of diffusers' networks on the meta device.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import inputs


def main():
    folder, dtype, num_steps, *wanted = sys.argv[1:]
    torch.set_grad_enabled(False)
    machine = Machine(getattr(torch, dtype))
    networks = Networks(Path(folder), machine.dtype)
    floors = []
    for measure, side in (item.split(":") for item in wanted):
        work = networks.work(measure, int(side), int(num_steps))
        floors.append(work and sum(machine.seconds(*part) for part in work))
    print(json.dumps(floors))


class Machine:
    """The highest rates of operations and bytes of the device.

    Args:
        dtype: torch dtype.
    """

    def __init__(self, dtype):
        self.dtype = dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        width = 8192 if self.device == "cuda" else 2048
        factors = torch.randn(2, width, width, device=self.device).to(dtype)
        self.operations = 2 * width**3 / self._best(lambda: factors[0] @ factors[1])
        large = torch.empty(2**28, dtype=torch.uint8, device=self.device)
        self.bytes = 2 * large.numel() / self._best(large.clone)

    def seconds(self, operations: int, weights: int) -> float:
        return max(operations / self.operations, weights / self.bytes)

    def _best(self, function):
        times = []
        for _ in range(10):
            start = time.perf_counter()
            function()
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)


class Networks:
    """The networks of a checkpoint, with shapes but no values.

    Args:
        folder: folder of the checkpoint.
        dtype: torch dtype.
    """

    def __init__(self, folder, dtype):
        self.dtype = dtype
        with torch.device("meta"):
            self.unet, self.vae = (
                kind.from_config(json.loads((folder / name / "config.json").read_text("utf-8")))
                for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
            )

    def work(self, measure, side, num_steps):
        """Return the operations and bytes of weights of each part of a measure, or `None`."""
        parts = {
            "network": lambda: [self.step(1, side)],
            "guided": lambda: [self.step(2, side)],
            "decode": lambda: [self.decode(side)],
            "picture": lambda: [self.step(2, side)] * num_steps + [self.decode(side)],
            "attention": lambda: [(self.attention(side), 0)],
        }
        return parts[measure]() if measure in parts else None

    def step(self, batch, side):
        latents = self._latents(side).expand(batch, -1, -1, -1)
        context = torch.empty(
            batch, inputs.TOKENS, self.unet.config.cross_attention_dim, device="meta"
        )
        operations = _count(lambda: self.unet(latents, inputs.TIMESTEP, context))
        return operations, self._bytes(self.unet)

    def decode(self, side):
        operations = _count(lambda: self.vae.decode(self._latents(side)))
        return operations, self._bytes(self.vae.decoder)

    def attention(self, side):
        tensors = [
            torch.empty(batch, heads, tokens, width, device="meta")
            for batch, tokens, heads, width in inputs.attention_shapes(side)
        ]
        return sum(
            _count(lambda: functional.scaled_dot_product_attention(x, x, x)) for x in tensors
        )

    def _latents(self, side):
        return torch.empty(inputs.latents(side).transpose(0, 3, 1, 2).shape, device="meta")

    def _bytes(self, module):
        return sum(parameter.numel() for parameter in module.parameters()) * self.dtype.itemsize


def _count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
