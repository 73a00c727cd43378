"""Warnings about slow processors, and requests to TensorFlow."""

import os
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest

from kdiffusion.runtime import processor


@pytest.mark.parametrize("flags, warns", [("sse2 avx512f", True), ("sse2 avx512_bf16", False)])
def test_processors_without_bfloat16_are_warned_of(tmp_path, flags, warns):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    with pytest.warns(UserWarning, match="no bfloat16 arithmetic") if warns else nullcontext():
        processor.warn_without_bfloat16(tmp_path / "cpuinfo")


def test_processors_that_list_no_flags_are_not_warned_of(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        processor.warn_without_bfloat16(tmp_path / "cpuinfo")
        processor.warn_without_bfloat16(tmp_path / "missing")
    assert not told


@pytest.mark.parametrize(
    "flags, chosen, warns",
    [
        ("avx2 fma", None, True),
        ("avx2 avx512f", None, True),
        ("avx2 avx512_vnni", None, False),
        ("avx2 avx_vnni", None, False),
        ("avx2 amx_tile", None, False),
        ("avx2", "0", False),
        ("avx2", "1", False),
    ],
)
def test_tensorflow_without_onednn_is_warned_of(tmp_path, monkeypatch, flags, chosen, warns):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS")
    if chosen is not None:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", chosen)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    with pytest.warns(UserWarning, match="Import kdiffusion before") if warns else nullcontext():
        processor.warn_without_onednn(tmp_path / "cpuinfo")


def asked_of_tensorflow(code, **variables):
    """Return the environment's setting of oneDNN after a program."""
    code = f"import os, sys, types\n{code}\nprint(os.environ.get('TF_ENABLE_ONEDNN_OPTS'))"
    environment = {k: v for k, v in os.environ.items() if k != "TF_ENABLE_ONEDNN_OPTS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_tensorflow_is_asked_for_onednn_in_time():
    loaded = "sys.modules['tensorflow'] = types.ModuleType('tensorflow')\n"
    assert asked_of_tensorflow("import kdiffusion") == "1"
    assert asked_of_tensorflow("import kdiffusion", TF_ENABLE_ONEDNN_OPTS="0") == "0"
    assert asked_of_tensorflow(loaded + "import kdiffusion") == "None"
