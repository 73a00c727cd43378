"""kdiffusion, as its users call it."""

from __future__ import annotations

import numpy as np

from benchmarks import inputs
from kdiffusion import StableDiffusion, generation
from kdiffusion.sampling.guidance import Guidance
from kdiffusion.sampling.levels import Spacing
from kdiffusion.settings import Settings


class Peer:
    def __init__(self, folder, dtype):
        self.model = StableDiffusion.from_preset(folder / "checkpoint", dtype=dtype)

    def load(self):
        self.model.tokenizer, self.model.text_encoder, self.model.diffusion_model
        self.model.decoder

    def network(self, side):
        program = generation.Program(lambda model, x: model(x), self.model.jit_compile)
        network = self.model.diffusion_model
        x = {
            "latents": inputs.latents(side),
            "timestep": np.full(1, inputs.TIMESTEP, np.float32),
            "context": inputs.context(1, network.architecture.context_width),
        }
        return lambda: np.asarray(program(network, x), np.float32)

    def guided(self, side):
        """One step through the program that draws pictures."""
        network = self.model.diffusion_model
        context = inputs.context(2, network.architecture.context_width)
        settings = Settings(num_steps=1, seed=0)
        run = generation.Run(
            settings.tables(1, self.model.schedule, ("ddim", Spacing())),
            inputs.latents(side),
            {"context": context[1:]},
            {"context": context, "guidance_rescale": np.zeros(1, np.float32)},
            np.full(1, inputs.SCALE),
            Guidance(),
            settings.streams(1),
        )
        return lambda: generation.sample(self.model._denoise_program, network, run)

    def decode(self, side):
        return lambda: self.model.decode(inputs.latents(side))

    def picture(self, side, num_steps):
        return lambda: self.model.text_to_image(
            inputs.PROMPT,
            num_steps=num_steps,
            unconditional_guidance_scale=inputs.SCALE,
            seed=0,
            sampler="ddim",
            height=side,
            width=side,
            verbose=0,
        )
