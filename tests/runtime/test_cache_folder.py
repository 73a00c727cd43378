"""The folder of compiled programs: its variable, and that no folder can fail a run."""

import os
import subprocess
import sys
import time

import keras
import pytest

from kdiffusion.runtime import cache_folder

on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's own cache")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty home, and nothing said about caches."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(cache_folder.VARIABLE, raising=False)
    return tmp_path


def test_default_is_in_the_users_cache_folder(home, monkeypatch):
    assert cache_folder.program_folder() == home / ".cache/kdiffusion/programs"
    assert cache_folder.program_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    assert cache_folder.program_folder() == home / "elsewhere/kdiffusion/programs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder.program_folder() == home / ".cache/kdiffusion/programs"


def test_variable_names_the_folder_or_switches_off(home, monkeypatch):
    monkeypatch.setenv(cache_folder.VARIABLE, str(home / "named"))
    assert cache_folder.program_folder() == home / "named"
    for off in ("off", "OFF"):
        monkeypatch.setenv(cache_folder.VARIABLE, off)
        assert cache_folder.program_folder() is None
    assert not (home / ".cache").exists()


def test_a_folder_that_cannot_be_made_is_none(home, monkeypatch):
    (home / "file").write_text("no folder")
    for place in (home / "file", home / "file/below", "/proc/none", "~nobody-of-this-name/x"):
        monkeypatch.setenv(cache_folder.VARIABLE, str(place))
        assert cache_folder.program_folder() is None


def test_a_folder_that_cannot_be_written_to_is_none(home, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_folder.tempfile, "TemporaryFile", refuse)
    assert cache_folder.program_folder() is None


def test_a_folder_of_others_is_none(home, monkeypatch):
    folder = cache_folder.program_folder()
    folder.chmod(0o777)
    assert cache_folder.program_folder() is None
    folder.chmod(0o700)
    assert cache_folder.program_folder() == folder
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert cache_folder.program_folder() is None


def test_what_was_not_used_for_long_is_removed(home):
    folder = cache_folder.program_folder()
    day = 24 * 3600
    for name, days in (("old", 31), ("new", 29)):
        (folder / name).write_text("program")
        os.utime(folder / name, (time.time() - days * day,) * 2)
    (folder / "subfolder").mkdir()
    os.utime(folder / "subfolder", (0, 0))
    cache_folder.program_folder()
    assert sorted(path.name for path in folder.iterdir()) == ["new", "subfolder"]


CHILD = """
import sys, warnings, jax, jax.numpy as jnp
from jax import monitoring
hits = []
listen = lambda name, **_: hits.append(name) if "cache_hits" in name else None
monitoring.register_event_listener(listen)
from kdiffusion.runtime import programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
function = programs.compile_function(lambda x: jnp.sin(x) @ x, True)
assert abs(float(function(jnp.ones((8, 8)))[0, 0]) - 6.7317677) < 1e-5
print(len(hits), jax.config.jax_compilation_cache_dir)
"""


def child(folder, **variables):
    variables = {**os.environ, cache_folder.VARIABLE: str(folder), **variables}
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
