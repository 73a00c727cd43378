"""What all generating models share: noise and tables in, latents out, one row at a time or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from kdiffusion import backend
from kdiffusion.noise import NoiseStream
from kdiffusion.sampling import loop
from kdiffusion.sampling.guidance import classifier_free
from kdiffusion.sampling.table import NUM_REGISTERS, Rows, Table, pack


class Step(NamedTuple):
    """What a callback is told after each step of a sampler.

    Args:
        step: int, how many steps are done, from 1.
        num_steps: int, how many there will be.
        denoised: (batch, height, width, channels) float32, the current estimate of the latents.
    """

    step: int
    num_steps: int
    denoised: np.ndarray


class Program:
    """A compiled function of a model, its weights and further tensors.

    The weights are arguments, so changed weights, and another model of the same architecture, are
    seen by the next call without a new compilation.

    Args:
        function: pure function `(model, *tensors) -> tensors`.
        jit_compile: bool, whether to use XLA.
    """

    def __init__(self, function: Callable, jit_compile: bool):
        self._function = function
        self._jit_compile = jit_compile
        self._compiled: dict[Any, Callable] = {}
        self._model = None

    def __call__(self, model: keras.Model, *tensors):
        self._model = model
        key = (type(model), getattr(model, "architecture", model), model.dtype_policy.name)
        if key not in self._compiled:
            self._compiled[key] = backend.compile_function(self._call, self._jit_compile)
        return self._compiled[key](backend.weights_of(model), *tensors)

    def _call(self, weights, *tensors):
        # The model is looked up when the function is traced: a closure would keep it alive.
        with backend.with_weights(self._model, weights):
            return self._function(self._model, *tensors)


def denoise(model, registers, block, start, stop, inputs):
    """Run rows of a table with a network; the function behind the denoising program.

    Args:
        model: network that maps `latents`, `timestep` and further inputs to a prediction.
        registers, block, start, stop: see `sampling.loop.run`.
        inputs: dictionary of the network's other inputs. `guidance_scale` and
            `guidance_rescale`, (batch,) float32, ask for classifier-free guidance: the other
            inputs then hold the negative half of the batch first. `conditioning` is joined to
            the latents as further channels.

    Returns:
        See `sampling.loop.run`.
    """
    inputs = dict(inputs)
    scale, rescale = inputs.pop("guidance_scale", None), inputs.pop("guidance_rescale", None)
    conditioning = inputs.pop("conditioning", None)

    def predict(x, timestep):
        if conditioning is not None:
            x = ops.concatenate([x, conditioning], axis=-1)
        outputs = model({"latents": x, "timestep": timestep, **inputs})
        return ops.cast(outputs, "float32")

    if scale is not None:
        predict = classifier_free(predict, scale, rescale)
    return loop.run(predict, registers, block, start, stop)


def sample(
    program: Program,
    model: keras.Model,
    tables: Sequence[Table],
    latents: np.ndarray,
    inputs: dict[str, np.ndarray],
    streams: Sequence[NoiseStream],
    on_step: Callable[[Step], Any] | None = None,
) -> np.ndarray:
    """Denoise a batch of latents.

    Args:
        program: the `Program` of `denoise`.
        model: the network.
        tables: one table for each image.
        latents: (batch, height, width, channels) float32, x at the first row.
        inputs: the network's other inputs, see `denoise`.
        streams: one noise stream for each image; rows that need fresh noise draw from it.
        on_step: called after each step; `False` as an answer stops the run. While it is given,
            or on a CPU, rows are handed over one at a time, so that progress is true and Ctrl-C
            answers within one network call.

    Returns:
        (batch, height, width, channels) float32: the final latents, or the latest estimate of
        them if the run was stopped.

    Raises:
        ValueError: If latents become NaN or infinite.
    """
    rows = pack(tables, loop.BLOCK)
    last = max(len(table.timesteps) for table in tables)
    steps = rows.steps.max(axis=1)
    num_steps = int(steps.max()) + 1
    stride = 1 if on_step or not backend.on_accelerator() else loop.BLOCK
    inputs = {name: ops.convert_to_tensor(value, "float32") for name, value in inputs.items()}
    registers = np.zeros((NUM_REGISTERS, *latents.shape), np.float32)
    registers[0] = latents
    registers = ops.convert_to_tensor(registers)
    for first in range(0, last, loop.BLOCK):
        block = _block(rows, first, streams, latents.shape)
        for row in range(first, min(first + loop.BLOCK, last), stride):
            stop = min(row + stride, last)
            start_stop = (ops.convert_to_tensor(i - first, "int32") for i in (row, stop))
            state = program(model, registers, block, *start_stop, inputs)
            registers = state["registers"]
            _check_finite(state["finite"], stop, last)
            step_ends = stop == last or steps[stop] != steps[stop - 1]
            if on_step and step_ends:
                denoised = ops.convert_to_numpy(state["denoised"])
                if on_step(Step(int(steps[stop - 1]) + 1, num_steps, denoised)) is False:
                    return denoised
    return ops.convert_to_numpy(registers)[0]


def _block(rows: Rows, first, streams, shape):
    """Rows `first` and following as tensors, with the noise that they draw from each stream."""
    window = slice(first, first + loop.BLOCK)
    noise = np.zeros((loop.BLOCK, *shape), np.float32)
    for row, image in zip(*np.nonzero(rows.draws_noise[window])):
        noise[row, image] = streams[image].draw(*shape[1:])
    arrays = rows.timesteps[window], rows.prediction[window], rows.next[window], noise
    return loop.Block(*(ops.convert_to_tensor(array) for array in arrays))


def _check_finite(finite, row, last):
    finite = ops.convert_to_numpy(finite)
    if not finite.all():
        images = np.flatnonzero(~finite).tolist()
        raise ValueError(
            f"The latents of image {', '.join(map(str, images))} of the batch became NaN or "
            f"infinite at network call {row} of {last}. Use dtype='float32' or 'bfloat16' if the "
            "network computes in float16; otherwise check the weights."
        )
