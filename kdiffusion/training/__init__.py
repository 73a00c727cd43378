"""Training of autoencoders, CLIP and diffusion models.

The public names are imported when they are first used, like those of `kdiffusion`.
"""

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "Trainer": "kdiffusion.training.trainer",
}

__all__ = [*_MODULES]

if TYPE_CHECKING:  # the same names for type checkers and editors, which cannot follow strings
    from kdiffusion.training.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kdiffusion.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
