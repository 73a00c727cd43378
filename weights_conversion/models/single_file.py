"""Single files in CompVis names: Stable Diffusion 1 and 2, `.safetensors` or `.ckpt`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from weights_conversion.files.checkpoint import Checkpoint
from weights_conversion.files.errors import CheckpointMismatch, listed
from weights_conversion.files.limits import Limits
from weights_conversion.files.opening import open_checkpoint
from weights_conversion.models import from_shapes
from weights_conversion.models.components import COMPONENT_OF, component_fields
from weights_conversion.models.families import Family, describe, identify
from weights_conversion.models.folder import DiffusersFolder
from weights_conversion.models.prediction import find_prediction
from weights_conversion.names import Row, mapping, rows

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
# Beginnings of names in merges of NovelAI's time, which lack "text_model.".
_NOVELAI = tuple(f"{_CLIP}{part}." for part in ("embeddings", "encoder", "final_layer_norm"))
_PREFIXES = {
    "text_encoder": _TEXT,
    "image_encoder": _VAE,
    "image_decoder": _VAE,
    "diffusion_model": _UNET,
}
# Beginnings of names in files that hold a part without its prefix, and the prefix.
_BARE = (
    (("diffusion_model.",), "model."),
    (("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out."), _UNET),
    (("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "loss."), _VAE),
    (("text_model.",), _CLIP),
    (("transformer.resblocks.", "token_embedding.", "ln_final."), _OPEN_CLIP),
    (("positional_embedding", "text_projection"), _OPEN_CLIP),
)
_EMA = "model_ema."
WEIGHTS = ("ema", "raw")
_LATENT_SCALE = "scale_factor"
_BETAS = "betas"
_ZERO_TERMINAL_SNR = "ztsnr"
_SCHEDULE: dict[str, Any] = {
    "num_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_zero_terminal_snr": False,
    "trained_betas": None,
}
_SAMPLING: dict[str, Any] = {
    "sampler": "ddim",
    "timestep_spacing": "leading",
    "sigma_spacing": None,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def open_single_file(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    prediction_type: str | None = None,
    config: str | os.PathLike | None = None,
    limits: Limits = Limits(),
) -> SingleFile:
    """Opens a single file of Stable Diffusion 1 or 2, and reads no weights yet.

    Args:
        path: a `.safetensors` or `.ckpt` file in CompVis names; also a part of one without its
            prefix.
        weights: of files that hold the diffusion model twice, "ema" takes the moving average,
            which draws better, and "raw" the weights of the last training step.
        prediction_type: "epsilon", "v" or "sample"; None for what file and family tell.
        config: a folder in diffusers' layout whose configs describe the model; None to tell it
            from the tensors' shapes.
        limits: what the file may ask for.

    Raises:
        CheckpointMismatch: this is another model; the message tells which, and what to use.
        CheckpointError: the file cannot be read; its subclasses tell why.

    Example:

    >>> model = open_single_file("v1-5-pruned.ckpt")
    >>> model.family.title
    'Stable Diffusion 1'
    >>> model.fields("diffusion_model")["channels"]
    (320, 640, 1280, 1280)
    >>> weights = dict(model.arrays("diffusion_model"))
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}. Received: {weights!r}")
    checkpoint = open_checkpoint(path, limits=limits)
    names = canonical_names(checkpoint)
    shapes = {name: checkpoint.info(own).shape for name, own in names.items()}
    family = identify(shapes)
    if family.use is not None:
        raise CheckpointMismatch(f"{checkpoint.path} {describe(family, shapes)}")
    folder = None if config is None else DiffusersFolder(config)
    averaged = _averaged(checkpoint.path, names) if weights == "ema" else {}
    return SingleFile(checkpoint, names | averaged, family, prediction_type, folder)


