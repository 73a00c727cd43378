"""`kdiffusion generate`: images from a prompt, from another image, or of a class."""

from __future__ import annotations

import argparse
import contextlib
import functools
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdiffusion import __version__
from kdiffusion.cli import files
from kdiffusion.cli.messages import log, silent_import
from kdiffusion.cli.options import GENERATE
from kdiffusion.weights.presets import DEFAULT

if TYPE_CHECKING:
    from kdiffusion.pipelines.metadata import Parameters
    from kdiffusion.sampling.samplers import Sampler
    from kdiffusion.sampling.spacing import Spacing

_KNOWS = "a small model of circles, crosses and other shapes in eight colours"
_ANOTHER = "for Stable Diffusion add --preset stable-diffusion-v1-5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Generate images from a prompt, from another image or of a class, and write PNG files."
    )
    parser.set_defaults(run=run, usage_error=parser.error)
    for title, options in GENERATE.items():
        group = parser.add_argument_group(title)
        for name, settings in options.items():
            group.add_argument(name, **settings)


def run(arguments: argparse.Namespace) -> None:
    """Generate, then write all images or none."""
    chosen = arguments.preset is not None
    if not chosen:
        arguments.preset = DEFAULT
    _check_task(arguments)
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    name = arguments.prompt
    if name is None:
        name = "" if arguments.label is None else f"class {arguments.label}"
    paths = files.picture_paths(arguments.output, name, seed, arguments.batch_size)
    _check_files(arguments, paths)
    previews = [arguments.preview] if arguments.preview else []
    before = files.identities([*previews, *paths])
    start = time.monotonic()
    try:
        _generate(arguments, seed, paths)
    except BaseException as error:
        error.add_note(files.account(before))
        raise
    if not arguments.quiet:
        log(f"seed {seed}, {time.monotonic() - start:.1f} s")
        if not chosen:
            log(f"generated with {DEFAULT}, {_KNOWS}; {_ANOTHER}")
    sys.stdout.writelines(f"{path}\n" for path in paths)


def _check_task(arguments):
    if arguments.prompt is None:
        _check_without_prompt(arguments)
    elif arguments.label is not None:
        arguments.usage_error("--label is for models of classes, which take no prompt")
    for name in ("mask", "strength"):
        if getattr(arguments, name) is not None and not arguments.image:
            arguments.usage_error(f"--{name} is for an image to start from: add --image PATH")
    if arguments.strength is None and arguments.image:
        arguments.strength = 1.0 if arguments.mask else 0.8
    if arguments.guidance_scale is None:
        arguments.guidance_scale = 1.0 if arguments.prompt is None else 7.5


def _check_without_prompt(arguments):
    from kdiffusion.weights.presets import PRESETS

    if arguments.preset in (*PRESETS, "random-tiny"):
        arguments.usage_error("this model generates from a text: give a prompt")
    for name in ("image", "mask", "negative_prompt", "preview"):
        if getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            arguments.usage_error(f"--{option} is for models of texts, with a prompt")


def _check_files(arguments, paths):
    from kdiffusion.images.reading import read

    written = list(paths)
    if arguments.preview:
        files.check_suffix("--preview", arguments.preview)
        if arguments.preview.absolute() in [path.absolute() for path in paths]:
            raise ValueError(f"--preview and --output both name {str(arguments.preview)!r}")
        written.insert(0, arguments.preview)
    files.check_writable(written, arguments.force)
    # The model reads them again, but long after it was loaded.
    for name in ("image", "mask"):
        if path := getattr(arguments, name):
            read(path, f"--{name}", background=0.0)


