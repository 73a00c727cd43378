"""Single files in CompVis names, `.safetensors` or `.ckpt`."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from weights_conversion.files.checkpoint import Checkpoint
from weights_conversion.files.errors import CheckpointMismatch, listed
from weights_conversion.files.limits import Limits
from weights_conversion.files.opening import open_checkpoint
from weights_conversion.models import from_shapes
from weights_conversion.models.families import describe, identify
from weights_conversion.models.family import NETWORK, Family, Part
from weights_conversion.models.folder import DiffusersFolder
from weights_conversion.models.folder_model import folder_fields, folder_scheduler
from weights_conversion.models.kinds import KINDS
from weights_conversion.models.model import Model
from weights_conversion.models.prediction import find_prediction
from weights_conversion.names import autoencoder, diffusion_model, mapping, text_encoder

# Beginnings of names in files that hold a part without its prefix, and the prefix.
_BARE = (
    (("diffusion_model.",), "model."),
    (
        ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out."),
        f"{diffusion_model.PREFIX}.",
    ),
    (
        ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "loss."),
        f"{autoencoder.PREFIX}.",
    ),
    (("text_model.",), f"{text_encoder.clip_prefix(text_encoder.PREFIX)}."),
    (
        (
            "transformer.resblocks.",
            "token_embedding.",
            "ln_final.",
            "positional_embedding",
            "text_projection",
        ),
        f"{text_encoder.open_clip_prefix(text_encoder.PREFIX)}.",
    ),
)
EMA = "model_ema."
WEIGHTS = ("ema", "raw")
LATENT_SCALE = "scale_factor"
ZERO_TERMINAL_SNR = "ztsnr"
_BETAS = "betas"


def open_single_file(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    prediction_type: str | None = None,
    config: str | os.PathLike | None = None,
    limits: Limits = Limits(),
) -> SingleFile:
    """Open a single file of Stable Diffusion 1 or 2, and read no weights yet.

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
    if weights == "ema":
        names |= _averaged(checkpoint.path, names, family)
    return SingleFile(checkpoint, names, family, prediction_type, folder)


