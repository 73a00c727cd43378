"""image_to_image and both kinds of inpaint on full-size random SD 1.5, against diffusers.

    python tests/acceptance/image_tasks.py [--cache FOLDER]

The same generator draws a sample of the picture's latents, then the start noise, then the noise of
the steps. Errors, floors and the bar are those of `exactness.py`: the final latents' relative L2
distance from the reference in float64 may be 5 times that of the reference in float32. The picture
is 136 x 72 pixels, no multiple of 64. Needs what `exactness.py` needs.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from exactness import LATENTS_BAR, Table, distance, log, make_pipeline

SAMPLERS = ("ddim", "dpmpp_2m", "euler_a")
SETTINGS = {"num_steps": 4, "unconditional_guidance_scale": 7.5, "seed": 42}
PROMPT = "a red circle"
# task and the checkpoint that it is run on: strengths
TASKS = {
    ("image_to_image", "checkpoint"): (0.3, 0.8, 1.0),
    ("inpaint", "checkpoint"): (1.0,),
    ("inpaint", "inpainting"): (1.0,),
}


def main():
    parser = argparse.ArgumentParser(description="Compare image tasks with diffusers.")
    parser.add_argument("--cache", type=Path, help="folder to keep checkpoints and results in")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reference:
        write_reference(arguments.reference)
        return
    table = Table()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.cache or Path(temporary)) / "sd15"
        if not (folder / "image_tasks.npz").exists():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, __file__, "--reference", folder], check=True)
        check(table, folder)
    print(f"\n{table}\n\n{len(table.rows) - table.failures} passed, {table.failures} failed")
    sys.exit(bool(table.failures))


def check(table, folder):
    results = dict(np.load(folder / "image_tasks.npz"))
    for (task, checkpoint), strengths in TASKS.items():
        model = make_pipeline(folder / checkpoint)
        for sampler, strength in cases(strengths):
            name = f"{task} {checkpoint} {sampler} {strength}"
            inputs = pictures() if task == "inpaint" else pictures()[:1]
            latents = getattr(model, task)(
                *inputs, PROMPT, strength, sampler=sampler, spacing="leading", verbose=0, **SETTINGS
            )
            floats, exact = results[f"{name} float32"], results[f"{name} float64"]
            floor, error = distance(floats, exact), distance(latents, exact)
            table.compare(name, floor, error, LATENTS_BAR)


def cases(strengths):
    return [(sampler, strength) for sampler in SAMPLERS for strength in strengths]


def pictures():
    """A picture of coarse blocks and a mask with a hole in its middle."""
    from PIL import Image

    blocks = np.random.default_rng(0).integers(0, 256, (17, 9, 3), np.uint8)
    mask = np.zeros((136, 72), np.uint8)
    mask[30:90, 17:55] = 255
    image = Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1))
    return image, Image.fromarray(mask)


def write_reference(folder):
    import diffusers
    import exactness_reference as reference
    import torch

    diffusers.utils.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    results = {}
    for checkpoint in ("checkpoint", "inpainting"):
        if not (folder / checkpoint / "model_index.json").exists():
            family = dict(reference.FAMILIES["sd15"])
            if checkpoint == "inpainting":
                family["unet"] = {**family["unet"], "in_channels": 9}
            reference.write_checkpoint(folder / checkpoint, family)
        for dtype in (torch.float32, torch.float64):
            results |= run_diffusers(folder / checkpoint, dtype)
    np.savez(folder / "image_tasks.npz", **results)


def run_diffusers(path, dtype):
    """Final latents of all cases of a checkpoint, channels last."""
    import diffusers
    import torch

    pipelines = {
        "image_to_image": diffusers.StableDiffusionImg2ImgPipeline,
        "inpaint": diffusers.StableDiffusionInpaintPipeline,
    }
    schedulers = {
        "ddim": diffusers.DDIMScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    }
    results = {}
    for task, strengths in ((t, s) for (t, c), s in TASKS.items() if c == path.name):
        pipeline = pipelines[task].from_pretrained(path, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        for model in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
            model.to(dtype)
        published = pipeline.scheduler.config
        for sampler, strength in cases(strengths):
            name = f"{task} {path.name} {sampler} {strength}"
            log(f"  {name} with diffusers in {dtype}")
            with numbers_of(dtype):
                scheduler = schedulers[sampler]
                pipeline.scheduler = scheduler.from_config(published, timestep_spacing="leading")
                latents = pipeline(
                    PROMPT,
                    strength=strength,
                    num_inference_steps=SETTINGS["num_steps"],
                    guidance_scale=SETTINGS["unconditional_guidance_scale"],
                    generator=torch.Generator("cpu").manual_seed(SETTINGS["seed"]),
                    output_type="latent",
                    **inputs_of(task),
                ).images
            latents = latents.permute(0, 2, 3, 1).numpy()
            results[f"{name} {str(dtype).removeprefix('torch.')}"] = latents
    return results


@contextmanager
def numbers_of(dtype):
    """A scope in which diffusers draws float32 noise, and computes levels in `dtype`."""
    import diffusers
    import torch
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral
    from exactness_reference import _Doubled, exact

    with ExitStack() as stack:
        library = diffusers.utils.torch_utils
        stack.enter_context(mock.patch.object(library, "torch", SameDraws(torch)))
        if dtype == torch.float64:
            stack.enter_context(exact())
            stack.enter_context(mock.patch.object(ancestral, "torch", _Doubled(torch)))
            stack.enter_context(mock.patch.object(ancestral, "np", _Doubled(np)))
        yield


def inputs_of(task):
    image, mask = pictures()
    if task == "image_to_image":
        return {"image": image}
    return {"image": image, "mask_image": mask, "height": image.height, "width": image.width}


class SameDraws:
    """torch whose `randn` draws in float32, whatever is asked for: float64 is another stream."""

    def __init__(self, library):
        self._library = library

    def __getattr__(self, name):
        return getattr(self._library, name)

    def randn(self, shape, dtype=None, **options):
        return self._library.randn(shape, dtype=self._library.float32, **options).to(dtype)


if __name__ == "__main__":
    main()
