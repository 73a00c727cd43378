"""The settings of a training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# These may change between two parts of a run, because no result depends on them.
FREE = (
    "accumulation",
    "save_every",
    "keep",
    "log_every",
    "sample_every",
    "num_samples",
    "max_skipped",
    "jit_compile",
    "verbose",
)


@dataclass(frozen=True)
class LoopSettings:
    """The settings of `Loop`.

    Args:
        batch_size: int, samples of a step.
        accumulation: int, micro-batches that a step is cut into to save memory. The random numbers
            are the same, and so are the gradients but for rounding.
        clip_norm: float, the largest norm of all gradients of a group together; larger ones are
            scaled to it. `None` for no limit.
        ema_decay: float in [0, 1), of the averaged weights, see `averages`; `None` for none.
        seed: int from 0 to 2**32 - 1, of all random numbers.
        save_every: int, steps between checkpoints.
        keep: int, how many checkpoints are kept; at least 2, so that one may be damaged.
        log_every: int, steps between lines of the log.
        sample_every: int, steps between grids of images; `None` for none.
        num_samples: int, images of a grid.
        max_skipped: int, how many steps in a row may have NaN or infinite gradients.
        jit_compile: bool or `"auto"`, whether to use XLA, see `gradients`.
        verbose: bool, whether to print progress.

    Raises:
        ValueError: If a value is out of range.
    """

    batch_size: int
    accumulation: int = 1
    clip_norm: float | None = None
    ema_decay: float | None = None
    seed: int = 0
    save_every: int = 500
    keep: int = 3
    log_every: int = 10
    sample_every: int | None = None
    num_samples: int = 16
    max_skipped: int = 10
    jit_compile: bool | str = "auto"
    verbose: bool = True

    def __post_init__(self):
        least = {
            "batch_size": 1,
            "accumulation": 1,
            "save_every": 1,
            "keep": 2,
            "log_every": 1,
            "sample_every": 1,
            "num_samples": 1,
            "max_skipped": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if not (whole and value >= low) and not (name == "sample_every" and value is None):
                raise ValueError(
                    f"`{name}` must be a whole number, {low} or more. Received: {name}={value!r}"
                )
        if self.batch_size % self.accumulation:
            raise ValueError(
                "`batch_size` must be a multiple of `accumulation`. Received: "
                f"batch_size={self.batch_size}, accumulation={self.accumulation}"
            )
        if self.clip_norm is not None and not 0.0 < self.clip_norm < math.inf:
            raise ValueError(
                f"`clip_norm` must be positive, or None. Received: clip_norm={self.clip_norm!r}"
            )
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(
                "`ema_decay` must be from 0 to 1, without 1, or None. "
                f"Received: ema_decay={self.ema_decay!r}"
            )
        if self.jit_compile not in (True, False, "auto"):
            raise ValueError(
                "`jit_compile` must be True, False or 'auto'. "
                f"Received: jit_compile={self.jit_compile!r}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(
                f"`seed` must be a whole number from 0 to 2**32 - 1. Received: seed={self.seed!r}"
            )