def _generate(arguments: argparse.Namespace, seed: int, paths: Sequence[Path]) -> None:
    import kdiffusion
    from kdiffusion.pipelines.metadata import save_pictures

    with silent_import():
        open_model = kdiffusion.open_model
    with contextlib.redirect_stdout(sys.stderr):  # the progress bar is no result
        model = open_model(arguments.preset, dtype=arguments.dtype)
        task = _task(model, arguments)
        sampler, spacing = _sampling(arguments, model.default_sampling)
        images = task(
            batch_size=arguments.batch_size,
            num_steps=arguments.steps,
            unconditional_guidance_scale=arguments.guidance_scale,
            seed=seed,
            sampler=sampler,
            spacing=spacing,
            height=arguments.height,
            width=arguments.width,
            guidance=kdiffusion.Guidance(arguments.guidance_rescale, arguments.guidance_interval),
            callback=_show(arguments.preview) if arguments.preview else None,
            verbose=int(not arguments.quiet and sys.stderr.isatty()),
            noise=arguments.noise,
        )
    made = _parameters(arguments, sampler, spacing)
    pictures = {}
    for index, (path, image) in enumerate(zip(paths, images, strict=True)):
        height, width, _ = image.shape
        pictures[path] = image, replace(made, seed=seed + index, height=height, width=width)
    save_pictures(pictures, overwrite=arguments.force)


def _sampling(
    arguments: argparse.Namespace, defaults: tuple[str, Spacing]
) -> tuple[Sampler, Spacing]:
    """Return the sampler and the spacing, the model's own where the user has not chosen."""
    from kdiffusion.pipelines.settings import resolve_sampling

    sampler, spacing = resolve_sampling(arguments.sampler, arguments.spacing, defaults)
    return replace(sampler, eta=arguments.eta, order=arguments.order), spacing


def _task(model, arguments) -> Callable[..., Any]:
    """Return the method that makes what was asked for, with what it alone takes."""
    has_texts = hasattr(model, "text_to_image")
    if arguments.prompt is None:
        if has_texts:
            raise ValueError("this model generates from a text: give a prompt")
        return functools.partial(model.generate_image, arguments.label)
    if not has_texts:
        raise ValueError("this model takes no prompt: give none, and --label for one of classes")
    texts = {"prompt": arguments.prompt, "negative_prompt": arguments.negative_prompt}
    if arguments.image is None:
        return functools.partial(model.text_to_image, **texts)
    start = {"image": arguments.image, "strength": arguments.strength}
    if arguments.mask is None:
        return functools.partial(model.image_to_image, **texts, **start)
    return functools.partial(model.inpaint, **texts, **start, mask=arguments.mask)


def _show(path: Path) -> Callable[..., None]:
    """Return a callback that keeps a file showing the images as far as they are, side by side."""
    import numpy as np

    def show(step):
        try:
            files.replace_picture(path, np.concatenate(list(step.preview), axis=1))
        except OSError as error:  # no reason to lose the images themselves
            warnings.warn(f"the preview cannot be written: {error}", stacklevel=1)

    return show


def _parameters(arguments: argparse.Namespace, sampler: Sampler, spacing: Spacing) -> Parameters:
    """Return the settings that all images share."""
    from kdiffusion.pipelines.metadata import Parameters

    return Parameters(
        prompt=arguments.prompt or "",
        num_steps=arguments.steps,
        negative_prompt=arguments.negative_prompt or "",
        sampler=sampler.name,
        spacing="+".join(filter(None, (spacing.timesteps, spacing.sigmas))),
        guidance_scale=arguments.guidance_scale,
        strength=arguments.strength,
        model=_model_name(arguments.preset),
        noise=arguments.noise,
        version=f"kdiffusion {__version__}",
        others={name: str(value) for name, value in _others(arguments, sampler)},
    )


def _others(arguments, sampler):
    """Yield the settings that few images have, in AUTOMATIC1111's words where it has any."""
    if arguments.label is not None:
        yield "Class", arguments.label
    if arguments.mask is not None:
        yield "Mask mode", "Inpaint masked"
        yield "Mask blur", 0
    if sampler.eta is not None:
        yield "Eta DDIM" if sampler.name == "ddim" else "Eta", sampler.eta
    if sampler.order is not None:
        yield "Order", sampler.order
    if arguments.guidance_rescale:
        yield "Guidance rescale", arguments.guidance_rescale
    start, stop = arguments.guidance_interval
    if (start, stop) != (0.0, 1.0):
        yield "Guidance interval", f"{start} to {stop}"
    if arguments.dtype:
        yield "Dtype", arguments.dtype


def _model_name(preset: str) -> str:
    """Return the last part of a path or repository: its owner's folders are private."""
    return Path(preset).name.removesuffix(".safetensors")
