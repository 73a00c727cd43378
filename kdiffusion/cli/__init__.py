"""The command line: `kdiffusion generate "a prompt"`, `train`, `samplers`, `inspect`, `convert` ...

Results go to files and the standard output, everything else to the standard error. Keras and
TensorFlow are imported only when an image is generated or a model trained.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from kdiffusion import __version__
from kdiffusion.cli import generate, samplers, train
from kdiffusion.cli.messages import describe, log, notes, plain_warnings

OK, FAILED, INTERRUPTED = 0, 1, 130  # argparse itself exits with 2 on a usage error

# These are weights_conversion's, which is imported only when one of them is called.
_CHECKPOINT_COMMANDS = {
    "inspect": "say what a checkpoint holds",
    "convert": "write a checkpoint in another layout",
    "repair": "cut off the bytes behind the last tensor of a file",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: sequence of str, the arguments; `None` for those of the process.

    Returns:
        int, the exit code: 0, 1 after an error, 130 after Ctrl-C.

    Raises:
        SystemExit: With code 2 if the arguments are wrong, 0 after `--help` and `--version`, 130
            and 143 when training was saved and stopped by Ctrl-C or SIGTERM.

    Example:

    >>> main(["generate", "a red circle", "--steps", "5", "--seed", "42"])
    a-red-circle-42.png
    0
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(argv[:1]).parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a terminal may lack characters of a name
    try:
        with plain_warnings():
            arguments.run(arguments)
    except KeyboardInterrupt as interrupt:
        log("interrupted", *notes(interrupt))
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        log(f"error: {describe(error)}", *notes(error))
        return FAILED
    return OK


def _parser(command: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdiffusion", description="Stable Diffusion, native to Keras."
    )
    parser.add_argument("--version", action="version", version=f"kdiffusion {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    generate.add_arguments(commands.add_parser("generate", help="generate images"))
    train.add_arguments(commands.add_parser("train", help="train a model"))
    samplers.add_arguments(commands.add_parser("samplers", help="list the samplers"))
    if _CHECKPOINT_COMMANDS.keys() & set(command):
        from kdiffusion.cli.tokenizers import write_tokenizer
        from weights_conversion import add_commands

        add_commands(commands, write_tokenizer)
    else:
        for name, text in _CHECKPOINT_COMMANDS.items():
            commands.add_parser(name, help=text)
    return parser