def canonical_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the names in the file by the full CompVis name that each stands for.

    Raises:
        CheckpointMismatch: two names stand for the same tensor.
    """
    own = list(checkpoint)
    is_wrapped = bool(own) and all(name.startswith("module.") for name in own)
    names: dict[str, str] = {}
    for name in own:
        full = name.removeprefix("module.") if is_wrapped else name
        for beginnings, prefix in _BARE:
            if full.startswith(beginnings):
                full = prefix + full
                break
        if full.startswith(_NOVELAI):
            full = f"{_CLIP}text_model.{full.removeprefix(_CLIP)}"
        if full in names:
            raise CheckpointMismatch(
                f"{checkpoint.path} holds the same tensor under two names: "
                f"{listed((names[full], name))}. Remove one of them."
            )
        names[full] = name
    return names


def _averaged(path: Path, names: dict[str, str]) -> dict[str, str]:
    """Returns the names of the moving average by those of the weights that they replace."""
    if not any(name.startswith(_EMA) for name in names):
        return {}
    # The training code took the dots out of the names, so they cannot be read back.
    wanted = {
        name: _EMA + name.removeprefix("model.").replace(".", "")
        for name in names
        if name.startswith(_UNET)
    }
    missing = [ema for ema in wanted.values() if ema not in names]
    if missing:
        raise CheckpointMismatch(
            f"{path} lacks {len(missing)} of {len(wanted)} averaged tensors: {listed(missing)}. "
            "Pass weights='raw' to take the others."
        )
    return {name: names[ema] for name, ema in wanted.items()}


class SingleFile:
    """A single file: architecture, schedule and weights, each read when it is asked for.

    Made by `open_single_file`.

    Attributes:
        dialect: "compvis".
        path: the file.
        family: what it is.
        checkpoint: its tensors under their full CompVis names, the chosen ones of two.
    """

    dialect = "compvis"

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: dict[str, str],
        family: Family,
        prediction_type: str | None,
        folder: DiffusersFolder | None,
    ):
        self.path = checkpoint.path
        self.family = family
        self.checkpoint = checkpoint.renamed(names)
        self._all = set(checkpoint)
        self._names = names
        self._prediction_type = prediction_type
        self._folder = folder

    def has(self, kind: str) -> bool:
        """Whether the file holds tensors of a model of this kind."""
        return any(name.startswith(_PREFIXES[kind]) for name in self.checkpoint)

    def fields(self, kind: str) -> dict[str, Any]:
        """Returns the architecture fields of a kind of model; both halves of the autoencoder's.

        Args:
            kind: "text_encoder", "image_encoder", "image_decoder" or "diffusion_model".

        Raises:
            CheckpointMismatch: the file has no such model, or one that is not supported.
        """
        if not self.has(kind):
            parts = [other for other in _PREFIXES if self.has(other)]
            raise CheckpointMismatch(
                f"{self.path} is pruned: it has no {kind}, only {listed(parts)}. "
                "Take a file that holds the whole model, or its folder."
            )
        if self._folder is not None:
            return component_fields(self._folder, COMPONENT_OF[kind])
        if kind == "text_encoder":
            return from_shapes.text_encoder(self._shapes)
        if kind == "diffusion_model":
            return from_shapes.diffusion_model(self._shapes)
        return from_shapes.autoencoder(self._shapes, self._latent_scale())

    def rows(self, kind: str) -> tuple[Row, ...]:
        """Returns the name table of a kind of model."""
        return rows(kind, self.fields(kind))

    def beside(self, kind: str) -> list[Row]:
        """Returns the name tables of the models that share a kind's prefix."""
        shared = [
            other for other in _PREFIXES if other != kind and _PREFIXES[other] == _PREFIXES[kind]
        ]
        return [row for other in shared for row in self.rows(other)]

    def tensors(self, kind: str) -> Checkpoint:
        """Returns the tensors under a kind's prefix that its model may have, read lazily."""
        names = [name for name in self.checkpoint if name.startswith(_PREFIXES[kind])]
        if kind == "text_encoder":
            unused = self._unused_in_text_encoder()
            names = [name for name in names if not name.startswith(unused)]
        return self.checkpoint.renamed({name: name for name in names})

    def arrays(
        self, kind: str, *, allow_nonfinite: bool = False
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Reads every variable of a kind of model; see `mapping.read`.

        Returns:
            An iterator of (kdiffusion path, array in Keras layout and the file's dtype).
        """
        return mapping.read(
            self.rows(kind),
            self.tensors(kind),
            "compvis",
            beside=self.beside(kind),
            allow_nonfinite=allow_nonfinite,
        )

    @cached_property
    def prediction(self) -> str:
        """What the diffusion model predicts: "epsilon", "v" or "sample".

        Raises:
            CheckpointMismatch: nothing tells; pass prediction_type to `open_single_file`.
        """
        if self._prediction_type is None and self._scheduler is not None:
            return self._scheduler["schedule"]["prediction"]
        return find_prediction(self.checkpoint, self.family, self._prediction_type)

    @property
    def schedule(self) -> dict[str, Any]:
        """The schedule's fields: Stable Diffusion's, or the file's own betas if they differ."""
        if self._scheduler is not None:
            return {**self._scheduler["schedule"], "prediction": self.prediction}
        return {
            **_SCHEDULE,
            **self._own_betas(),
            "rescale_zero_terminal_snr": _ZERO_TERMINAL_SNR in self.checkpoint,
            "prediction": self.prediction,
        }

    @property
    def sampling(self) -> dict[str, Any]:
        """The default sampler and spacing: the config's, else ddim on leading timesteps."""
        return dict(_SAMPLING if self._scheduler is None else self._scheduler["sampling"])

    @property
    def pad_id(self) -> int | None:
        """The id that fills the rows of a prompt's tokens; None for that of the end of text."""
        return 0 if from_shapes.is_open_clip(self._shapes) else None

    @property
    def sample_size(self) -> int:
        """Height and width, in latents, of the pictures that the model was made for."""
        is_large = self.family.name == "sd2" and self.prediction == "v"
        return 96 if is_large else 64

    @property
    def dropped(self) -> list[str]:
        """Names of the file's tensors that no model takes, sorted."""
        taken = {
            self._names.get(row.compvis.name)
            for kind in filter(self.has, _PREFIXES)
            for row in self.rows(kind)
        }
        return sorted(self._all - taken)

    def _unused_in_text_encoder(self) -> tuple[str, ...]:
        """Beginnings of names: CLIP's projection, and what comes after the layer that is used."""
        depth = self.fields("text_encoder")["depth"]
        return (
            f"{_CLIP}text_projection",
            f"{_OPEN_CLIP}text_projection",
            f"{_OPEN_CLIP}transformer.resblocks.{depth}.",
        )

    def _latent_scale(self) -> float | None:
        if _LATENT_SCALE not in self.checkpoint or self._shapes.shapes[_LATENT_SCALE] != ():
            return None
        scale = float(self.checkpoint[_LATENT_SCALE])
        if not 1e-6 < scale < 1e6:
            raise CheckpointMismatch(f"{self.path} has a {_LATENT_SCALE} of {scale:g}.")
        return round(scale, 6)  # a float32 of 0.18215 is 0.18215000629425049

    def _own_betas(self) -> dict[str, Any]:
        if _BETAS not in self.checkpoint or len(self._shapes.shapes[_BETAS]) != 1:
            return {}
        betas = self.checkpoint[_BETAS].astype(np.float64)
        usual = np.linspace(_SCHEDULE["beta_start"] ** 0.5, _SCHEDULE["beta_end"] ** 0.5, 1000) ** 2
        if len(betas) == len(usual) and np.allclose(betas, usual, rtol=2e-3, atol=0):
            return {}  # a float16 of them is that far off
        if not np.all((betas > 0) & (betas <= 1)):
            raise CheckpointMismatch(f"{self.path} has betas that are not between 0 and 1.")
        return {"num_timesteps": len(betas), "trained_betas": tuple(betas.tolist())}

    @cached_property
    def _scheduler(self) -> dict[str, dict[str, Any]] | None:
        """What config= says of the schedule and the sampler."""
        if self._folder is None:
            return None
        return component_fields(self._folder, "scheduler")

    @cached_property
    def _shapes(self) -> from_shapes.Shapes:
        infos = {name: self.checkpoint.info(name).shape for name in self.checkpoint}
        return from_shapes.Shapes(self.path, infos)
