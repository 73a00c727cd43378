"""The names of the perceptual network: VGG16's convolutions and LPIPS's weights of their features.

Both files have their own names only, which stand in the columns of both dialects.

Sources: `vgg.py` of pytorch/vision, `lpips.py` of richzhang/PerceptualSimilarity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weights_conversion.names.table import Place, Row, layers

# VGG16's classifier, which the file holds beside the convolutions.
_CLASSIFIER = ((25088, 4096), (4096, 4096), (4096, 1000))


def convolutions(fields: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of VGG16's convolutions, whose places count activations and poolings too."""
    inputs, place = fields["image_channels"], 0
    for level, (width, count) in enumerate(zip(fields["channels"], fields["layers_per_level"])):
        for index in range(count):
            name = f"features.{place}"
            yield from _layer(f"conv_{level}_{index}", name, f"conv3 {inputs} {width}")
            inputs, place = width, place + 2
        place += 1


def classifier() -> Iterator[Row]:
    """Yield the rows of VGG16's classifier, which no perceptual network needs."""
    for index, (inputs, outputs) in enumerate(_CLASSIFIER):
        yield from _layer(f"dense_{index}", f"classifier.{3 * index}", f"dense {inputs} {outputs}")


def linear(fields: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of the weights of each level's features."""
    for level, width in enumerate(fields["channels"]):
        yield from _layer(f"linear_{level}", f"lin{level}.model.1", f"kernel {width} 1")


def _layer(path: str, name: str, kind: str) -> Iterator[Row]:
    kind, *widths = kind.split()
    sizes = dict(zip(("inputs", "outputs"), map(int, widths)))
    yield from layers(Place(), ((path, name, name, f"{kind} inputs outputs"),), **sizes)
