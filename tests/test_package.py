"""What is packed, and that the front page tells the truth."""

import argparse
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import kdiffusion
from kdiffusion import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PUBLIC = sorted(set(kdiffusion.__all__) - {"__version__"})


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def readme_command(name):
    return re.search(rf"^<!-- {name} -->\n```sh\n(.*?)\n```$", README, re.MULTILINE)[1]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name):
    value = getattr(kdiffusion, name)
    assert value.__name__ == name
    assert inspect.getdoc(value), f"kdiffusion.{name} has no docstring"
    foreign = [base for base in value.__mro__ if not base.__module__.startswith("kdiffusion")]
    for member, method in inspect.getmembers(value, inspect.isfunction):
        if not member.startswith("_") and not any(hasattr(base, member) for base in foreign):
            assert inspect.getdoc(method), f"kdiffusion.{name}.{member} has no docstring"


def test_public_names_are_lazy_and_listed():
    code = (
        "import sys, kdiffusion\n"
        f"assert set({PUBLIC}) <= set(dir(kdiffusion))\n"
        "heavy = {'keras', 'tensorflow', 'jax', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "kdiffusion.Sampler\n"
        "heavy = {'keras', 'tensorflow', 'jax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def packed_sources():
    return {
        path.relative_to(ROOT).as_posix()
        for package in ("kdiffusion", "weights_conversion")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: setuptools leaves its workings beside the sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for package in ("kdiffusion", "weights_conversion"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_wheel_holds_both_packages_whole_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == packed_sources()


def test_wheel_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    text = wheel.read(name).decode()
    assert f"Version: {kdiffusion.__version__}\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", text, re.MULTILINE)
    assert sorted(required) == [
        "ftfy",
        "huggingface_hub",
        "keras",
        "keras-cv",
        "ml_dtypes",
        "numpy",
        "pillow",
        "regex",
        "safetensors",
        "tensorflow",
    ]
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "kdiffusion = kdiffusion.cli:main" in wheel.read(entry_points).decode()


def test_pyproject_says_only_how_to_build():
    assert list(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))) == ["build-system"]


def test_readme_commands_install_this_checkout():
    first, test = readme_command("first command"), readme_command("test command")
    assert first.startswith("pip install . && kdiffusion generate ")
    assert test == 'pip install ".[test]" && pytest -n 2 --dist loadfile'


def readme_cli_lines():
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if "kdiffusion" in words:
                yield words[words.index("kdiffusion") + 1 :]


def test_readme_command_lines_are_understood():
    lines = list(readme_cli_lines())
    assert len(lines) >= 2
    for line in lines:
        assert isinstance(cli._parser(line[:1]).parse_args(line), argparse.Namespace)


def test_readme_names_every_preset():
    from kdiffusion.weights.presets import PRESETS

    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \|", README, re.MULTILINE)
    sizes = {name: int(size) for name, size in rows if name != "random-tiny"}
    assert sizes == {name: preset.height for name, preset in PRESETS.items() if name in sizes}
    assert set(PRESETS) <= {name for name, _ in rows}


def test_readme_names_every_sampler():
    from kdiffusion.sampling.samplers import SAMPLERS

    assert [name for name in SAMPLERS if f"`{name}`" not in README] == []


def test_readme_shows_pictures_that_are_there_and_small():
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert shown == ["docs/shapes.png", "docs/shapes-training.png", "docs/samplers.png"]
    assert [name for name in shown if not 0 < (ROOT / name).stat().st_size <= 300_000] == []


def test_readme_example_runs_as_written(tmp_path, monkeypatch):
    example, training = blocks("python")
    assert compile(training, "README.md", "exec")  # it would take a dataset and a GPU
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "circle.png").stat().st_size > 100


@pytest.mark.parametrize("package", ["kdiffusion", "weights_conversion"])
def test_architecture_names_every_room(package):
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = [path for path in (ROOT / package).iterdir() if not path.name.startswith("_")]
    rooms = [path for path in rooms if path.is_dir() or path.suffix == ".py"]
    assert [path.stem for path in rooms if not re.search(rf"\b{path.stem}\b", text)] == []
