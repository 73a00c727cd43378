"""Public checkpoint layouts in and out, without any deep-learning framework."""

from weights_conversion.cli import add_commands
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
from weights_conversion.files.checkpoint import Checkpoint, TensorInfo, in_memory
from weights_conversion.files.errors import (
    CheckpointError,
    CheckpointLimit,
    CheckpointMismatch,
    CorruptCheckpoint,
    NonFiniteWeights,
    UnsafeCheckpoint,
    listed,
)
from weights_conversion.files.limits import Limits
from weights_conversion.files.opening import open_checkpoint
from weights_conversion.files.safetensors_reader import open_safetensors
from weights_conversion.files.safetensors_writer import write_safetensors
from weights_conversion.files.staging import check_space, staged, staged_file
from weights_conversion.files.torch_reader import open_torch
from weights_conversion.models.conversion import Report, convert, open_model
from weights_conversion.models.families import FAMILIES, family_of
from weights_conversion.models.family import Family, Part
from weights_conversion.models.folder import (
    DiffusersFolder,
    read_json,
    write_component,
    write_index,
    write_json,
    write_scheduler,
)
from weights_conversion.models.folder_files import INDEX, select, terms
from weights_conversion.models.folder_model import FolderModel
from weights_conversion.models.in_memory import InMemory, Network
from weights_conversion.models.inspection import inspect
from weights_conversion.models.kinds import KINDS, Kind, rows
from weights_conversion.models.model import Model
from weights_conversion.models.single_file import SingleFile, open_single_file
from weights_conversion.names import perceptual
from weights_conversion.names.mapping import read, write
from weights_conversion.names.table import Row, Stored
from weights_conversion.names.translation import merge, translate

__all__ = [
    "INDEX",
    "Checkpoint",
    "CheckpointError",
    "CheckpointLimit",
    "CheckpointMismatch",
    "CorruptCheckpoint",
    "DiffusersFolder",
    "FAMILIES",
    "Family",
    "FolderModel",
    "InMemory",
    "KINDS",
    "Kind",
    "Limits",
    "Model",
    "Network",
    "NonFiniteWeights",
    "Part",
    "Report",
    "Row",
    "SingleFile",
    "Stored",
    "TensorInfo",
    "UnsafeCheckpoint",
    "add_commands",
    "autoencoder_config",
    "autoencoder_fields",
    "check_space",
    "clip_config",
    "clip_fields",
    "convert",
    "diffusion_model_config",
    "diffusion_model_fields",
    "family_of",
    "image_tower_config",
    "image_tower_fields",
    "in_memory",
    "inspect",
    "listed",
    "merge",
    "open_checkpoint",
    "open_model",
    "open_safetensors",
    "open_single_file",
    "open_torch",
    "perceptual",
    "preprocessor_config",
    "read",
    "read_json",
    "rows",
    "scheduler_config",
    "scheduler_fields",
    "select",
    "staged",
    "staged_file",
    "terms",
    "text_encoder_config",
    "text_encoder_fields",
    "translate",
    "write",
    "write_component",
    "write_index",
    "write_json",
    "write_safetensors",
    "write_scheduler",
]
