"""The prediction of a diffusion model, which no shape tells.

In this order: what the caller says, the file's metadata and markers, a config beside the file, the
training step at which a known checkpoint was saved, the family. Sources: the modelspec of
Stability-AI, `single_file_utils.py` of huggingface/diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from weights_conversion.files.checkpoint import Checkpoint
from weights_conversion.files.errors import CheckpointMismatch, printable
from weights_conversion.models.family import Family
from weights_conversion.models.folder import read_json

PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v",
    "v_prediction": "v",
    "v-prediction": "v",
    "sample": "sample",
    "x0": "sample",
}
MARKER = "v_pred"  # an empty tensor of that name marks a model of v
_BY_ARCHITECTURE = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v"}
_BY_GLOBAL_STEP = {"875000": "epsilon", "110000": "v"}  # 2.0 base, 2.1
_YAML = re.compile(r"""^\s*parameterization\s*:\s*["']?(\w+)""", re.MULTILINE)
_MAX_YAML_BYTES = 1_000_000
_LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_LAST_NORM_DEVIATION = 0.09  # below in models of the noise, above in those of v, by ComfyUI


def find_prediction(
    checkpoint: Checkpoint, family: Family, chosen: str | None = None, *, suggest: bool = True
) -> str:
    """Return "epsilon", "v" or "sample".

    Args:
        checkpoint: the file, in CompVis names.
        family: its family.
        chosen: what the caller says; None to find it out.
        suggest: whether a tensor may be read to suggest a value in the error's message.

    Raises:
        CheckpointMismatch: nothing tells; the message names the argument and suggests a value.
    """
    if chosen is not None:
        if chosen not in PREDICTIONS:
            raise CheckpointMismatch(
                f"prediction_type must be one of {', '.join(PREDICTIONS)}. Received: {chosen!r}"
            )
        return PREDICTIONS[chosen]
    for word in _words(checkpoint, family):
        if word in PREDICTIONS:
            return PREDICTIONS[word]
    raise CheckpointMismatch(
        f"{checkpoint.path} does not tell what its model predicts. Pass prediction_type='epsilon' "
        "(models made for 512×512) or prediction_type='v' (for 768×768)."
        + (_suggestion(checkpoint) if suggest else "")
    )


def _words(checkpoint: Checkpoint, family: Family) -> Iterator[str | None]:
    metadata = checkpoint.metadata
    yield metadata.get("modelspec.prediction_type", "").lower()
    yield _BY_ARCHITECTURE.get(metadata.get("modelspec.architecture", "").lower())
    yield "v" if MARKER in checkpoint else None
    yield from _words_beside(checkpoint.path)
    yield _BY_GLOBAL_STEP.get(metadata.get("global_step", ""))
    yield family.prediction


def _words_beside(path: Path) -> Iterator[str | None]:
    for config in (
        path.parent / "scheduler_config.json",
        path.parent / "scheduler" / "scheduler_config.json",
    ):
        if config.is_file():
            word = read_json(config).get("prediction_type")
            yield word if isinstance(word, str) else None
    yaml = path.with_suffix(".yaml")
    if yaml.is_file() and yaml.stat().st_size < _MAX_YAML_BYTES:
        found = _YAML.search(yaml.read_text(encoding="utf-8", errors="replace"))
        yield found.group(1) if found else "epsilon"  # CompVis's default


def _suggestion(checkpoint: Checkpoint) -> str:
    if _LAST_NORM not in checkpoint:
        return ""
    deviation = float(np.std(checkpoint[_LAST_NORM].astype(np.float64)))
    word = "v" if deviation > _LAST_NORM_DEVIATION else "epsilon"
    return f" A statistic of {printable(_LAST_NORM)} suggests {word!r}, but it can be wrong."
