"""Public checkpoint layouts in and out, without any deep-learning framework."""

from weights_conversion.configs import (
    autoencoder_config,
    autoencoder_fields,
    clip_config,
    clip_fields,
    diffusion_model_config,
    diffusion_model_fields,
    image_tower_config,
    image_tower_fields,
    preprocessor_config,
    scheduler_config,
    scheduler_fields,
    text_encoder_config,
    text_encoder_fields,
)
from weights_conversion.files.checkpoint import Checkpoint, TensorInfo
from weights_conversion.files.errors import (
    CheckpointError,
    CheckpointLimit,
    CheckpointMismatch,
    CorruptCheckpoint,
    NonFiniteWeights,
    UnsafeCheckpoint,
)
from weights_conversion.files.limits import Limits
from weights_conversion.files.opening import open_checkpoint
from weights_conversion.files.safetensors_reader import open_safetensors
from weights_conversion.files.staging import staged, staged_file
from weights_conversion.files.torch_reader import open_torch
from weights_conversion.models.conversion import Report, convert, open_model
from weights_conversion.models.folder import (
    DiffusersFolder,
    write_component,
    write_index,
    write_scheduler,
)
from weights_conversion.models.folder_model import FolderModel
from weights_conversion.models.inspection import inspect
from weights_conversion.models.single_file import SingleFile, open_single_file
from weights_conversion.names import Row, Stored, rows
from weights_conversion.names.mapping import read, write
from weights_conversion.names.translation import translate

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointLimit",
    "CheckpointMismatch",
    "CorruptCheckpoint",
    "DiffusersFolder",
    "FolderModel",
    "Limits",
    "NonFiniteWeights",
    "Report",
    "Row",
    "SingleFile",
    "Stored",
    "TensorInfo",
    "UnsafeCheckpoint",
    "autoencoder_config",
    "autoencoder_fields",
    "clip_config",
    "clip_fields",
    "convert",
    "diffusion_model_config",
    "diffusion_model_fields",
    "image_tower_config",
    "image_tower_fields",
    "inspect",
    "open_checkpoint",
    "open_model",
    "open_safetensors",
    "open_single_file",
    "open_torch",
    "preprocessor_config",
    "read",
    "rows",
    "scheduler_config",
    "scheduler_fields",
    "staged",
    "staged_file",
    "text_encoder_config",
    "text_encoder_fields",
    "translate",
    "write",
    "write_component",
    "write_index",
    "write_scheduler",
]
