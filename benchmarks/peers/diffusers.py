"""diffusers, eager or, with BENCHMARK_COMPILE in the environment, through `torch.compile`."""

from __future__ import annotations

import os

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging
from torch.nn import functional

from benchmarks import inputs


class Peer:
    def __init__(self, folder, dtype):
        self.folder = folder
        self.dtype = getattr(torch, dtype)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pipeline = None
        torch.set_grad_enabled(False)
        logging.set_verbosity_error()

    @property
    def pipeline(self):
        if self._pipeline is None:
            pipeline = StableDiffusionPipeline.from_pretrained(
                self.folder / "checkpoint", torch_dtype=self.dtype
            ).to(self.device)
            pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
            pipeline.set_progress_bar_config(disable=True)
            if "BENCHMARK_COMPILE" in os.environ:
                pipeline.unet.compile(mode="max-autotune")
                pipeline.vae.decoder.compile(mode="max-autotune")
            self._pipeline = pipeline
        return self._pipeline

    def load(self):
        self.pipeline

    def network(self, side):
        latents = self.tensor(inputs.latents(side).transpose(0, 3, 1, 2))
        context = self.context(1)
        unet = self.pipeline.unet
        return lambda: _array(unet(latents, inputs.TIMESTEP, context, return_dict=False)[0])

    def guided(self, side):
        """One step of the pipeline itself, without encoding a text or decoding."""
        latents = self.tensor(inputs.latents(side).transpose(0, 3, 1, 2))
        negative, context = self.context(2).chunk(2)
        return lambda: _array(
            self.pipeline(
                prompt_embeds=context,
                negative_prompt_embeds=negative,
                latents=latents,
                num_inference_steps=1,
                guidance_scale=inputs.SCALE,
                output_type="latent",
            ).images
        )

    def decode(self, side):
        latents = self.tensor(inputs.latents(side).transpose(0, 3, 1, 2))
        vae = self.pipeline.vae
        scale = vae.config.scaling_factor
        return lambda: _array(vae.decode(latents / scale, return_dict=False)[0])

    def picture(self, side, num_steps):
        return lambda: self.pipeline(
            inputs.PROMPT,
            height=side,
            width=side,
            num_inference_steps=num_steps,
            guidance_scale=inputs.SCALE,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images

    def attention(self, side):
        tensors = [self.tensor(x.transpose(0, 2, 1, 3)) for x in inputs.attention(side)]
        attend = functional.scaled_dot_product_attention
        return lambda: [_array(attend(x, x, x)) for x in tensors]

    def context(self, batch):
        width = self.pipeline.unet.config.cross_attention_dim
        return self.tensor(inputs.context(batch, width))

    def tensor(self, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)


def _array(tensor):
    return tensor.float().cpu().numpy()
