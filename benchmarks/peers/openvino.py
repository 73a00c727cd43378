"""OpenVINO, what a graph compiler for processors makes of diffusers' networks: the ceiling.

The U-Net and the decoder of diffusers are converted once; then its pipeline calls the compiled
models, made for one shape each. The text encoder stays PyTorch's.
"""

from __future__ import annotations

import gc

import numpy as np
import openvino
import torch

from benchmarks import inputs
from benchmarks.peers import diffusers

_PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class Decoder(torch.nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, latents):
        return self.vae.decode(latents, return_dict=False)[0]


class Unet(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, latents, timestep, context):
        return self.unet(latents, timestep, context, return_dict=False)[0]


class Peer(diffusers.Peer):
    def __init__(self, folder, dtype):
        # Weights are converted in float32; the precision of the arithmetic is a hint.
        super().__init__(folder, "float32")
        self.core = openvino.Core()
        self.files = folder / "openvino"
        self.hint = {"INFERENCE_PRECISION_HINT": _PRECISION[dtype]}
        self.compiled = {}

    def load(self):
        self._convert()

    def network(self, side):
        return self._network(side, 1)

    def guided(self, side):
        predict = self._network(side, 2)

        def step():
            negative, positive = np.split(predict(), 2)
            return negative + inputs.SCALE * (positive - negative)

        return step

    def decode(self, side):
        latents = inputs.latents(side).transpose(0, 3, 1, 2) / 0.18215
        model = self._compile("decoder", [latents])
        return lambda: model([latents])[0]

    def picture(self, side, num_steps):
        """The pipeline of diffusers with both networks replaced."""
        pipeline = self._convert()
        cells = side // 8
        shapes = [np.zeros((2, 4, cells, cells), "f4"), np.float32(0), inputs.context(2, 768)]
        unet = self._compile("unet", shapes)
        decoder = self._compile("decoder", [shapes[0][:1]])

        def predict(latents, timestep, encoder_hidden_states, **_):
            values = [latents.numpy(), np.float32(timestep), encoder_hidden_states.numpy()]
            return (torch.from_numpy(unet(values)[0].copy()),)

        def decode(latents, **_):
            return (torch.from_numpy(decoder([latents.numpy()])[0].copy()),)

        pipeline.unet.forward = predict
        pipeline.vae.decode = decode
        return super().picture(side, num_steps)

    def _network(self, side, batch):
        latents = np.repeat(inputs.latents(side), batch, axis=0).transpose(0, 3, 1, 2)
        values = [latents, np.float32(inputs.TIMESTEP), inputs.context(batch, 768)]
        model = self._compile("unet", values)
        return lambda: model(values)[0]

    def _compile(self, name, values):
        key = (name, *(np.shape(value) for value in values))
        if key not in self.compiled:
            self._convert()
            # Every compiled model holds weights of its own.
            self.compiled = {k: model for k, model in self.compiled.items() if k[0] != name}
            model = self.core.read_model(self.files / f"{name}.xml")
            model.reshape(dict(zip(model.inputs, map(np.shape, values))))
            self.compiled[key] = self.core.compile_model(model, "CPU", self.hint)
        return self.compiled[key]

    def _convert(self):
        pipeline = self.pipeline
        if not (self.files / "decoder.xml").exists():
            latents, context = torch.zeros(2, 4, 32, 32), torch.zeros(2, 77, 768)
            example = (latents, torch.tensor(981.0), context)
            for name, module, values in (
                ("unet", Unet(pipeline.unet), example),
                ("decoder", Decoder(pipeline.vae), (latents[:1],)),
            ):
                model = openvino.convert_model(module, example_input=values)
                openvino.save_model(model, self.files / f"{name}.xml", compress_to_fp16=False)
                del model
                gc.collect()
        return pipeline
