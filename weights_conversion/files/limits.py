"""What a checkpoint may ask for before it is refused: more than models need, less than harms."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """The budgets of one file; raise them by name for an unusual file that you trust.

    Attributes:
        header_bytes: of a safetensors header. SD 1.5 needs 172 kB, trainers' metadata a few MB.
        tensors: in one checkpoint. A full SDXL file has 2,515.
        pickle_bytes: of the pickled structure around a PyTorch file's tensors; below 5 MB even
            with optimizer states.
        opcodes: of that pickle, and items copied by them. A full training state has 200,000.
        nesting: of containers within containers.
        members: of a zip archive. PyTorch writes one for each tensor.
        compression: size of a zip member over its size in the file. PyTorch does not compress.
        expanded_bytes: of a tensor that repeats its storage and so is larger than it.

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
