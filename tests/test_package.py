"""The package's content and its public names, and that README and docs are true."""

import argparse
import dataclasses
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
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "RESULTS.md")
}
README = PAGES["README.md"]
PUBLIC = sorted(set(kdiffusion.__all__) - {"__version__"})


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def readme_command(name):
    return re.search(rf"^<!-- {name} -->\n```sh\n(.*?)\n```$", README, re.MULTILINE)[1]


@pytest.mark.backend
@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name):
    value = getattr(kdiffusion, name)
    assert value.__name__ == name
    assert inspect.getdoc(value), f"kdiffusion.{name} has no docstring"
    bases = inspect.getmro(value) if inspect.isclass(value) else ()
    foreign = [base for base in bases if not base.__module__.startswith("kdiffusion")]
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
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
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
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=300
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
    assert test == 'pip install ".[test]" && pytest -n 2 --dist worksteal'


def cli_lines(text):
    for block in blocks("sh", text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if "kdiffusion" in words:
                yield words[words.index("kdiffusion") + 1 :]


def test_command_lines_are_understood():
    lines = [line for text in PAGES.values() for line in cli_lines(text)]
    assert len(lines) >= 10
    for line in lines:
        assert isinstance(cli._parser(line[:1]).parse_args(line), argparse.Namespace)


def test_every_preset_is_documented():
    from kdiffusion.weights.presets import PRESETS

    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| ([^;|]+)", PAGES["docs/models.md"], re.MULTILINE)
    documented = {name: (int(size), licence.strip()) for name, size, licence in rows}
    assert documented.pop("random-tiny") == (64, "Apache-2.0")
    assert documented == {name: (preset.height, preset.licence) for name, preset in PRESETS.items()}
    assert [name for name in (*PRESETS, "random-tiny") if f"`{name}`" not in README] == []


def test_every_sampler_is_documented():
    from kdiffusion.sampling.samplers import SAMPLERS

    rows = [f"| `{name}` | {of.label} | {of.description} |" for name, of in SAMPLERS.items()]
    assert [row for row in rows if row not in PAGES["docs/samplers.md"]] == []


@pytest.mark.backend
def test_every_training_setting_is_documented():
    from kdiffusion import Schedule
    from kdiffusion.training.config import schema, sections

    page = PAGES["docs/training.md"]
    known = (vars(schema) | vars(sections)).values()
    records = [value for value in known if dataclasses.is_dataclass(value)]
    settings = {field.name for record in records for field in dataclasses.fields(record)}
    networks = [record for record in records if record.__name__.endswith("Architecture")]
    settings -= {field.name for record in networks for field in dataclasses.fields(record)}
    settings -= {field.name for field in dataclasses.fields(Schedule)}
    assert {"folder", "ema_decay", "offset_noise"} <= settings
    missing = [name for name in settings if not re.search(rf"`(\w+\.)?{name}[`.]", page)]
    assert sorted(missing) == []


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        path, _, heading = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]
            assert heading in anchors, target


def test_every_page_and_image_is_linked_and_images_are_small():
    links = {
        ((ROOT / name).parent / target.partition("#")[0]).resolve()
        for name, text in PAGES.items()
        for target in re.findall(r"\]\(([^)]+)\)", text)
    }
    assert [path.name for path in (ROOT / "docs").iterdir() if path not in links] == []
    assert [path for path in (ROOT / "docs").glob("*.png") if path.stat().st_size > 300_000] == []


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if blocks("python", text)])
def test_python_examples_compile(name):
    for example in blocks("python", PAGES[name]):
        compile(example, name, "exec")


@pytest.mark.backend
def test_readme_example_runs(tmp_path, monkeypatch):
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    monkeypatch.chdir(tmp_path)
    offline = example.replace('"stable-diffusion-v1-5"', '"random-tiny"')
    assert offline != example
    exec(compile(offline, "README.md", "exec"), {})
    assert (tmp_path / "lighthouse.png").stat().st_size > 100


@pytest.mark.parametrize("package", ["kdiffusion", "weights_conversion"])
def test_architecture_names_every_room(package):
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = [path for path in (ROOT / package).iterdir() if not path.name.startswith("_")]
    rooms = [path for path in rooms if path.is_dir() or path.suffix == ".py"]
    assert [path.stem for path in rooms if not re.search(rf"\b{path.stem}\b", text)] == []
