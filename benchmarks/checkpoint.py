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
from kdiffusion.weights.random_tiny import RandomSource
from kdiffusion.weights.save import save


class FullSize(RandomSource):
    """Stable Diffusion 1.5's architecture, with random weights of the scale of trained ones."""

    name = "random-full-size"
    height = width = 512

    architectures = {
        "text_encoder": TextEncoderArchitecture(),
        "image_encoder": AutoencoderArchitecture(),
        "image_decoder": AutoencoderArchitecture(),
        "diffusion_model": DiffusionArchitecture(),
    }


SOURCES = {"full-size": FullSize, "tiny": RandomSource}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("source", choices=SOURCES)
    arguments = parser.parse_args()
    source = SOURCES[arguments.source]()
    models = {name: source.model(name, "float32") for name in source.architectures}
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    save(
        arguments.folder,
        models,
        source.schedule(),
        sampling=source.sampling(),
        size=(source.height, source.width),
        tokenizers={"text_encoder": source.tokenizer()},
        whole=True,
    )


if __name__ == "__main__":
    main()
