"""CLIP's tokenizer for folders that `kdiffusion convert` makes of single files without one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from kdiffusion.text.vocabulary import NAME, PATH_VARIABLE, local_vocabulary


def write_tokenizer(folder: Path, source: Any, name: str) -> bool:
    """Write the tokenizer of a single file's text encoder, if CLIP's vocabulary is here.

    Args:
        folder: the folder to make, `tokenizer/` of most models.
        source: `weights_conversion.SingleFile`, which has the vocabulary's size and the pad id.
        name: str, the text encoder's name in it.

    Returns:
        bool, whether it was written; if not, a warning says why.
    """
    from kdiffusion.text.tokenizer import SimpleTokenizer

    path = local_vocabulary()
    if path is None:
        warnings.warn(
            f"The folder has no {folder.name}/, because CLIP's vocabulary is not on this machine. "
            f"kdiffusion does without; for other programs set {PATH_VARIABLE} to a copy of {NAME} "
            "and convert again, or pass --tokenizer.",
            stacklevel=2,
        )
        return False
    tokenizer = SimpleTokenizer.from_bpe(path, pad_id=source.pad_id(name))
    size = source.fields(name)["vocabulary_size"]
    if size != len(tokenizer.vocab):
        warnings.warn(
            f"The folder has no {folder.name}/, because the text encoder knows {size:,} tokens, "
            f"not the {len(tokenizer.vocab):,} of CLIP. Pass --tokenizer.",
            stacklevel=2,
        )
        return False
    tokenizer.save(folder)
    return True
