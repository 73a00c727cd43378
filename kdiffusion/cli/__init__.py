"""The command line: `kdiffusion generate "a prompt"`.

Pictures go to files, their names to the standard output, everything else to the standard error.
Keras and TensorFlow are imported only when a picture is drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdiffusion import __version__

if TYPE_CHECKING:
    from kdiffusion.metadata import Parameters

OK, FAILED, INTERRUPTED = 0, 1, 130  # argparse itself leaves with 2 on a usage error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: sequence of str, the arguments; `None` for those of the process.

    Returns:
        int, the exit code: 0, 1 after an error, 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 if the arguments are wrong, 0 after `--help` and `--version`.

    Example:

    >>> main(["generate", "a red circle", "--steps", "5", "--seed", "42"])
    a-red-circle-42.png
    0
    """
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name need not fit the terminal
    try:
        with _plain_warnings():
            arguments.run(arguments)
    except KeyboardInterrupt as interrupt:
        _log("interrupted", *_notes(interrupt))
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        _log(f"error: {_describe(error)}", *_notes(error))
        return FAILED
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdiffusion", description="Stable Diffusion, native to Keras."
    )
    parser.add_argument("--version", action="version", version=f"kdiffusion {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands.add_parser("generate", help="draw pictures from a prompt"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw pictures from a prompt and write them as PNG files."
    parser.set_defaults(run=_generate)
    for title, options in _OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, settings in options.items():
            group.add_argument(name, **settings)


def _count(text: str) -> int:
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, received {text!r}")
    return value


def _generate(arguments: argparse.Namespace) -> None:
    """Draw, then write all the pictures or none."""
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    paths = _paths(arguments.output, arguments.prompt, seed, arguments.batch_size)
    _check_paths(paths, arguments.force)
    before = {path: _identity(path) for path in paths}
    start = time.monotonic()
    try:
        _draw(arguments, seed, paths)
    except BaseException as error:
        error.add_note(_account(before))
        raise
    if not arguments.quiet:
        _log(f"seed {seed}, {time.monotonic() - start:.1f} s")
    sys.stdout.writelines(f"{path}\n" for path in paths)


def _draw(arguments: argparse.Namespace, seed: int, paths: Sequence[Path]) -> None:
    import kdiffusion
    from kdiffusion.metadata import save_pictures

    with _silent_import():
        model_class = kdiffusion.StableDiffusion
    with contextlib.redirect_stdout(sys.stderr):  # the progress bar is no result
        model = model_class.from_preset(arguments.preset, dtype=arguments.dtype)
        images = model.text_to_image(
            arguments.prompt,
            negative_prompt=arguments.negative_prompt,
            batch_size=arguments.batch_size,
            num_steps=arguments.steps,
            unconditional_guidance_scale=arguments.guidance_scale,
            seed=seed,
            sampler=arguments.sampler,
            spacing=arguments.spacing,
            height=arguments.height,
            width=arguments.width,
            verbose=int(not arguments.quiet and sys.stderr.isatty()),
            noise=arguments.noise,
        )
    made = _parameters(arguments)
    pictures = {}
    for index, (path, image) in enumerate(zip(paths, images, strict=True)):
        height, width, _ = image.shape
        pictures[path] = image, replace(made, seed=seed + index, height=height, width=width)
    save_pictures(pictures, overwrite=arguments.force)


def _parameters(arguments: argparse.Namespace) -> Parameters:
    """How the pictures were made, but for what each has of its own."""
    from kdiffusion.metadata import Parameters

    sampler, spacing = _sampling(arguments)
    return Parameters(
        prompt=arguments.prompt,
        num_steps=arguments.steps,
        negative_prompt=arguments.negative_prompt or "",
        sampler=sampler,
        spacing=spacing,
        guidance_scale=arguments.guidance_scale,
        model=_model_name(arguments.preset),
        noise=arguments.noise,
        version=f"kdiffusion {__version__}",
        others={"Dtype": arguments.dtype} if arguments.dtype else {},
    )


def _sampling(arguments: argparse.Namespace) -> tuple[str, str]:
    """The sampler and the spacing, the model's own where the user has not chosen."""
    from kdiffusion import Spacing
    from kdiffusion.sampling.samplers import SAMPLERS, default_spacing
    from kdiffusion.weights import open_source

    own_sampler, own_spacing = open_source(arguments.preset).sampling()
    sampler = arguments.sampler or (own_sampler if own_sampler in SAMPLERS else "ddim")
    asked = arguments.spacing or default_spacing(sampler, own_spacing)
    spacing = Spacing.parse(asked, own_spacing)
    return sampler, "+".join(filter(None, (spacing.timesteps, spacing.sigmas)))


def _model_name(preset: str) -> str:
    """The last part of a path or repository: where its owner keeps files is nobody's business."""
    return Path(preset).name.removesuffix(".safetensors")


def _paths(output: Path | None, prompt: str, seed: int, count: int) -> list[Path]:
    """The files to write."""
    if output is None or output.is_dir():
        words = re.findall(r"\w+", prompt[:200].lower())
        name = "-".join(words)[:40].strip("-_") or "picture"
        output = (output or Path()) / f"{name}-{seed}.png"
    if output.suffix.lower() != ".png":
        raise ValueError(
            f"--output must be a folder that exists or the name of a PNG file. "
            f"Received: {str(output)!r}; did you mean {str(output) + '.png'!r}?"
        )
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(count)]


