"""The one loop that runs rows of a table on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from kdiffusion.sampling.guidance import Predict, per_image

# Rows handed to the device at a time. Whole runs, single steps and resumed runs share one
# executable, because its arrays always have this length.
BLOCK = 16


class RowBlock(NamedTuple):
    """A block of rows of a batch, and the noise that they draw.

    Args:
        timesteps: (BLOCK, batch) float32.
        prediction: (BLOCK, batch, 2) float32, `[skip, out]`.
        next: (BLOCK, batch, 5, 8) float32.
        landing: (BLOCK, batch, 2) float32, `[a, s]` of x after the row.
        noise: (BLOCK, batch, height, width, channels) float32, unit normal.
    """

    timesteps: Any
    prediction: Any
    next: Any
    landing: Any
    noise: Any


def run(
    predict: Predict,
    registers: Any,
    block: RowBlock,
    start: Any,
    stop: Any,
    constrain: Callable[[Any, Any, Any], Any] | None = None,
) -> dict[str, Any]:
    """Run rows `start` to `stop` of a block, one network call each.

    Args:
        predict: prediction function `(x, timestep) -> network output`, (batch, height, width,
            channels) float32.
        registers: (5, batch, height, width, channels) float32; register 0 is x.
        block: `RowBlock`.
        start: int32 scalar, first row.
        stop: int32 scalar, one past the last row.
        constrain: function `(x, a, s) -> x` that is applied after each row, with the level of each
            image; or `None`.

    Returns:
        Dictionary of `registers`; `denoised`, the estimate of the latents at the last row; and
        `finite`, (batch,) bool, whether x is finite.
    """

    def more_rows(row, registers, denoised):
        return row < stop

    def run_row(row, registers, denoised):
        x = registers[0]
        output = predict(x, block.timesteps[row])
        skip, out = (per_image(values) for values in ops.unstack(block.prediction[row], axis=-1))
        denoised = skip * x + out * output
        sources = ops.concatenate([registers, ops.stack([denoised, output, block.noise[row]])])
        matrix = ops.transpose(block.next[row], (1, 2, 0))[..., None, None, None]
        # Products are summed element by element: a matrix product could be rounded to TF32.
        registers = ops.sum(matrix * sources[None], axis=1)
        if constrain is not None:
            a, s = (per_image(values) for values in ops.unstack(block.landing[row], axis=-1))
            registers = ops.concatenate([constrain(registers[0], a, s)[None], registers[1:]])
        return row + 1, registers, denoised

    _, registers, denoised = ops.while_loop(
        more_rows, run_row, (start, registers, ops.zeros_like(registers[0]))
    )
    finite = ops.all(ops.isfinite(registers[0]), axis=(1, 2, 3))
    return {"registers": registers, "denoised": denoised, "finite": finite}
