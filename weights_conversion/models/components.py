"""The components of a folder in diffusers' layout, and the models in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weights_conversion import configs
from weights_conversion.files.errors import CheckpointMismatch
from weights_conversion.models.folder import DiffusersFolder

COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "vae": ("image_encoder", "image_decoder"),
    "unet": ("diffusion_model",),
}
COMPONENT_OF = {kind: component for component, kinds in COMPONENTS.items() for kind in kinds}
_FIELDS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "text_encoder": configs.text_encoder_fields,
    "vae": configs.autoencoder_fields,
    "unet": configs.diffusion_model_fields,
    "scheduler": configs.scheduler_fields,
}


def component_fields(folder: DiffusersFolder, component: str) -> dict[str, Any]:
    """Returns the fields of a component's config.

    Raises:
        CheckpointMismatch: it is not supported; the message names the folder, key and value.
    """
    config = folder.config(component)
    try:
        return _FIELDS[component](config)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{folder.path / component}: {error}") from error
