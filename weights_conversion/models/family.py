"""A family of models and its parts: the columns of `families.FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from weights_conversion.configs.autoencoder import LATENT_SCALE
from weights_conversion.configs.scheduler import LATENT_BETAS
from weights_conversion.models.kinds import Fields
from weights_conversion.models.signs import Sign

NETWORK = "diffusion_model"  # the part that a schedule belongs to

# What every reader of a single file assumes.
SCHEDULE: dict[str, Any] = {
    "num_timesteps": 1000,
    **LATENT_BETAS,
    "beta_schedule": "scaled_linear",
    "rescale_zero_terminal_snr": False,
    "trained_betas": None,
}
SAMPLING: dict[str, Any] = {
    "sampler": "ddim",
    "timestep_spacing": "leading",
    "sigma_spacing": None,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


class Part(NamedTuple):
    """A network of a family.

    Attributes:
        name: what pipelines call it, such as "text_encoder_2".
        kind: which network it is, a name in `KINDS`.
        folder: the folder that holds it in diffusers' layout; other parts may lie in it too.
        prefix: the start of its names in a single file.
        tokenizer: the folder of the tokenizer that feeds it, or None.
    """

    name: str
    kind: str
    folder: str
    prefix: str
    tokenizer: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: a short name, for programs.
        title: what it is, for people.
        signs: tells from names and shapes if a single file is of the family; None if there are no
            single files of it.
        parts: its networks, none if it cannot be loaded.
        takes: tells from the fields of a diffusion model if it is one of the family's.
        pipeline: name of the class of kdiffusion that generates with it.
        index: name of the class that is written to model_index.json.
        preview: matrix from latents to RGB in [-1, 1], a row for each channel, or None.
        prediction: what the diffusion model of a single file predicts, if nothing else tells.
        schedule: the fields of the schedule of a single file.
        sampling: the fields of the default sampler and spacing of a single file.
        sample_size: side in latents of what it was made for, and of what models of v were.
        latent_scale: that of a single file.
        use: what to do instead if a single file of it cannot be loaded, else None.
    """

    name: str
    title: str
    signs: Sign | None = None
    parts: tuple[Part, ...] = ()
    takes: Callable[[Fields], bool] = lambda fields: True
    pipeline: str | None = None
    index: str | None = None
    preview: tuple[tuple[float, float, float], ...] | None = None
    prediction: str | None = None
    schedule: Mapping[str, Any] = field(default_factory=lambda: SCHEDULE)
    sampling: Mapping[str, Any] = field(default_factory=lambda: SAMPLING)
    sample_size: tuple[int, int] = (64, 64)
    latent_scale: float = LATENT_SCALE
    use: str | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """Return the folders of its networks in diffusers' layout."""
        return tuple(dict.fromkeys(part.folder for part in self.parts))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Return the folders of its tokenizers in diffusers' layout."""
        return tuple(part.tokenizer for part in self.parts if part.tokenizer)
