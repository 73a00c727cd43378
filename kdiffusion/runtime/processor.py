"""Features of the processor, as Linux lists them, and warnings of slow kernels."""

from __future__ import annotations

import functools
import os
import re
import warnings
from pathlib import Path

_INFORMATION = Path("/proc/cpuinfo")
_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
# TensorFlow uses oneDNN by itself if a flag begins with one of these (its `IsMKLEnabled`).
_ONEDNN = ("amx_", "avx_vnni", "avx512_bf16", "avx512_vnni")


@functools.cache
def flags(information: Path = _INFORMATION) -> set[str]:
    """Return the feature flags of an x86 processor.

    Args:
        information: file in the form of `/proc/cpuinfo`.

    Returns:
        Set of flags such as `"avx2"`; empty if they are not known.
    """
    try:
        line = re.search(r"^flags\s*:(.*)$", information.read_text("utf-8"), re.MULTILINE)
    except OSError:
        return set()
    return set(line[1].split()) if line else set()


def has_bfloat16(information: Path = _INFORMATION) -> bool:
    """Return whether an x86 processor is known to have bfloat16 arithmetic.

    Args:
        information: file in the form of `/proc/cpuinfo`.
    """
    return bool(_BFLOAT16 & flags(information))


def warn_without_bfloat16(information: Path = _INFORMATION) -> None:
    """Warn if an x86 processor has no bfloat16 arithmetic; other processors do not list flags."""
    if flags(information) and not has_bfloat16(information):
        warnings.warn(
            "This processor has no bfloat16 arithmetic (neither avx512_bf16 nor amx_bf16), so a "
            "dtype policy that computes in 'bfloat16' is no faster here than 'float32', and less "
            "exact. It still halves the memory of the weights. Use dtype='float32' otherwise.",
            stacklevel=1,  # this line is the same for all callers, so Python shows it once
        )


def warn_without_onednn(information: Path = _INFORMATION) -> None:
    """Warn if TensorFlow was loaded before kdiffusion could ask it to use oneDNN's kernels."""
    known = flags(information)
    used = any(flag.startswith(_ONEDNN) for flag in known)
    if known and not used and "TF_ENABLE_ONEDNN_OPTS" not in os.environ:
        warnings.warn(
            "TensorFlow was loaded without oneDNN's kernels, which take half the time on this "
            "processor. Import kdiffusion before Keras and TensorFlow, or set the environment "
            "variable TF_ENABLE_ONEDNN_OPTS to 1 (0 to do without).",
            stacklevel=1,
        )
