"""kdiffusion, as its users call it."""

from __future__ import annotations

import numpy as np
from keras import ops

from benchmarks import inputs
from kdiffusion import StableDiffusion
from kdiffusion.models import kernels
from kdiffusion.pipelines.settings import Settings
from kdiffusion.pipelines.starts import Start
from kdiffusion.runtime import programs
from kdiffusion.runtime.programs import Program
from kdiffusion.sampling import run as generation


class Peer:
    def __init__(self, folder, dtype):
        self.model = StableDiffusion.from_preset(folder / "checkpoint", dtype=dtype)

    def load(self):
        self.model.tokenizer, self.model.text_encoder, self.model.diffusion_model
        self.model.decoder

    def network(self, side):
        program = Program(lambda model, x: model(x), self.model.jit_compile)
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
        settings = Settings(
            num_steps=1, guidance_scale=inputs.SCALE, sampler="ddim", spacing="leading", verbose=0
        )
        start = Start(inputs.latents(side))
        negatives, conditions = {"context": context[:1]}, {"context": context[1:]}
        run = self.model.make_run(start, conditions, negatives, settings, settings.streams(1))
        program = Program(generation.denoise, self.model.jit_compile)
        return lambda: generation.sample(program, network, run)

    def decode(self, side):
        return lambda: self.model.decode(inputs.latents(side))

    def attention(self, side):
        dtype = self.model.diffusion_model.compute_dtype

        def compute(x):
            batch, tokens, heads, width = x.shape
            flat = ops.reshape(x, (batch, tokens, heads * width))
            y = kernels.attend(flat, flat, flat, heads, use_flash=use_flash[width])
            return ops.reshape(y, x.shape)

        run = programs.compile_function(compute, programs.use_jit(self.model.jit_compile))
        tensors = [ops.cast(x, dtype) for x in inputs.attention(side)]
        use_flash = {x.shape[-1]: kernels.has_flash_attention(x.shape[-1], dtype) for x in tensors}
        return lambda: [ops.convert_to_numpy(ops.cast(run(x), "float32")) for x in tensors]

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
