"""The text inside a picture, and the writing of pictures."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kdiffusion.pipelines import metadata
from kdiffusion.pipelines.metadata import (
    Parameters,
    format_parameters,
    parse_parameters,
    read_parameters,
)

FULL = Parameters(
    prompt="a lighthouse, at dawn",
    num_steps=20,
    negative_prompt="blurry, low quality",
    sampler="dpmpp_2m",
    spacing="karras",
    guidance_scale=7.0,
    seed=4294967295,
    width=512,
    height=768,
    model="stable-diffusion-v1-5",
    noise="cuda",
    version="kdiffusion 0.1.0",
)

PROMPTS = [
    "",
    "plain",
    "commas, colons: (weights:1.2), \"quotes\", 'more' and back\\slashes",
    "two\nlines\n\nand a gap\n",
    "  spaces around  ",
    "Ein Bär für Ümläute",  # Latin-1
    "日本の灯台 🗼 ‮rtl",
    "Steps: 20, Sampler: Euler a, CFG scale: 7",
    "first\nNegative prompt: not mine\nSteps: 3",
    "Negative prompt:",
    "nul \0 and carriage\r\nreturn",
    "a lone surrogate \udcff",
]


@pytest.mark.parametrize("negative_prompt", PROMPTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_comes_back_whatever_the_prompts(prompt, negative_prompt):
    parameters = dataclasses.replace(FULL, prompt=prompt, negative_prompt=negative_prompt)
    assert parse_parameters(format_parameters(parameters)) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 7.123456789},
        {"guidance_scale": 1e-7},
        {"strength": 0.75},
        {"strength": 1.0},
        {"spacing": "trailing"},
        {"spacing": "leading+karras"},
        {"sampler": "a sampler: of another program"},
        {"model": 'odd, "name": v1\n'},
        {"model": '"quoted"'},
        {"model": "\udcff.bin"},
        {"others": {"Model hash": "0123456789", "Dtype": "bfloat16", "Note": "a, b: c"}},
        {field.name: None for field in dataclasses.fields(Parameters)[3:-1]},
    ],
)
def test_text_comes_back_whatever_the_settings(changes):
    parameters = dataclasses.replace(FULL, **changes)
    assert parse_parameters(format_parameters(parameters)) == parameters


def test_text_is_the_one_the_field_writes():
    assert format_parameters(FULL) == (
        "a lighthouse, at dawn\n"
        "Negative prompt: blurry, low quality\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 4294967295, "
        "Size: 512x768, Model: stable-diffusion-v1-5, RNG: NV, Version: kdiffusion 0.1.0"
    )


def test_prompt_that_the_plain_form_cannot_hold_is_also_given_exactly():
    prompt = "a\nNegative prompt: b"
    line = format_parameters(Parameters(prompt, 20)).splitlines()[-1]
    assert f"Prompt: {json.dumps(prompt)}" in line


def test_text_of_another_program_is_read():
    parameters = parse_parameters(
        "masterpiece, (cat:1.2)\nsecond line\nNegative prompt: bad,\nworse\n"
        "Steps: 28, Sampler: DPM++ 2M SDE Karras, CFG scale: 7.5, Seed: 1, Size: 64x80, "
        'Model hash: 6ce0161689, Model: v1-5, Lora hashes: "a: 1, b: 2", Version: v1.7.0'
    )
    assert parameters == Parameters(
        prompt="masterpiece, (cat:1.2)\nsecond line",
        negative_prompt="bad,\nworse",
        num_steps=28,
        sampler="dpmpp_2m_sde",
        spacing="karras",
        guidance_scale=7.5,
        seed=1,
        width=64,
        height=80,
        model="v1-5",
        version="v1.7.0",
        others={"Model hash": "6ce0161689", "Lora hashes": "a: 1, b: 2"},
    )


def test_schedule_that_kdiffusion_has_not_stays_readable():
    parameters = parse_parameters("x\nSteps: 5, Sampler: Euler a, Schedule type: SGM Uniform")
    assert (parameters.sampler, parameters.spacing) == ("euler_a", None)
    assert parameters.others == {"Schedule type": "SGM Uniform"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "last line"),
        ("only a prompt", "last line"),
        ("x\nSampler: Euler", "last line"),
        ("x\nSteps: many", "'Steps' .* must be a number. Received: 'many'"),
        ("x\nSteps: 5, CFG scale: seven", "'CFG scale' .* must be a number"),
        ("x\nSteps: " + "9" * 5000, "'Steps' .* must be a number"),
    ],
)
def test_text_without_settings_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_parameters(text)


@pytest.mark.parametrize("line", ["a" * 2**20, " " * 2**20, 'a:"' * 2**18, 'a:"\\,' * 2**18])
def test_hostile_text_is_read_in_linear_time(line):
    # At most 0.8 s each; a quadratic reader would take hours.
    assert parse_parameters(f"x\nSteps: 5, {line}").num_steps == 5


def test_every_sampler_has_a_label_of_its_own():
    from kdiffusion.sampling.samplers import SAMPLERS

    labels = [record.label for record in SAMPLERS.values()]
    assert len(set(labels)) == len(labels)


def pictures(folder, count=2):
    generator = np.random.default_rng(0)
    return {
        folder
        / f"{index}.png": (
            generator.integers(0, 256, (5, 7, 3), dtype=np.uint8),
            dataclasses.replace(FULL, seed=index),
        )
        for index in range(count)
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("prompt, chunk", [("Bär", b"tEXt"), ("日本\0\udcff", b"iTXt")])
def test_picture_and_text_come_back_from_the_file(tmp_path, prompt, chunk):
    image = pictures(tmp_path)[tmp_path / "0.png"][0]
    parameters = dataclasses.replace(FULL, prompt=prompt)
    path = tmp_path / "0.png"
    metadata.save_pictures({path: (image, parameters)})
    assert read_parameters(path) == parameters
    assert chunk + b"parameters\0" in path.read_bytes()
    with Image.open(path) as file:
        np.testing.assert_array_equal(np.asarray(file), image)


def test_files_have_the_usual_permissions(tmp_path):
    metadata.save_pictures(pictures(tmp_path, 1))
    (tmp_path / "plain").touch()
    assert (tmp_path / "0.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_existing_file_stops_all_of_them(tmp_path):
    (tmp_path / "1.png").write_text("precious")
    with pytest.raises(FileExistsError, match="1.png"):
        metadata.save_pictures(pictures(tmp_path, 3))
    assert names(tmp_path) == ["1.png"]
    assert (tmp_path / "1.png").read_text() == "precious"


def test_existing_file_is_replaced_when_asked(tmp_path):
    (tmp_path / "1.png").write_text("worthless")
    metadata.save_pictures(pictures(tmp_path), overwrite=True)
    assert names(tmp_path) == ["0.png", "1.png"]
    assert read_parameters(tmp_path / "1.png").seed == 1


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_half_way_leaves_nothing(tmp_path, monkeypatch, call, error):
    calls = []
    genuine = getattr(os, call)

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return genuine(*arguments)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(type(error)):
        metadata.save_pictures(pictures(tmp_path, 3))
    assert names(tmp_path) == []


def test_picture_of_nobody_is_refused(tmp_path):
    path = tmp_path / "plain.png"
    Image.new("RGB", (2, 2)).save(path)
    with pytest.raises(ValueError, match="plain.png.*no 'parameters' text"):
        read_parameters(path)


def test_long_text_comes_back(tmp_path):
    path = tmp_path / "long.png"
    info = PngInfo()
    text = format_parameters(Parameters("長い " * 2**19, 20))
    info.add_itxt("parameters", text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    assert read_parameters(path).prompt == "長い " * 2**19
