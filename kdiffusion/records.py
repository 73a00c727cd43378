"""Records and the JSON that describes them: every key is known and every value of its type."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fields(record) -> dict:
    """Return the fields of a record as a plain dictionary that JSON can hold."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(record).items()
    }


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read the JSON object of a file.

    Raises:
        ValueError: If there is no such file, or it holds no JSON object.
    """
    try:
        values = json.loads(
            Path(path).read_text(encoding="utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{os.fspath(path)!r} holds a {type(values).__name__}. Expected a JSON object such as "
            '{"data": {"height": 64, "width": 64}}'
        )
    return values


def _refuse(name):
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return values


def record(cls: Any, values: Any, place: str = "") -> Any:
    """Make a record of a JSON object, by the annotations of the record's class.

    Args:
        cls: a dataclass; its fields may be records too, lists of a kind, or one of several kinds.
        values: value as JSON holds it.
        place: str, its path in a larger object, for messages.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: If a key is unknown or missing, or a value is of the wrong type or out of
            range; the message names its place.
    """
    where = place or "the configuration"
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be an object. Received: {_shown(values)}")
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{where} has no {unknown[0]!r}. Known keys: {', '.join(sorted(known))}")
    missing = [
        name
        for name, field in known.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} needs {missing[0]!r}.")
    checked = {
        name: _value(hints[name], value, f"{place}.{name}".lstrip("."))
        for name, value in values.items()
    }
    try:
        return cls(**checked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(hint, value, place):
    """Convert a JSON value to the type of a record's annotation."""
    if dataclasses.is_dataclass(hint):
        return record(hint, value, place)
    if isinstance(hint, types.UnionType):
        return _any_of(typing.get_args(hint), value, place)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        inner = typing.get_args(hint)[0]
        return tuple(_value(inner, item, f"{place}[{n}]") for n, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if hint in (Any, type(value)):
        return value
    raise ValueError(f"{place} must be {_called(hint)}. Received: {_shown(value)}")


def _any_of(hints, value, place):
    """Convert a JSON value to the first type that fits; an object is always a record."""
    for hint in hints:
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            return record(hint, value, place)
    for hint in hints:
        try:
            return _value(hint, value, place)
        except ValueError:
            continue
    names = " or ".join(_called(hint) for hint in hints)
    raise ValueError(f"{place} must be {names}. Received: {_shown(value)}")


def _called(hint):
    """Return an annotation in JSON's words."""
    if dataclasses.is_dataclass(hint):
        return "an object"
    if typing.get_origin(hint) is tuple:
        return f"a list, each item {_called(typing.get_args(hint)[0])}"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        dict: "an object",
        type(None): "null",
    }
    return names[hint]


def _shown(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
