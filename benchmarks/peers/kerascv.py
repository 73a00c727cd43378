"""KerasCV 0.9: its own `StableDiffusion`, with XLA and two network calls a guided step.

Weights are random and its own, of the same shapes: it reads nothing but its own `.h5` files. They
are written once and then loaded as its constructors load downloads. bfloat16 means Keras's
`mixed_bfloat16`, the only half policy that KerasCV's guides know.

Its functional models are called with dictionaries, which Keras 3 refuses for models that were made
from lists of inputs (keras issue 20070); `ByPosition` puts the values in the models' own order.
"""

from __future__ import annotations

import keras
import numpy as np
from keras_cv.models import StableDiffusion
from keras_cv.models.stable_diffusion import Decoder, DiffusionModel, TextEncoder

from benchmarks import inputs

# Start, a word and end: a tokenizer of its own would be downloaded.
_TOKENS = [49406, 320, 49407]


class ByPosition:
    """A functional model that takes a dictionary of its inputs by name.

    Args:
        model: the model.
        names: names of its inputs in the order of its constructor.
    """

    def __init__(self, model, names):
        self.model = model
        self.names = names

    def predict_on_batch(self, x):
        return self.model.predict_on_batch([x[name] for name in self.names])


class Tokenizer:
    def encode(self, prompt):
        return _TOKENS


class Peer:
    def __init__(self, folder, dtype):
        keras.config.set_dtype_policy({"bfloat16": "mixed_bfloat16"}.get(dtype, dtype))
        self.folder = folder / "kerascv"
        self.models = {}

    def load(self):
        # Weights do not depend on the size that the graphs are made for.
        self._model(256)

    def network(self, side):
        network = self._model(side).diffusion_model
        x = {
            "latent": inputs.latents(side),
            "timestep_embedding": np.asarray(self._model(side)._get_timestep_embedding(981, 1)),
            "context": inputs.context(1, 768),
        }
        return lambda: network.predict_on_batch(x)

    def guided(self, side):
        """Two network calls and their combination, as in `StableDiffusion.generate_image`."""
        network = self._model(side).diffusion_model
        negative, positive = np.split(inputs.context(2, 768), 2)
        x = {
            "latent": inputs.latents(side),
            "timestep_embedding": np.asarray(self._model(side)._get_timestep_embedding(981, 1)),
        }

        def step():
            unguided = network.predict_on_batch(x | {"context": negative})
            guided = network.predict_on_batch(x | {"context": positive})
            return unguided + inputs.SCALE * (guided - unguided)

        return step

    def decode(self, side):
        decoder = self._model(side).decoder
        return lambda: decoder.predict_on_batch(inputs.latents(side))

    def picture(self, side, num_steps):
        model = self._model(side)
        return lambda: model.text_to_image(
            inputs.PROMPT,
            num_steps=num_steps,
            unconditional_guidance_scale=inputs.SCALE,
            seed=0,
        )

    def _model(self, side):
        if side not in self.models:
            # One size at a time: its graphs are made for a size, and hold weights of their own.
            self.models.clear()
            model = StableDiffusion(side, side, jit_compile=True)
            text = self._compiled(TextEncoder(77, download_weights=False), "text_encoder")
            network = DiffusionModel(side, side, 77, download_weights=False)
            network = self._compiled(network, "diffusion_model")
            model._text_encoder = ByPosition(text, ["tokens", "positions"])
            names = ["latent", "timestep_embedding", "context"]
            model._diffusion_model = ByPosition(network, names)
            model._decoder = self._compiled(Decoder(side, side, download_weights=False), "decoder")
            model._tokenizer = Tokenizer()
            self.models[side] = model
        return self.models[side]

    def _compiled(self, model, name):
        path = self.folder / f"{name}.weights.h5"
        if path.exists():
            model.load_weights(path)
        else:
            path.parent.mkdir(exist_ok=True)
            model.save_weights(path)
        model.compile(jit_compile=True)
        return model
