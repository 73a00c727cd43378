"""A reader of pickles that only makes plain records (see `pickle_values`).

Python's own unpickler resolves and calls what the file names, and allocates what the file declares;
this one looks names up in two tables, counts what it spends, and checks every length against the
bytes that are there.
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
    """Interprets one pickle.

    Args:
        path: the file, for messages.
        content: bytes that hold the pickle; others may follow it.
        begin: where the pickle begins in them.
        limits: what it may spend.

    Returns:
        What the pickle describes, in dictionaries, lists, tuples, texts, numbers and the records
        of `pickle_values`, and where it ends.

    Raises:
        UnsafeCheckpoint: it calls something that no weights need.
        CorruptCheckpoint: it is no pickle, or a broken one.
        CheckpointLimit: it spends more than is allowed.
    """
    machine = Machine(path, content, begin, limits)
    value = machine.run(OPCODES)
    _check_nesting(path, value, limits)
    return value, machine.position


def _check_nesting(path: Path, root: Any, limits: Limits) -> None:
    """Walks once over every container, so that what walks later may recurse."""
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
