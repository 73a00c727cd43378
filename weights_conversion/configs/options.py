"""Values out of a config, checked: an error names the key, its value and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from weights_conversion.files.errors import CheckpointMismatch, printable

Options = Mapping[str, Any]


def unsupported(key: str, value: Any, expected: str) -> CheckpointMismatch:
    """Return the error of an option that the models or samplers here do not know."""
    return CheckpointMismatch(
        f"The config has {key} = {printable(value)}, which is not supported; expected {expected}."
    )


def checked(
    config: Options,
    class_name: str,
    defaults: Options,
    neutral: Options,
    without_effect: Collection[str],
) -> dict[str, Any]:
    """Return the options of a diffusers class with its defaults, once each is understood.

    Args:
        config: the options as they stand in the file.
        class_name: the only `_class_name` that is supported.
        defaults: the options that are read, with the class's defaults.
        neutral: options that may only have the value given here.
        without_effect: options that may have any value.

    Raises:
        CheckpointMismatch: another class, or an option that is not understood.
    """
    name = config.get("_class_name")
    if name != class_name:
        raise unsupported("_class_name", name, class_name)
    for key, value in config.items():
        if key.startswith("_") or key in defaults or key in without_effect:
            continue
        if not is_neutral(value, neutral.get(key)):
            raise unsupported(key, value, repr(neutral.get(key, "no such option")))
    return {**defaults, **config}


def natural(options: Options, key: str) -> int:
    """Return a positive integer."""
    if not _is_natural(options[key]):
        raise unsupported(key, options[key], "a positive integer")
    return options[key]


def number(options: Options, key: str, low: float, high: float) -> float:
    """Return a number within bounds."""
    value = options[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise unsupported(key, value, f"a number from {low:g} to {high:g}")
    return float(value)


def numbers(options: Options, key: str, length: int, low: float, high: float) -> tuple[float, ...]:
    """Return a list of this length of numbers within bounds."""
    if not _is_list(options[key], length):
        raise unsupported(key, options[key], f"a list of {length} numbers")
    return tuple(number({key: value}, key, low, high) for value in options[key])


def flag(options: Options, key: str) -> bool:
    """Return true or false, where null is false."""
    if options[key] not in (None, False, True):
        raise unsupported(key, options[key], "true or false")
    return bool(options[key])


def one_of(options: Options, key: str, known: Collection[str]) -> str:
    """Return a known name."""
    if options[key] not in list(known):
        raise unsupported(key, options[key], f"one of {', '.join(known)}")
    return options[key]


def names(options: Options, key: str, known: Collection[str], length: int) -> tuple[str, ...]:
    """Return a list of this length of known names."""
    value = options[key]
    if not _is_list(value, length) or not all(name in list(known) for name in value):
        raise unsupported(key, value, f"a list of {length}, each one of {', '.join(known)}")
    return tuple(value)


def multiples(options: Options, key: str, factor: int) -> tuple[int, ...]:
    """Return a list of multiples, such as of widths that are split into so many groups."""
    value = options[key]
    if (
        not isinstance(value, Sequence)
        or not value
        or not all(_is_natural(item) and item % factor == 0 for item in value)
    ):
        raise unsupported(key, value, f"a list of multiples of {factor}")
    return tuple(value)


def per_level(options: Options, key: str, levels: int) -> tuple[int, ...]:
    """Return a number for each stage, where one number stands for all."""
    value = options[key]
    values = (value,) * levels if _is_natural(value) else value
    if not _is_list(values, levels) or not all(_is_natural(item) for item in values):
        raise unsupported(key, value, f"a positive integer or a list of {levels}")
    return tuple(values)


def same_on_levels(options: Options, key: str, levels: int) -> int:
    """Return the number that stands for all stages, given once or for each."""
    values = per_level(options, key, levels)
    if len(set(values)) > 1:
        raise unsupported(key, options[key], "the same number on all levels")
    return values[0]


def is_neutral(value: Any, neutral: Any) -> bool:
    """Tell if an option has no effect: at its neutral value, absent, or so for each stage."""
    if isinstance(value, list):
        return all(is_neutral(item, neutral) for item in value)
    return value == neutral or (not neutral and (value is None or value is False))


def _is_natural(value: Any) -> bool:
    return type(value) is int and value > 0  # type(), because True is an int for isinstance


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length
