"""Import the public names of a package when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of a package with lazy names (PEP 562).

    Args:
        package: str, name of the package.
        modules: dictionary from each public name to the module that defines it.

    Returns:
        Two functions, to be assigned in the package's `__init__`.

    Example:

    ```python
    __getattr__, __dir__ = lazy(__name__, {"Sampler": "kdiffusion.sampling.samplers"})
    ```
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        vars(sys.modules[package])[name] = value
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names
