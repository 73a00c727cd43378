"""The settings of an image, stored inside it: the `parameters` text of AUTOMATIC1111's web UI.

The text is the prompt, then `Negative prompt: ...`, then one line of settings, `Steps: 20, Sampler:
Euler a, CFG scale: 7, ...`. It is what the tools of the field read from each other's pictures.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kdiffusion.files import replacing
from kdiffusion.sampling.samplers import SAMPLERS

_NEGATIVE = "Negative prompt:"
_TIMESTEP_SPACING = "Timestep spacing"
_SETTING = re.compile(r'(\w[\w \-/]{0,80}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_NEEDS_QUOTES = re.compile(r'^\s|\s$|[,:"\\\x00-\x1f\ud800-\udfff]')


@dataclass(frozen=True)
class Parameters:
    """The settings of one image, named as those of `StableDiffusion.text_to_image`.

    Args:
        prompt: str.
        num_steps: int.
        negative_prompt: str.
        sampler: str, kdiffusion's name where it has one, else the label in the text.
        spacing: str, a timestep spacing, a sigma spacing, or both joined by `"+"`.
        guidance_scale: float.
        strength: float, the share of the picture it started from that was changed, or `None`.
        seed: int, of this picture alone.
        width: int, in pixels.
        height: int, in pixels.
        model: str, name of the checkpoint.
        noise: `"cpu"` or `"cuda"`, the random stream (`RNG: CPU` and `RNG: NV` in the text).
        version: str, the program that drew the picture.
        others: mapping of str to str, further settings in the order of the text.
    """

    prompt: str
    num_steps: int
    negative_prompt: str = ""
    sampler: str | None = None
    spacing: str | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str | None = None
    noise: str | None = None
    version: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)


def format_parameters(parameters: Parameters) -> str:
    """Write the `parameters` text of an image.

    A prompt that the plain form cannot hold (one with a line that starts with `Negative prompt:`,
    say) is repeated among the settings as JSON, which AUTOMATIC1111's reader prefers too.

    Args:
        parameters: `Parameters`.

    Returns:
        str that `parse_parameters` turns back into equal `parameters`.

    Example:

    >>> format_parameters(Parameters("a cat", 20, sampler="dpmpp_2m", spacing="karras", seed=7))
    'a cat\\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, Seed: 7'
    """
    prompt, negative_prompt = parameters.prompt, parameters.negative_prompt
    settings = dict(_settings(parameters))
    text = _join(prompt, negative_prompt, settings)
    if _storable(text) == text and _split(text)[:2] == (prompt, negative_prompt):
        return text
    exact = {"Prompt": prompt, "Negative prompt": negative_prompt}
    return _join(_storable(prompt), _storable(negative_prompt), settings | exact)


def parse_parameters(text: str) -> Parameters:
    """Read the `parameters` text of an image, from kdiffusion or another program.

    Args:
        text: str, whose last line holds the settings.

    Returns:
        `Parameters`; settings that kdiffusion has no word for are in `others`.

    Raises:
        ValueError: if the last line is not a line of settings, or a number is not a number.
    """
    prompt, negative_prompt, line = _split(text)
    settings = {key: _unquote(value.strip()) for key, value in _SETTING.findall(line)}
    if "Steps" not in settings:
        raise ValueError(
            "The last line of a picture's parameters must be settings such as 'Steps: 20, "
            f"Sampler: Euler'. Received: {line[:80]!r}"
        )
    known: dict[str, Any] = {
        name: _number(key, settings.pop(key), kind)
        for key, (name, kind) in _PLAIN.items()
        if key in settings
    }
    width, height = _size(settings)
    sampler, spacing = _sampler(settings)
    return Parameters(
        prompt=settings.pop("Prompt", prompt),
        negative_prompt=settings.pop("Negative prompt", negative_prompt),
        sampler=sampler,
        spacing=spacing,
        width=width,
        height=height,
        noise=_pop_known(settings, "RNG", _NOISES),
        others=settings,
        **known,
    )


def read_parameters(path: str | os.PathLike) -> Parameters:
    """Read the settings stored in a PNG file.

    Args:
        path: path of the file.

    Returns:
        `Parameters`.

    Raises:
        ValueError: if the file holds no readable `parameters` text.
    """
    with Image.open(path) as image:
        text = image.info.get("parameters")
    if not isinstance(text, str):
        raise ValueError(
            f"{os.fspath(path)!r} does not say how it was made: it has no 'parameters' text. "
            "Pictures written by `kdiffusion generate` and AUTOMATIC1111's web UI have one."
        )
    return parse_parameters(text)


def save_pictures(
    pictures: Mapping[Path, tuple[np.ndarray, Parameters]], *, overwrite: bool = False
) -> None:
    """Write images as PNG files that hold their settings: all of them or none.

    Each file appears under its name complete or not at all.

    Args:
        pictures: mapping of path to (uint8 array (height, width, 3), `Parameters`).
        overwrite: bool, whether files of these names are replaced.

    Raises:
        FileExistsError: if a file exists and `overwrite` is false; nothing has been written then.
    """
    created: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            for path in reversed(list(pictures)):  # a stack is left in reverse order
                _write_png(stack.enter_context(replacing(path)), *pictures[path])
            for path in () if overwrite else pictures:
                path.open("xb").close()  # takes the name, unless somebody else has it by now
                created.append(path)
    except BaseException:
        for path in created:
            path.unlink(missing_ok=True)
        raise


def _write_png(path: Path, image: np.ndarray, parameters: Parameters) -> None:
    """Write a PNG file and flush it to the disk."""
    info = PngInfo()
    info.add_text("parameters", format_parameters(parameters))  # tEXt; iTXt beyond Latin-1
    with open(path, "wb") as file:
        Image.fromarray(image).save(file, format="png", pnginfo=info)
        file.flush()
        os.fsync(file.fileno())


def _settings(parameters: Parameters) -> Iterator[tuple[str, str]]:
    """Yield the settings in AUTOMATIC1111's order."""
    spacing = dict.fromkeys((parameters.spacing or "").split("+"))
    sigmas = next((label for name, label in _SIGMA_SPACINGS.items() if name in spacing), None)
    timesteps = next((name for name in spacing if name and name not in _SIGMA_SPACINGS), None)
    size = (parameters.width, parameters.height)
    rows = {
        "Steps": parameters.num_steps,
        "Sampler": _SAMPLERS.get(parameters.sampler or "", parameters.sampler),
        "Schedule type": sigmas,
        _TIMESTEP_SPACING: timesteps,
        "CFG scale": _plain(parameters.guidance_scale),
        "Seed": parameters.seed,
        "Size": None if None in size else f"{size[0]}x{size[1]}",
        "Model": parameters.model,
        "Denoising strength": _plain(parameters.strength),
        "RNG": _NOISES.get(parameters.noise or "", parameters.noise),
        **parameters.others,
        "Version": parameters.version,
    }
    return ((key, str(value)) for key, value in rows.items() if value is not None)


