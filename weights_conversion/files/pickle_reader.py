"""A reader of pickles that makes nothing but plain records (see `pickle_values`).

Python's unpickler resolves and calls the names in a file, and allocates the sizes that it declares.
This reader looks names up in two tables, counts its steps, and checks every length against the
bytes of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weights_conversion.files.errors import CheckpointLimit
from weights_conversion.files.limits import Limits
from weights_conversion.files.pickle_machine import Machine
from weights_conversion.files.pickle_opcodes import OPCODES
from weights_conversion.files.pickle_values import Placeholder


def load_pickle(path: Path, content: bytes, begin: int, limits: Limits) -> tuple[Any, int]:
    """Interpret one pickle.

    Args:
        path: the file, for messages.
        content: bytes that hold the pickle; other bytes may follow it.
        begin: position of the pickle in them.
        limits: limits of the file.

    Returns:
        The object of the pickle, made of dictionaries, lists, tuples, texts, numbers and the
        records of `pickle_values`; and the position of the pickle's end.

    Raises:
        UnsafeCheckpoint: If it calls something that no weights need.
        CorruptCheckpoint: If it is no pickle, or a broken one.
        CheckpointLimit: If it takes more steps than allowed.
    """
    machine = Machine(path, content, begin, limits)
    value = machine.run(OPCODES)
    _check_nesting(path, value, limits)
    return value, machine.position


def _check_nesting(path: Path, root: Any, limits: Limits) -> None:
    """Check the depth of containers, so that later code may recurse."""
    seen = {id(root)}
    level, depth = [root], 0
    while level:
        if depth > limits.nesting:
            raise CheckpointLimit(
                f"{path}: its pickle nests containers more than {limits.nesting:,} deep, which no "
                "weights do. Do not trust it."
            )
        inner = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item.values(), *item.keys()]
            elif isinstance(item, (list, tuple)):
                inner += item
            elif isinstance(item, Placeholder):
                inner += [item.arguments, item.state]
        level = []
        for item in inner:
            if isinstance(item, (dict, list, tuple, Placeholder)) and id(item) not in seen:
                seen.add(id(item))
                level.append(item)
        depth += 1
