"""XLA's kernels between processes: TensorFlow is told of them before it does anything else."""

import json
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace
from typing import NamedTuple

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


class Run(NamedTuple):
    """Facts about a child: its last line, the errors that it logged, the kernels kept after it."""

    printed: str
    errors: list[str]
    kernels: dict[str, str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three processes, one after the other, that share a folder of programs.

    The first one's TensorFlow keeps no kernels, so what it writes is a graph without them.
    """
    folder = tmp_path_factory.mktemp("processes")

    def run(**variables):
        own = {cache_folder.VARIABLE: str(folder / "programs"), "TMPDIR": str(folder)}
        variables = os.environ | own | {"TF_CPP_MIN_LOG_LEVEL": "2"} | variables
        command = [sys.executable, "-c", CHILD]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        errors = [line for line in done.stderr.splitlines() if "proto" in line]
        (path,) = (folder / "programs").glob("*.graph")
        with zipfile.ZipFile(path) as file:
            kernels = json.loads(file.read("kernels.json"))
        return Run(done.stdout.splitlines()[-1], errors, kernels)

    flags = ("--tf_xla_persistent_cache_directory=", FLAGS)
    found = [*(run(TF_XLA_FLAGS=flag) for flag in flags), run()]
    assert [path.name for path in folder.iterdir()] == ["programs"]  # processes leave nothing
    return found


FLAGS = "--tf_xla_min_cluster_size=5"


def test_where_tensorflow_keeps_kernels_itself_there_are_none(runs):
    assert runs[0].printed.endswith("[]")
    assert runs[0].kernels == {}


def test_a_graph_without_kernels_gets_them(runs):
    """TensorFlow writes binary files; the flags of others stay."""
    assert (runs[1].printed, runs[1].errors) == (f"{FLAGS} [False]", [])
    assert len(runs[1].kernels) == 1


def test_a_kernel_is_compiled_in_one_process_only(runs):
    """TensorFlow was given text, and found it."""
    assert (runs[2].printed, runs[2].errors) == ("None [True]", [])
    assert runs[2].kernels == runs[1].kernels


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
