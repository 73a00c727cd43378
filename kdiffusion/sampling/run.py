"""Run sampler tables with a network: noise and tables in, latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from kdiffusion.runtime import backend
from kdiffusion.runtime.programs import Program
from kdiffusion.sampling import loop
from kdiffusion.sampling.guidance import Guidance, classifier_free
from kdiffusion.sampling.noise import NoiseStream
from kdiffusion.sampling.table import NUM_REGISTERS, Rows, Table, pack


class State(NamedTuple):
    """The state of a stopped run: with the same settings it continues from here.

    Args:
        row: int, how many network calls are done.
        registers: (5, batch, height, width, channels) float32, the sampler's memory.
    """

    row: int
    registers: np.ndarray


class Step(NamedTuple):
    """The state after a step of a sampler, for a callback.

    Args:
        step: int, how many steps are done, from 1.
        num_steps: int, how many there will be.
        denoised: (batch, height, width, channels) float32, the current estimate of the latents.
        state: `State`, to continue with as `resume`.
        estimate: function of latents that returns small images, see `Pipeline.preview`.
    """

    step: int
    num_steps: int
    denoised: np.ndarray
    state: State
    estimate: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def preview(self) -> np.ndarray:
        """The current estimate as small images, uint8 (batch, height, width, 3).

        Raises:
            ValueError: If nothing tells the colours of the latents.
        """
        if self.estimate is None:
            raise ValueError("This step has no preview: it was made without a pipeline.")
        return self.estimate(self.denoised)


class Run(NamedTuple):
    """A batch of images to be generated.

    Args:
        tables: one `Table` for each image.
        latents: (batch, height, width, channels) float32, x at the first row.
        inputs: dictionary of the network's other inputs, and of those of `denoise`.
        guided_inputs: the same for a guided network call, with the contexts or labels to move away
            from before those to move to; the guidance scale is not among them.
        scales: (batch,) float, guidance scales; at most 1 is off.
        guidance: `Guidance`.
        streams: one noise stream for each image; rows that need fresh noise draw from it.
    """

    tables: Sequence[Table]
    latents: np.ndarray
    inputs: dict[str, np.ndarray]
    guided_inputs: dict[str, np.ndarray]
    scales: np.ndarray
    guidance: Guidance
    streams: Sequence[NoiseStream]


def denoise(model, registers, block, start, stop, inputs):
    """Run rows of a table with a network; the function behind the denoising program.

    Args:
        model: network that maps `latents`, `timestep` and further inputs to a prediction.
        registers, block, start, stop: see `sampling.loop.run`.
        inputs: dictionary of the network's other inputs, and of
            `conditioning`, joined to the latents as further channels;
            `guidance_scale` and `guidance_rescale`, (batch,), for classifier-free guidance: the
            network's inputs then hold those to move away from first, and it predicts of both;
            `mask`, `known` and `known_noise` to keep latents where the mask is 0: after each row
            they are noised to its level, always with the same noise (Lugmayr et al. 2022, eq. 8).

    Returns:
        See `sampling.loop.run`.
    """
    inputs = dict(inputs)
    scale, rescale, conditioning, mask, known, known_noise = (
        inputs.pop(name, None)
        for name in (
            "guidance_scale",
            "guidance_rescale",
            "conditioning",
            "mask",
            "known",
            "known_noise",
        )
    )

    def predict(x, timestep):
        if conditioning is not None:
            x = ops.concatenate([x, conditioning], axis=-1)
        outputs = model({"latents": x, "timestep": timestep, **inputs})
        return ops.cast(outputs, "float32")

    def keep_known(x, a, s):
        return mask * x + (1.0 - mask) * (a * known + s * known_noise)

    if scale is not None:
        predict = classifier_free(predict, scale, rescale)
    constrain = None if mask is None else keep_known
    return loop.run(predict, registers, block, start, stop, constrain)


def prepare(program: Program, model: keras.Model, run: Run) -> None:
    """Begin to prepare the program for a run's first network call, see `Program.prepare`.

    Args:
        program: the `Program` of `denoise`.
        model: the network, whose weights may be unread.
        run: `Run`; its streams are left as they are.
    """
    rows = pack(run.tables, loop.BLOCK)
    scales = run.guidance.row_scales(rows.steps, run.scales)
    registers = ops.convert_to_tensor(_start(run.latents).registers)
    inputs = _network_inputs(scales[0], *_inputs_and_guided(run))
    program.prepare(model, registers, _tensors(rows, 0, _no_noise(run)), *_bounds(0, 1), inputs)


def sample(
    program: Program,
    model: keras.Model,
    run: Run,
    on_step: Callable[[Step], Any] | None = None,
    resume: State | None = None,
    preview: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Denoise a batch of latents.

    While somebody watches, or on a CPU, rows are handed over one at a time, so that progress is
    true and Ctrl-C answers within one network call.

    Args:
        program: the `Program` of `denoise`.
        model: the network.
        run: `Run`.
        on_step: called with a `Step` after each step; `False` as an answer stops the run.
        resume: the `State` of an earlier, interrupted call with the same run.
        preview: function of latents that returns small images, for `Step.preview`.

    Returns:
        (batch, height, width, channels) float32: the final latents, or the latest estimate of
        them if the run was stopped.

    Raises:
        ValueError: If latents become NaN or infinite, or `resume` does not fit.
    """
    rows = _land_on_latents(pack(run.tables, loop.BLOCK))
    last = max(len(table.timesteps) for table in run.tables)
    steps = rows.steps.max(axis=1)
    scales = run.guidance.row_scales(rows.steps, run.scales)
    state = resume or _start(run.latents)
    _check_state(state, run.latents.shape, last)
    plain, guided = _inputs_and_guided(run)
    registers = ops.convert_to_tensor(state.registers)
    block, first = None, -1
    for row, stop in _segments(scales, state.row, last, watched=on_step is not None):
        if block is None or row - row % loop.BLOCK != first:
            block, first = _block(rows, run, first, row - row % loop.BLOCK)
        inputs = _network_inputs(scales[row], plain, guided)
        outputs = program(model, registers, block, *_bounds(row - first, stop - first), inputs)
        registers = outputs["registers"]
        _check_finite(outputs["finite"], stop, last)
        if on_step and (stop == last or steps[stop] != steps[stop - 1]):
            denoised = ops.convert_to_numpy(outputs["denoised"])
            state = State(stop, ops.convert_to_numpy(registers))
            done, num_steps = int(steps[stop - 1]) + 1, int(steps.max()) + 1
            if on_step(Step(done, num_steps, denoised, state, preview)) is False:
                return denoised
    return ops.convert_to_numpy(registers)[0]


