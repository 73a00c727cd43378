"""zeromodels: `ZMDiffusion`, whose denoising step runs through XLA while its decoder is eager.

Weights are random and its own, of the same shapes, written once and then loaded. Its graphs are
made for one size, so another size makes another model.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import ops
from zeromodels.base.base_scheduler import DDIMScheduler
from zeromodels.diffusers import ZMDiffusion
from zeromodels.diffusers.stable_diffusion import StableDiffusionConfig

from benchmarks import inputs

_TOKENS = np.array([[49406, 320] + [49407] * 75])


class Peer:
    def __init__(self, folder, dtype):
        keras.config.set_dtype_policy(dtype)
        self.dtype = dtype
        self.path = folder / "zeromodels" / f"{dtype}.weights.h5"
        self.models = {}

    def load(self):
        self._model(256)

    def network(self, side):
        return self._step(side, guided=False)

    def guided(self, side):
        return self._step(side, guided=True)

    def decode(self, side):
        model = self._model(side)
        latents = ops.convert_to_tensor(inputs.latents(side), self.dtype)
        return lambda: ops.convert_to_numpy(ops.cast(model.decode_latents(latents), "float32"))

    def picture(self, side, num_steps):
        model = self._model(side)
        return lambda: model.generate(
            _TOKENS, num_inference_steps=num_steps, guidance_scale=inputs.SCALE, seed=0
        )

    def _step(self, side, guided):
        model = self._model(side)
        step = model.cached_denoise_step(guided)
        batch = 2 if guided else 1
        latents = np.repeat(inputs.latents(side), batch, axis=0)
        timesteps = ops.full((batch,), inputs.TIMESTEP)
        context = ops.convert_to_tensor(inputs.context(batch, 768), self.dtype)
        latents, scale = ops.convert_to_tensor(latents), ops.convert_to_tensor(inputs.SCALE)
        return lambda: ops.convert_to_numpy(
            ops.cast(step(latents, timesteps, context, scale), "float32")
        )

    def _model(self, side):
        if side not in self.models:
            self.models.clear()
            config = StableDiffusionConfig()
            config.unet_config.sample_size = side // 8
            config.vae_config.sample_size = side
            model = ZMDiffusion(config)
            model.scheduler = DDIMScheduler(steps_offset=1)
            if self.path.exists():
                model.load_weights(self.path)
            else:
                self.path.parent.mkdir(exist_ok=True)
                model.save_weights(self.path)
            self.models[side] = model
        return self.models[side]
