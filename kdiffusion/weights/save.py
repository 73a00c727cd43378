"""Write networks in memory as a folder in diffusers' layout, or as a single file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kdiffusion.models.base import ArchitectureModel
from kdiffusion.records import fields
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.weights.variables import arrays_of, kind_of
from weights_conversion import InMemory, Network, convert


def save(
    path: str | os.PathLike,
    models: Mapping[str, ArchitectureModel],
    schedule: Schedule | None = None,
    *,
    sampling: tuple[str, Spacing] = ("ddim", Spacing()),
    size: tuple[int, int] | None = None,
    tokenizers: Mapping[str, SimpleTokenizer] | None = None,
    whole: bool = False,
) -> None:
    """Write a folder in diffusers' layout that diffusers and kdiffusion load, whole or not at all.

    Args:
        path: path of the folder, made if it is missing; with the suffix .safetensors that of a
            single file, of families that have such files.
        models: dictionary of networks by the names that their family gives its parts; both halves
            of the autoencoder or none.
        schedule: the schedule, needed with a diffusion model.
        sampling: the default sampler's name and the default spacing.
        size: (height, width) of an image in pixels, recorded as the default.
        tokenizers: dictionary of the tokenizers by the names of the text encoders they feed.
        whole: bool, whether these are all networks of their family, so that model_index.json is
            written.

    Raises:
        ValueError: If the folder is not empty, a network is missing, or a weight is not finite.
    """
    model = InMemory(
        {name: network(model) for name, model in models.items()},
        schedule=None if schedule is None else fields(schedule),
        sampling=_sampling_fields(*sampling),
        size=size,
        tokenizers={name: tokenizer.save for name, tokenizer in (tokenizers or {}).items()},
        is_whole=whole,
    )
    convert(model, path)


def network(model: ArchitectureModel) -> Network:
    """Return a network as `weights_conversion.InMemory` takes it."""
    return Network(kind_of(model), fields(model.architecture), arrays_of(model))


def _sampling_fields(sampler: str, spacing: Spacing) -> dict[str, Any]:
    """Return the default sampler and spacing under the names of `weights_conversion`."""
    values = fields(spacing)
    return {
        "sampler": sampler,
        "timestep_spacing": values.pop("timesteps"),
        "sigma_spacing": values.pop("sigmas"),
        **values,
    }
