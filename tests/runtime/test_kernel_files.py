"""XLA's kernels between processes: TensorFlow is told of them before it does anything else."""

import json
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest

from kdiffusion.runtime import backend, cache_folder, kernel_files

if backend.name() != "tensorflow" or backend.on_accelerator():
    pytest.skip("JAX keeps its programs itself", allow_module_level=True)

CHILD = """
from kdiffusion.runtime import kernel_files
folder = kernel_files.kernel_folder()
import os, keras, numpy as np
from kdiffusion.runtime import plain_graph, tracing

def half(x):
    return 0.5 * x + 1.0

def function(x):
    return tracing.fuse(half)(x)

x = np.arange(2**17, dtype=np.float32)
y = plain_graph.PlainGraph(function, lambda: "half")(x)
assert np.array_equal(y, half(x)), y
kernels = [(folder / name).read_bytes() for name in kernel_files.kernel_names()] if folder else []
print(os.environ.get("TF_XLA_FLAGS"), [text.startswith(b"key {") for text in kernels])
"""


@pytest.fixture
def run(tmp_path):
    """Run the child; tell what it printed last, and the errors that it logged."""

    def call(**variables):
        folder = str(tmp_path / "programs")
        own = {cache_folder.VARIABLE: folder, "TMPDIR": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "2"}
        command = [sys.executable, "-c", CHILD]
        variables = os.environ | own | variables
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        errors = [line for line in done.stderr.splitlines() if "proto" in line]
        return done.stdout.splitlines()[-1], errors

    return call


def kernels_in(folder):
    (path,) = folder.glob("*.graph")
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read("kernels.json"))


def test_a_kernel_is_compiled_in_the_first_process_only(run, tmp_path):
    """What TensorFlow writes is binary; what it was given, and found, is text."""
    flags = "--tf_xla_min_cluster_size=5"  # those of others stay
    assert run(TF_XLA_FLAGS=flags) == (f"{flags} [False]", [])
    kernels = kernels_in(tmp_path / "programs")
    assert len(kernels) == 1
    assert run() == ("None [True]", [])
    assert kernels_in(tmp_path / "programs") == kernels
    assert [path.name for path in tmp_path.iterdir()] == ["programs"]  # processes leave nothing


def test_a_graph_without_kernels_gets_them(run, tmp_path):
    assert run(TF_XLA_FLAGS="--tf_xla_persistent_cache_directory=")[0].endswith("[]")
    assert kernels_in(tmp_path / "programs") == {}
    assert run() == ("None [False]", [])
    assert len(kernels_in(tmp_path / "programs")) == 1


def test_other_files_are_no_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_files, "kernel_folder", lambda: tmp_path)
    spoilt = {"empty": b"", "cut": b"\x0a\x05\x08", "other": b"\x0a\x02\x08\x01"}
    for name, content in spoilt.items():
        (tmp_path / f"{name}.pb").write_bytes(content)
    assert kernel_files.collect(kernel_files.kernel_names() | {"missing.pb"}) == {}


@pytest.mark.parametrize("folder, free", [("off", 2**40), ("programs", 2**27)], ids=str)
def test_nothing_is_kept_without_a_folder_or_space(tmp_path, monkeypatch, folder, free):
    named = folder if folder == "off" else str(tmp_path / folder)
    monkeypatch.setenv(cache_folder.VARIABLE, named)
    monkeypatch.setattr(kernel_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
    assert kernel_files.kernel_folder.__wrapped__() is None
    assert "TF_XLA_FLAGS" not in os.environ
