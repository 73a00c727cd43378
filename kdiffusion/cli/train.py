"""`kdiffusion train`: train a model with images, in a folder that a run can be resumed from."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from kdiffusion import __version__
from kdiffusion.cli.messages import log, silent_import
from kdiffusion.cli.options import TRAIN
from kdiffusion.files import replacing

_CONFIG = "config.json"
_MODEL = "model"
_STAGE, _OLD = ".model.partial", ".model.old"

# These are the keys of the options in a configuration.
_KEYS = {
    "preset": ("preset",),
    "data": ("data", "folder"),
    "height": ("data", "height"),
    "width": ("data", "width"),
    "cache": ("data", "cache"),
    "steps": ("steps",),
    "batch_size": ("loop", "batch_size"),
    "accumulation": ("loop", "accumulation"),
    "learning_rate": ("optimizer", "learning_rate"),
    "seed": ("seed",),
    "dtype": ("dtype",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.description = "Train a model with images, and write it in diffusers' layout."
    parser.set_defaults(run=run, usage_error=parser.error)
    for title, options in TRAIN.items():
        group = parser.add_argument_group(title)
        for name, settings in options.items():
            group.add_argument(name, **settings)


def run(arguments: argparse.Namespace) -> None:
    """Train, then write the model and print its folder."""
    if not arguments.resume:
        _check_unused(arguments.output)
    with contextlib.redirect_stdout(sys.stderr):  # progress is no result
        _train(arguments)
    print(arguments.output / _MODEL)


def _check_unused(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{str(folder)!r} holds a run or other files already: continue a run by --resume, or "
            "choose another folder"
        )


def _train(arguments):
    with silent_import():
        from kdiffusion.training.config.build import make_job
        from kdiffusion.training.loop.loop import Loop

    folder = arguments.output
    configuration = _configuration(arguments)
    job = make_job(configuration, None if arguments.quiet else _progress, folder)
    if not (folder / _CONFIG).exists():
        _write_configuration(folder, arguments.kind, job.configuration)
    with _ahead(job.data) as data:
        loop = Loop(job.trainer, job.optimizer, data, folder, job.configuration.loop)
        loop.run(job.configuration.steps)
    with loop.averages.applied():
        _save(job.trainer, folder)
    _write_configuration(folder, arguments.kind, job.configuration)


def _ahead(data):
    from kdiffusion.training.data.batches import Prefetch

    return Prefetch(data)


def _configuration(arguments) -> Any:
    """Return the settings of the file or of the run to be resumed, with the options over them."""
    from kdiffusion.records import load
    from kdiffusion.training.config.schema import resolve

    stored = arguments.output / _CONFIG
    path = arguments.config or (stored if arguments.resume and stored.exists() else None)
    if path is None and arguments.resume and arguments.preset is None:
        raise ValueError(
            f"{str(arguments.output)!r} holds no {_CONFIG} to resume by: give the folder of a run, "
            "or --config or --preset to begin one"
        )
    values = {} if path is None else load(path)
    kind = values.pop("kind", arguments.kind)
    values.pop("version", None)
    if kind != arguments.kind:
        raise ValueError(f"{str(path)!r} is the configuration of a run of {kind!r}")
    options: dict[str, Any] = {"loop": {"verbose": not arguments.quiet}}
    for name, path in _KEYS.items():
        value = getattr(arguments, name)
        if value is not None:
            *outer, last = path
            target = options
            for key in outer:
                target = target.setdefault(key, {})
            target[last] = str(value) if isinstance(value, Path) else value
    return resolve(kind, values, options)


def _write_configuration(folder: Path, kind: str, configuration: Any) -> None:
    """Write the configuration of a run beside its checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"kind": kind, "version": __version__, **configuration.fields}
    with replacing(folder / _CONFIG) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _save(trainer, folder: Path) -> None:
    """Write the trained model, in place of that of an earlier part of the run."""
    for leftover in (folder / _STAGE, folder / _OLD):
        shutil.rmtree(leftover, ignore_errors=True)
    trainer.save(folder / _STAGE)
    if (folder / _MODEL).exists():
        (folder / _MODEL).rename(folder / _OLD)
    (folder / _STAGE).rename(folder / _MODEL)
    shutil.rmtree(folder / _OLD, ignore_errors=True)


def _progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    if sys.stderr.isatty():
        print(f"\rcaching {done}/{total}\x1b[K", end=end, file=sys.stderr, flush=True)
    elif end:
        log(f"cached {total}")