def canonical_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names in the file by the full CompVis name that each stands for.

    Raises:
        CheckpointMismatch: two names stand for the same tensor.
    """
    is_wrapped = len(checkpoint) and all(name.startswith("module.") for name in checkpoint)

    def full(name: str) -> str:
        name = name.removeprefix("module.") if is_wrapped else name
        for beginnings, prefix in _BARE:
            if name.startswith(beginnings):
                return prefix + name
        return name

    return mapping.todays_names(checkpoint, "compvis", full)


def _averaged(path: Path, names: dict[str, str], family: Family) -> dict[str, str]:
    """Return the names of the moving average by those of the weights that they replace."""
    if not any(name.startswith(EMA) for name in names):
        return {}
    network = next(part for part in family.parts if part.name == NETWORK)
    # The training code took the dots out of the names, so they cannot be read back.
    wanted = {
        name: EMA + name.removeprefix("model.").replace(".", "")
        for name in names
        if name.startswith(f"{network.prefix}.")
    }
    missing = [ema for ema in wanted.values() if ema not in names]
    if missing:
        raise CheckpointMismatch(
            f"{path} lacks {len(missing)} of {len(wanted)} averaged tensors: {listed(missing)}. "
            "Pass weights='raw' to take the others."
        )
    return {name: names[ema] for name, ema in wanted.items()}


class SingleFile(Model):
    """A single file: architecture, schedule and weights, each read when it is asked for.

    Made by `open_single_file`.

    Args:
        checkpoint: the file.
        names: the names in it by the full CompVis names, the chosen ones of two.
        family: what it is.
        prediction_type: "epsilon", "v" or "sample"; None for what file and family tell.
        folder: whose configs describe the model; None to tell it from the tensors' shapes.

    Attributes:
        dialect: "compvis".
        path: the file.
        checkpoint: its tensors under their full CompVis names.
    """

    dialect = "compvis"

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: dict[str, str],
        family: Family,
        prediction_type: str | None = None,
        folder: DiffusersFolder | None = None,
    ):
        self.path = checkpoint.path
        self.checkpoint = checkpoint.renamed(names)
        self._family = family
        self._all = set(checkpoint)
        self._names = names
        self._prediction_type = prediction_type
        self._folder = folder

    @property
    def family(self) -> Family:
        """Return the row of the family."""
        return self._family

    def has(self, name: str) -> bool:
        """Tell if the file holds tensors of a part."""
        prefixes = tuple(f"{part.prefix}." for part in self.family.parts if part.name == name)
        return any(tensor.startswith(prefixes) for tensor in self.checkpoint)

    def fields(self, name: str) -> dict[str, Any]:
        """Return the architecture fields of a part; both halves of the autoencoder's.

        Args:
            name: such as "text_encoder", "image_encoder", "image_decoder" or "diffusion_model".

        Raises:
            CheckpointMismatch: the file has no such part, or one that is not supported.
        """
        part = self.part(name)
        if self._folder is not None:
            return folder_fields(self._folder, part)
        tell = KINDS[part.kind].from_shapes
        if tell is None:
            raise CheckpointMismatch(
                f"{self.path}: no shapes tell the architecture of a {part.kind}. Pass config= with "
                "a folder in diffusers' layout that describes it."
            )
        fields = tell(self._shapes, part.prefix)
        if "latent_scale" in fields:
            fields["latent_scale"] = self._own_latent_scale() or self.family.latent_scale
        return fields

    def component(self, part: Part) -> Checkpoint:
        """Return the tensors under a part's prefix that its network may have, read lazily."""
        unused = KINDS[part.kind].unused(self.fields(part.name), part.prefix)
        names = [
            name
            for name in self.checkpoint
            if name.startswith(f"{part.prefix}.") and not name.startswith(unused)
        ]
        return self.checkpoint.renamed({name: name for name in names})

    @cached_property
    def prediction(self) -> str:
        """Return the prediction of the diffusion model: "epsilon", "v" or "sample".

        Raises:
            CheckpointMismatch: nothing tells; pass prediction_type to `open_single_file`.
        """
        if self._prediction_type is None and self._scheduler is not None:
            return self._scheduler["schedule"]["prediction"]
        return find_prediction(self.checkpoint, self.family, self._prediction_type)

    @property
    def schedule(self) -> dict[str, Any]:
        """Return the schedule's fields: the family's, or the file's own betas if they differ."""
        if self._scheduler is not None:
            return {**self._scheduler["schedule"], "prediction": self.prediction}
        return {
            **self.family.schedule,
            **self._own_betas(),
            "rescale_zero_terminal_snr": ZERO_TERMINAL_SNR in self.checkpoint,
            "prediction": self.prediction,
        }

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the default sampler and spacing: the config's, else the family's."""
        return dict(
            self.family.sampling if self._scheduler is None else self._scheduler["sampling"]
        )

    def pad_id(self, name: str = "text_encoder") -> int | None:
        """Return the id that fills the rows of a text encoder's tokens; None for the usual one."""
        part = self.part(name)
        return 0 if from_shapes.is_open_clip(self._shapes, part.prefix) else None

    @property
    def sample_size(self) -> int:
        """Return the height and width in latents of the images it was made for."""
        usual, of_v = self.family.sample_size
        return usual if usual == of_v or self.prediction != "v" else of_v

    @property
    def dropped(self) -> list[str]:
        """Return the names of the file's tensors that no part takes, sorted."""
        taken = {
            self._names.get(row.compvis.name)
            for part in self.family.parts
            if self.has(part.name)
            for row in self.rows(part.name)
        }
        return sorted(self._all - taken)

    def _own_latent_scale(self) -> float | None:
        """Return the latent scale that the file tells, or None."""
        if LATENT_SCALE not in self.checkpoint or self._shapes.shapes[LATENT_SCALE] != ():
            return None
        scale = float(self.checkpoint[LATENT_SCALE])
        if not 1e-6 < scale < 1e6:
            raise CheckpointMismatch(f"{self.path} has a {LATENT_SCALE} of {scale:g}.")
        return round(scale, 6)  # a float32 of 0.18215 is 0.18215000629425049

    def _own_betas(self) -> dict[str, Any]:
        """Return the fields of the file's own betas, none if they are the family's."""
        if _BETAS not in self.checkpoint or len(self._shapes.shapes[_BETAS]) != 1:
            return {}
        betas = self.checkpoint[_BETAS].astype(np.float64)
        own = self.family.schedule
        start, end = own["beta_start"] ** 0.5, own["beta_end"] ** 0.5
        usual = np.linspace(start, end, own["num_timesteps"]) ** 2
        if len(betas) == len(usual) and np.allclose(betas, usual, rtol=2e-3, atol=0):
            return {}  # a float16 of them is that far off
        if not np.all((betas > 0) & (betas <= 1)):
            raise CheckpointMismatch(f"{self.path} has betas that are not between 0 and 1.")
        return {"num_timesteps": len(betas), "trained_betas": tuple(betas.tolist())}

    @cached_property
    def _scheduler(self) -> dict[str, dict[str, Any]] | None:
        """Return the schedule and the sampler of config=, or None."""
        return None if self._folder is None else folder_scheduler(self._folder)

    @cached_property
    def _shapes(self) -> from_shapes.Shapes:
        """Return the shapes of the tensors under their full names."""
        infos = {name: self.checkpoint.info(name).shape for name in self.checkpoint}
        return from_shapes.Shapes(self.path, infos)