def _start(latents):
    registers = np.zeros((NUM_REGISTERS, *latents.shape), np.float32)
    registers[0] = latents
    return State(0, registers)


def _land_on_latents(rows: Rows) -> Rows:
    """Let the last row of each image land on the latents themselves.

    What is known of a picture ends as it is known, also where the sampler ends on the level of
    timestep 0.
    """
    done = np.concatenate([rows.steps[1:], np.full_like(rows.steps[:1], -1)]) < 0
    landing = np.where(done[..., None], np.array([1.0, 0.0], np.float32), rows.landing)
    return rows._replace(landing=landing)


def _segments(scales, first, last, watched):
    """Yield ranges of rows for one call of the program: of one block and one guidance scale."""
    single = watched or not backend.on_accelerator()
    row = first
    while row < last:
        stop = row + 1
        while (
            not single
            and stop < last
            and stop % loop.BLOCK
            and np.array_equal(scales[stop], scales[row])
        ):
            stop += 1
        yield row, stop
        row = stop


def _block(rows: Rows, run: Run, previous: int, first: int):
    """Return the block from row `first` on, with its noise; the streams are at `previous`' end."""
    shape = run.latents.shape
    # A resumed run passes over the noise of the blocks that it has behind it.
    drawn = 0 if previous < 0 else previous + loop.BLOCK
    noise = _no_noise(run)
    for row, image in zip(*np.nonzero(rows.draws_noise[drawn : first + loop.BLOCK])):
        values = run.streams[image].draw(*shape[1:])
        if row + drawn >= first:
            noise[row + drawn - first, image] = values
    return _tensors(rows, first, noise), first


def _no_noise(run):
    return np.zeros((loop.BLOCK, *run.latents.shape), np.float32)


def _tensors(rows, first, noise):
    window = slice(first, first + loop.BLOCK)
    arrays = (rows.timesteps, rows.prediction, rows.next, rows.landing)
    return loop.RowBlock(*map(ops.convert_to_tensor, (*(a[window] for a in arrays), noise)))


def _bounds(start, stop):
    return [ops.convert_to_tensor(row, "int32") for row in (start, stop)]


def _inputs_and_guided(run):
    return (
        {name: ops.convert_to_tensor(value, "float32") for name, value in inputs.items()}
        for inputs in (run.inputs, run.guided_inputs)
    )


def _network_inputs(scales, plain, guided):
    """Return the network's further inputs for a row of these guidance scales."""
    if scales.max() > 1.0:
        return {**guided, "guidance_scale": ops.convert_to_tensor(scales)}
    return plain


def _check_state(state, shape, last):
    shape = (NUM_REGISTERS, *shape)
    if np.shape(state.registers) != shape or not 0 <= state.row <= last:
        raise ValueError(
            f"`resume` must be the state of a run with the same settings: registers of shape "
            f"{shape} and at most {last} rows. Received: registers of shape "
            f"{np.shape(state.registers)} at row {state.row}"
        )


def _check_finite(finite, row, last):
    finite = ops.convert_to_numpy(finite)
    if not finite.all():
        broken = np.flatnonzero(~finite).tolist()
        raise ValueError(
            f"The latents of image {', '.join(map(str, broken))} of the batch became NaN or "
            f"infinite at network call {row} of {last}. Use dtype='float32' or 'bfloat16' if the "
            "network computes in float16; otherwise check the weights."
        )
