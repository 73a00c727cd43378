"""Write random weights to a folder that every peer can read.

python -m benchmarks.checkpoint FOLDER full-size|tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.weights import variables
from kdiffusion.weights.sources import RandomSource


class FullSize(RandomSource):
    """Stable Diffusion 1.5's architecture, with random weights of the scale of trained ones."""

    name = "random-full-size"
    height = width = 512

    _ARCHITECTURES = {
        "text_encoder": TextEncoderArchitecture(),
        "autoencoder": AutoencoderArchitecture(),
        "diffusion_model": DiffusionArchitecture(),
    }


SOURCES = {"full-size": FullSize, "tiny": RandomSource}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("source", choices=SOURCES)
    arguments = parser.parse_args()
    source = SOURCES[arguments.source]()
    models = {kind: source.model(kind, "float32") for kind in variables.MODELS}
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    variables.save(
        arguments.folder,
        models,
        source.schedule(),
        source.sampling(),
        (source.height, source.width),
        source.tokenizer(),
        "StableDiffusionPipeline",
    )


if __name__ == "__main__":
    main()
