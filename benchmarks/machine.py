"""Describe the machine that is measured."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

_PACKAGES = (
    "tensorflow", "keras", "jax", "torch", "diffusers", "keras-cv", "zeromodels", "openvino"
)  # fmt: skip


def accelerator() -> str | None:
    """Return the name of the first NVIDIA GPU, or `None`."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def describe() -> dict[str, str]:
    """Return the processor, the accelerator and the versions of the packages."""
    information = Path("/proc/cpuinfo").read_text("utf-8")
    model = re.search(r"^model name\s*:\s*(.*)$", information, re.MULTILINE)
    kinds = ("avx512_bf16", "amx_bf16")
    flags = [flag for flag in kinds if re.search(rf"\b{flag}\b", information)]
    processor = model[1] if model else "unknown"
    cores = len(os.sched_getaffinity(0))
    return {
        "processor": f"{cores} x {processor} ({', '.join(flags) or 'no bf16'})",
        "accelerator": accelerator() or "none",
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    }


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
