"""The rows of a sampler as arrays, which the denoise loop runs whatever the sampler is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdiffusion.sampling.levels import Levels
from kdiffusion.sampling.rows import Row

NUM_REGISTERS = 5
SOURCES = ("denoised", "network", "noise")


class Table(NamedTuple):
    """A sampler's run over `n` rows, one network call each, in float64.

    Args:
        timesteps: `(n,)`, the timestep inputs of the network.
        a: `(n,)`, scale of the latents in `x` before the row.
        s: `(n,)`, scale of the noise in `x` before the row.
        skip: `(n,)`; the denoised latents are `skip * x + out * network(x, timestep)`.
        out: `(n,)`.
        steps: `(n,)` int, the sampler step of the row.
        draws_noise: `(n,)` bool, whether the row uses fresh noise.
        next: `(n, 5, 8)`, the registers after the row from `[r0 .. r4, denoised, network, noise]`
            before it; r0 is `x`.
        start_scale: float, `x = start_scale * noise` where the run starts from noise alone. Where
            it starts from an image, `x = a[0] * z + s[0] * noise`.
        end: `(a, s)` of `x` after the last row.
    """

    timesteps: np.ndarray
    a: np.ndarray
    s: np.ndarray
    skip: np.ndarray
    out: np.ndarray
    steps: np.ndarray
    draws_noise: np.ndarray
    next: np.ndarray
    start_scale: float
    end: tuple[float, float]


class Rows(NamedTuple):
    """The tables of a batch of `b` images side by side, padded to `n` rows.

    Args:
        timesteps: `(n, b)` float32.
        prediction: `(n, b, 2)` float32, `[skip, out]`.
        next: `(n, b, 5, 8)` float32.
        landing: `(n, b, 2)` float32, `[a, s]` of `x` after the row.
        steps: `(n, b)` int32, for the host: the step of the row, -1 where the image is done.
        draws_noise: `(n, b)` bool, for the host.
    """

    timesteps: np.ndarray
    prediction: np.ndarray
    next: np.ndarray
    landing: np.ndarray
    steps: np.ndarray
    draws_noise: np.ndarray


def tabulate(rows: Sequence[Row], levels: Levels) -> Table:
    """Return the table of a sampler's rows.

    Args:
        rows: each `Row` of a run, in order.
        levels: `Levels` that they were made from.

    Returns:
        `Table`.

    Raises:
        ValueError: If more than five registers are in use at once.
    """
    matrices = _pack_registers(rows)
    at = [row.level for row in rows]
    predictions = np.array(
        [levels.schedule.denoised_coefficients(level.a, level.s) for level in at]
    )
    return Table(
        timesteps=np.array([level.timestep for level in at]),
        a=np.array([level.a for level in at]),
        s=np.array([level.s for level in at]),
        skip=predictions[:, 0],
        out=predictions[:, 1],
        steps=np.array([row.step for row in rows]),
        draws_noise=np.any(matrices[:, :, -1] != 0.0, axis=1),
        next=matrices,
        start_scale=levels.start_scale,
        end=levels.points[-1][1:],
    )


def pack(tables: Sequence[Table], block: int = 1) -> Rows:
    """Return the tables of a batch as float32 arrays with a batch axis.

    An image that is done, and the padding of the last block, get identity rows: they leave every
    register as it is, and their denoised latents are `x`.

    Args:
        tables: one `Table` for each image.
        block: int, the rows are padded to a multiple of it.

    Returns:
        `Rows`.
    """
    length = -(-max(len(table.timesteps) for table in tables) // block) * block
    images = [_padded(table, length) for table in tables]
    return Rows(*(np.stack(arrays, axis=1) for arrays in zip(*images)))


def _padded(table, length):
    levels = np.stack([table.a, table.s], axis=-1)
    landing = np.concatenate([levels[1:], [table.end]])
    identity = np.eye(NUM_REGISTERS, NUM_REGISTERS + len(SOURCES))
    prediction = np.stack([table.skip, table.out], axis=-1)
    return Rows(
        timesteps=_pad(table.timesteps, length, 0.0, np.float32),
        prediction=_pad(prediction, length, (1.0, 0.0), np.float32),
        next=_pad(table.next, length, identity, np.float32),
        landing=_pad(landing, length, table.end, np.float32),
        steps=_pad(table.steps, length, -1, np.int32),
        draws_noise=_pad(table.draws_noise, length, False, bool),
    )


def _pad(array, length, value, dtype):
    padded = np.empty((length, *array.shape[1:]), dtype)
    padded[: len(array)] = array
    padded[len(array) :] = value
    return padded


def _pack_registers(rows):
    """Return `(n, 5, 8)`: named registers in as few slots as their lives allow, `x` in slot 0."""
    used_after = _registers_used_after(rows)
    slots = {"x": 0}
    matrices = np.zeros((len(rows), NUM_REGISTERS, NUM_REGISTERS + len(SOURCES)))
    for matrix, row, used in zip(matrices, rows, used_after):
        slots_after = _assign_slots(slots, used)
        columns = slots | {name: NUM_REGISTERS + i for i, name in enumerate(SOURCES)}
        for name in used:
            for source, coefficient in row.next.get(name, {name: 1.0}).items():
                matrix[slots_after[name], columns[source]] += coefficient
        slots = slots_after
    return matrices


def _registers_used_after(rows):
    used, used_after = {"x"}, []
    for row in reversed(rows):
        used_after.append(used)
        read = {source for name in used for source in row.next.get(name, {name: 1.0})}
        used = {"x"} | (read - set(SOURCES))
    return used_after[::-1]


def _assign_slots(slots, used):
    kept = {name: slot for name, slot in slots.items() if name in used}
    free = [slot for slot in range(NUM_REGISTERS) if slot not in kept.values()]
    new = sorted(used - set(kept))
    if len(new) > len(free):
        raise ValueError(
            f"A sampler may use {NUM_REGISTERS} registers at once. Received: {sorted(used)}. "
            "Fold a memory into the row that makes it."
        )
    return kept | dict(zip(new, free))
