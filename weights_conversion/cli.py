"""The command line: `python -m weights_conversion inspect|convert|repair`.

Results go to the standard output, progress and errors to the standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from weights_conversion.files.errors import CheckpointError, printable
from weights_conversion.files.safetensors_reader import open_safetensors
from weights_conversion.files.safetensors_writer import write_safetensors
from weights_conversion.files.staging import check_space, removed_if_killed, staged_file
from weights_conversion.models.conversion import (
    FLOATS,
    WriteTokenizer,
    convert,
    open_model,
)
from weights_conversion.models.folder import MAX_SHARD_BYTES
from weights_conversion.models.inspection import as_text, inspect
from weights_conversion.models.prediction import PREDICTIONS
from weights_conversion.models.single_file import WEIGHTS

OK, FAILED, INTERRUPTED = 0, 1, 130  # argparse itself leaves with 2 on a usage error

_SECONDS_BETWEEN = 0.2  # two lines of progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m weights_conversion", description="Public checkpoints, in and out."
    )
    add_commands(parser.add_subparsers(metavar="COMMAND", required=True))
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return OK


def add_commands(
    commands: argparse._SubParsersAction, write_tokenizer: WriteTokenizer | None = None
) -> None:
    """Add the commands to a parser's subparsers; each sets `run`, a function of the arguments.

    Args:
        commands: of the parser.
        write_tokenizer: writes the tokenizer that single files have not, see `convert`.
    """
    _add_inspect(commands.add_parser("inspect", help="say what a checkpoint holds"))
    convert_parser = commands.add_parser("convert", help="write a checkpoint in another layout")
    convert_parser.set_defaults(write_tokenizer=write_tokenizer)
    _add_convert(convert_parser)
    _add_repair(commands.add_parser("repair", help="cut off the bytes behind the last tensor"))


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Tell family, parts, dtypes, size and metadata; reads no weights."
    parser.add_argument("file", metavar="FILE", type=Path, help="a file, or a diffusers folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect, debug=False)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a model as a single file or as a folder in diffusers' layout."
    parser.add_argument("source", metavar="SRC", type=Path, help="a file, or a diffusers folder")
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="NAME.safetensors, or a folder to make"
    )
    parser.add_argument("--dtype", choices=FLOATS, help="of the result (default: the source's)")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="ema", help="of files that hold both (default: ema)"
    )
    parser.add_argument("--prediction-type", choices=PREDICTIONS, metavar="TYPE")
    parser.add_argument("--config", metavar="FOLDER", help="whose configs describe a single file")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="to copy into the new folder")
    parser.add_argument("--variant", help="of a folder's weights, such as fp16")
    parser.add_argument(
        "--max-shard-bytes", metavar="N", type=int, default=MAX_SHARD_BYTES, help="of a folder"
    )
    parser.set_defaults(run=_convert, debug=False)


def _add_repair(parser: argparse.ArgumentParser) -> None:
    parser.description = "Copy a safetensors file without the bytes behind its last tensor."
    parser.add_argument("source", metavar="SRC", type=Path, help="a file that you trust")
    parser.add_argument("destination", metavar="DST", type=Path, help="NAME.safetensors")
    parser.set_defaults(run=_repair, debug=False)


def _inspect(arguments: argparse.Namespace) -> None:
    description = inspect(arguments.file)
    print(json.dumps(description, indent=2) if arguments.json else as_text(description))


def _convert(arguments: argparse.Namespace) -> None:
    source = open_model(
        arguments.source,
        variant=arguments.variant,
        weights=arguments.weights,
        prediction_type=arguments.prediction_type,
        config=arguments.config,
    )
    report = convert(
        source,
        arguments.destination,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer or arguments.write_tokenizer,
        max_shard_bytes=arguments.max_shard_bytes,
        progress=_Progress(),
    )
    for name in report.dropped:
        print(f"dropped: {printable(name)}", file=sys.stderr)
    print(report.path)


def _repair(arguments: argparse.Namespace) -> None:
    tensors = open_safetensors(arguments.source, ignore_trailing_bytes=True)
    check_space(arguments.destination.absolute(), tensors.nbytes)
    with staged_file(arguments.destination) as stage, removed_if_killed(stage):
        write_safetensors(stage, tensors, metadata=tensors.metadata)
    print(arguments.destination)


class _Progress:
    """Progress on the standard error: one changing line of a terminal, else tenths."""

    def __init__(self) -> None:
        self._began = self._told_at = time.monotonic()
        self._told = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        seconds = max(now - self._began, 1e-3)
        line = f"{done / total:4.0%} of {total / 1e6:,.0f} MB, {done / 1e6 / seconds:,.0f} MB/s"
        if sys.stderr.isatty():
            if now - self._told_at > _SECONDS_BETWEEN or done == total:
                self._told_at = now
                print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif 10 * done // total > self._told:
            self._told = 10 * done // total
            print(line, file=sys.stderr, flush=True)
