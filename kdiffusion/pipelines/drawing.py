"""What all drawing methods share: a start and settings in, latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kdiffusion.pipelines.base import Components
from kdiffusion.pipelines.settings import Settings
from kdiffusion.pipelines.starts import Start
from kdiffusion.sampling import run as generation
from kdiffusion.sampling.guidance import Guidance
from kdiffusion.sampling.noise import NoiseStream
from kdiffusion.sampling.run import Run


def denoised(
    components: Components,
    inputs: dict[str, np.ndarray],
    negatives: Callable[[], dict[str, np.ndarray]],
    settings: Settings,
    streams: Sequence[NoiseStream],
    start: Start,
) -> np.ndarray:
    """Draw latents.

    Args:
        components: the model.
        inputs: dictionary of what the network is given of each image: `context`, `label`, or
            nothing.
        negatives: function that gives the same of what guidance moves away from; it is called
            only if there is guidance.
        settings: `Settings`.
        streams: a noise stream for each image.
        start: `Start`.

    Returns:
        (batch, height, width, channels) float32.

    Raises:
        ValueError: For a setting out of range, or if the latents are not finite.
    """
    count = len(streams)
    tables = settings.tables(
        count, components.schedule, components._source.sampling(), start.strength
    )
    guidance = settings.guidance or Guidance()
    scales = settings.scales(count)
    shared = dict(start.constraint)
    if start.conditioning is not None:
        shared["conditioning"] = start.conditioning
    guided = {}
    if scales.max() > 1.0:
        guided = {name: np.concatenate([x, inputs[name]]) for name, x in negatives().items()}
        guided["guidance_rescale"] = np.full(count, guidance.rescale, np.float32)
    run = Run(
        tables,
        start.latents(tables),
        {**inputs, **shared},
        {**guided, **shared},
        scales,
        guidance,
        streams,
    )
    program = components._denoise_program
    # Both get ready while the larger network's weights are read.
    components._prepare_decoding(run.latents.shape)
    network = components._load(
        "diffusion_model", lambda model: generation.prepare(program, model, run)
    )
    return generation.sample(program, network, run, settings.watcher(), settings.resume)