def _check_paths(paths: Sequence[Path], force: bool) -> None:
    """Say now, not after the long work, what cannot be written."""
    folder = paths[0].parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r} to write to; make it first")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the folder {str(folder)!r} may not be written to")
    taken = [str(path) for path in paths if os.path.lexists(path)]
    if taken and not force:
        raise FileExistsError(f"{', '.join(taken)} exists already; overwrite with --force")
    for path in filter(Path.is_dir, paths):
        raise IsADirectoryError(f"{str(path)!r} is a folder, not a file to overwrite")


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that replaced it."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _account(before: dict[Path, tuple[int, int] | None]) -> str:
    """What a run that stopped has written and what not."""
    written = [str(path) for path, identity in before.items() if _identity(path) != identity]
    if not written:
        return "nothing was written"
    missing = [str(path) for path in before if str(path) not in written]
    return f"written: {', '.join(written)}; not written: {', '.join(missing) or 'none'}"


def _describe(error: Exception) -> str:
    """The message of an error the user can mend; of any other the class too."""
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and message:
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def _notes(error: BaseException) -> Iterable[str]:
    return getattr(error, "__notes__", ())


@contextlib.contextmanager
def _silent_import() -> Iterator[None]:
    """Keep TensorFlow from talking, unless the user has chosen a log level.

    While its libraries are loaded it writes to the file descriptor whatever the level is.
    """
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the line of code that gave them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _log(f"warning: {message}")
        yield


def _log(*lines: str) -> None:
    sys.stderr.writelines(f"kdiffusion: {line}\n" for line in lines)


_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "what to draw": {
        "prompt": {"help": "what the picture shows"},
        "--negative-prompt": {"metavar": "TEXT", "help": "what it does not show"},
        "--height": {"type": _count, "metavar": "PIXELS", "help": "default: the model's own"},
        "--width": {"type": _count, "metavar": "PIXELS", "help": "default: the model's own"},
        "--batch-size": {
            "type": _count,
            "default": 1,
            "metavar": "N",
            "help": "pictures of this prompt (default: 1)",
        },
    },
    "how to draw it": {
        "--preset": {
            "default": "random-tiny",
            "help": "name of a model, a folder, or hf://organisation/repository (default: "
            "random-tiny, whose random weights draw coloured noise)",
        },
        "--steps": {
            "type": _count,
            "default": 50,
            "metavar": "N",
            "help": "steps of the sampler (default: 50)",
        },
        "--sampler": {
            "metavar": "NAME",
            "help": "ddim, euler_a, dpmpp_2m, unipc ...; an unknown name lists them (default: the "
            "model's own)",
        },
        "--spacing": {
            "help": "leading, trailing, linspace, karras, exponential, beta, or a pair such as "
            "leading+karras (default: the model's own)",
        },
        "--guidance-scale": {
            "type": float,
            "default": 7.5,
            "metavar": "SCALE",
            "help": "how closely to follow the prompt, 1 is off (default: 7.5)",
        },
        "--seed": {
            "type": int,
            "metavar": "N",
            "help": "of the first picture, the next has N + 1 (default: a random one, reported)",
        },
        "--noise": {
            "choices": ("cpu", "cuda"),
            "default": "cpu",
            "help": "whose random numbers a seed means: PyTorch's on a CPU, as in diffusers and "
            "ComfyUI, or on a GPU, as in AUTOMATIC1111 (default: cpu)",
        },
        "--dtype": {"metavar": "NAME", "help": "float32, bfloat16 or float16 (default: Keras's)"},
    },
    "files and messages": {
        "--output": {
            "type": Path,
            "metavar": "PATH",
            "help": "a PNG file, or a folder (default: a file here named after prompt and seed); "
            "several pictures get -0, -1 ...",
        },
        "--force": {"action": "store_true", "help": "overwrite files"},
        "--quiet": {"action": "store_true", "help": "print only the files' names and errors"},
        "--debug": {"action": "store_true", "help": "show the traceback of an error"},
    },
}
