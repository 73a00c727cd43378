"""Where compiled programs are kept: what the variable says, and that no folder can fail a run."""

import os
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext

import keras
import pytest

from kdiffusion import backend, compile_cache

on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's own cache")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty home, and nothing said about caches."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    return tmp_path


def test_default_is_in_the_users_cache_folder(home, monkeypatch):
    assert compile_cache.folder() == home / ".cache/kdiffusion/programs"
    assert compile_cache.folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    assert compile_cache.folder() == home / "elsewhere/kdiffusion/programs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compile_cache.folder() == home / ".cache/kdiffusion/programs"


def test_variable_names_the_folder_or_switches_off(home, monkeypatch):
    monkeypatch.setenv(compile_cache.VARIABLE, str(home / "named"))
    assert compile_cache.folder() == home / "named"
    for off in ("off", "OFF"):
        monkeypatch.setenv(compile_cache.VARIABLE, off)
        assert compile_cache.folder() is None
    assert not (home / ".cache").exists()


def test_a_folder_that_cannot_be_made_is_none(home, monkeypatch):
    (home / "file").write_text("no folder")
    for place in (home / "file", home / "file/below", "/proc/none", "~nobody-of-this-name/x"):
        monkeypatch.setenv(compile_cache.VARIABLE, str(place))
        assert compile_cache.folder() is None


def test_a_folder_that_cannot_be_written_to_is_none(home, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_cache.tempfile, "TemporaryFile", refuse)
    assert compile_cache.folder() is None


def test_a_folder_of_others_is_none(home, monkeypatch):
    folder = compile_cache.folder()
    folder.chmod(0o777)
    assert compile_cache.folder() is None
    folder.chmod(0o700)
    assert compile_cache.folder() == folder
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert compile_cache.folder() is None


def test_what_was_not_used_for_long_is_removed(home):
    folder = compile_cache.folder()
    day = 24 * 3600
    for name, days in (("old", 31), ("new", 29)):
        (folder / name).write_text("program")
        os.utime(folder / name, (time.time() - days * day,) * 2)
    (folder / "subfolder").mkdir()
    os.utime(folder / "subfolder", (0, 0))
    compile_cache.folder()
    assert sorted(path.name for path in folder.iterdir()) == ["new", "subfolder"]


CHILD = """
import sys, warnings, jax, jax.numpy as jnp
from jax import monitoring
hits = []
listen = lambda name, **_: hits.append(name) if "cache_hits" in name else None
monitoring.register_event_listener(listen)
from kdiffusion import backend
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
function = backend.compile_function(lambda x: jnp.sin(x) @ x, True)
assert abs(float(function(jnp.ones((8, 8)))[0, 0]) - 6.7317677) < 1e-5
print(len(hits), jax.config.jax_compilation_cache_dir)
"""


def child(folder, **variables):
    variables = {**os.environ, compile_cache.VARIABLE: str(folder), **variables}
    command = [sys.executable, "-W", "ignore", "-c", CHILD]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@on_jax
def test_jax_finds_its_programs_again(tmp_path):
    assert child(tmp_path) == ["0", str(tmp_path)]
    assert int(child(tmp_path)[0]) > 0
    assert child("off") == ["0", "None"]


@on_jax
def test_jax_compiles_again_what_it_cannot_read(tmp_path):
    child(tmp_path)
    entries = [path for path in tmp_path.iterdir() if path.name.endswith("-cache")]
    assert entries
    for path in entries:
        path.write_bytes(path.read_bytes()[:100])
    child(tmp_path)


@on_jax
def test_a_cache_chosen_by_the_user_stays(tmp_path):
    own = str(tmp_path / "own")
    assert child(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=own)[1] == own
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("flags, warns", [("sse2 avx512f", True), ("sse2 avx512_bf16", False)])
def test_processors_without_bfloat16_are_warned_of(tmp_path, flags, warns):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    with pytest.warns(UserWarning, match="no bfloat16 arithmetic") if warns else nullcontext():
        backend._warn_without_bfloat16(tmp_path / "cpuinfo")


def test_processors_that_list_no_flags_are_not_warned_of(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        backend._warn_without_bfloat16(tmp_path / "cpuinfo")
        backend._warn_without_bfloat16(tmp_path / "missing")
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
        backend._warn_without_onednn(tmp_path / "cpuinfo")


def asked_of_tensorflow(code, **variables):
    """What the environment says of oneDNN after a program."""
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