def _plain(number: float | None) -> float | None:
    """Write 7.0 as 7, as people do."""
    return int(number) if number is not None and float(number).is_integer() else number


def _join(prompt: str, negative_prompt: str, settings: Mapping[str, str]) -> str:
    line = ", ".join(f"{key}: {_quote(value)}" for key, value in settings.items())
    negative = f"{_NEGATIVE} {negative_prompt}" if negative_prompt else ""
    return "\n".join([*filter(None, (prompt, negative)), line])


def _split(text: str) -> tuple[str, str, str]:
    """Split a text into the prompt, the negative prompt and the line of settings."""
    *lines, line = text.split("\n")
    start = next((i for i, each in enumerate(lines) if each.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).removeprefix(" ")
    return "\n".join(lines[:start]), negative, line


def _storable(text: str) -> str:
    """Remove what a PNG text cannot hold: NUL and lone surrogates."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")


def _quote(value: str) -> str:
    return json.dumps(value) if _NEEDS_QUOTES.search(value) else value


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # quotes of somebody's own
        return value


def _number(key: str, value: str, kind: type) -> int | float | str:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(
            f"{key!r} in a picture's parameters must be a number. Received: {value[:80]!r}"
        ) from None


def _size(settings: dict[str, str]) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", settings.get("Size", ""))
    if not match:
        return None, None
    del settings["Size"]
    return int(match[1]), int(match[2])


def _sampler(settings: dict[str, str]) -> tuple[str | None, str | None]:
    """Read sampler and spacing. Until 1.8 AUTOMATIC1111 wrote one label, 'DPM++ 2M Karras'."""
    label = settings.get("Sampler", "")
    for suffix in (_SIGMA_SPACINGS[name] for name in ("karras", "exponential")):
        if label.endswith(f" {suffix}"):
            settings["Sampler"] = label.removesuffix(f" {suffix}")
            settings.setdefault("Schedule type", suffix)
    sampler = _pop_known(settings, "Sampler", _SAMPLERS)
    timesteps = settings.pop(_TIMESTEP_SPACING, None)
    sigmas = None
    if settings.get("Schedule type") in _SIGMA_SPACINGS.values():
        sigmas = _pop_known(settings, "Schedule type", _SIGMA_SPACINGS)
    return sampler, "+".join(filter(None, (timesteps, sigmas))) or None


def _pop_known(settings: dict[str, str], key: str, labels: Mapping[str, str]) -> str | None:
    """Return the name whose label the setting is, else the setting itself."""
    value = settings.pop(key, None)
    return next((name for name, label in labels.items() if label == value), value)


# The keys whose value is the field itself.
_PLAIN = {
    "Steps": ("num_steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Denoising strength": ("strength", float),
    "Model": ("model", str),
    "Version": ("version", str),
}

_SIGMA_SPACINGS = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta"}

# "NV" is AUTOMATIC1111's emulation on the host of the stream that PyTorch draws on a GPU.
_NOISES = {"cpu": "CPU", "cuda": "NV"}

_SAMPLERS = {name: record.label for name, record in SAMPLERS.items()}
