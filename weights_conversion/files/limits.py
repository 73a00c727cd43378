"""Limits of what a checkpoint may ask for: more than models need, less than does harm."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """The limits of one file; raise them for an unusual file that you trust.

    Args:
        header_bytes: bytes of a safetensors header. SD 1.5 needs 172 kB, trainers' metadata a few
            MB.
        tensors: tensors in a checkpoint. A full SDXL file has 2,515.
        pickle_bytes: bytes of the pickled structure around a PyTorch file's tensors. It is below
            5 MB even with optimizer states.
        opcodes: opcodes of that pickle, and items that they copy. A full training state has
            200,000.
        nesting: depth of containers within containers.
        members: members of a zip archive. PyTorch writes one for each tensor.
        compression: size of a zip member over its size in the file. PyTorch does not compress.
        expanded_bytes: bytes of a tensor that repeats its storage, and so is larger than it.

    Example:

    >>> open_checkpoint("large.ckpt", limits=Limits(tensors=200_000))
    """

    header_bytes: int = 25_000_000
    tensors: int = 50_000
    pickle_bytes: int = 32_000_000
    opcodes: int = 1_000_000
    nesting: int = 1_000
    members: int = 100_000
    compression: int = 100
    expanded_bytes: int = 16_000_000
