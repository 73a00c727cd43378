"""Whole pictures against diffusers' pipelines, on tiny folders that both sides load."""

import dataclasses
import warnings

import diffusers
import numpy as np
import pytest
import torch

from kdiffusion import StableDiffusion
from kdiffusion.weights.random_tiny import RandomSource

pytestmark = pytest.mark.backend

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}
PROMPT, NEGATIVE = "a red circle", "a blue square"
SEEDS = (42, 43)


def save(path, source, in_channels=4):
    model = StableDiffusion.from_source(source, 64, 64, jit_compile=False)
    if in_channels != 4:
        unet = model.diffusion_model
        record = dataclasses.replace(unet.architecture, in_channels=in_channels)
        wide = type(unet)(record, dtype="float32")
        values = {v.path: v for v in unet.variables}
        generator = np.random.default_rng(3)
        for variable in wide.variables:
            if variable.shape == values[variable.path].shape:
                variable.assign(values[variable.path])
            else:
                variable.assign(generator.normal(size=variable.shape, scale=0.1))
        model.diffusion_model = wide
    model.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("parity") / "sd", RandomSource())


@pytest.fixture(scope="module")
def inpainting_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("parity") / "inpainting", RandomSource(), in_channels=9)


@pytest.fixture(scope="module")
def ours(folder):
    return StableDiffusion.from_preset(folder)


@pytest.fixture(scope="module")
def inpainting(inpainting_folder):
    return StableDiffusion.from_preset(inpainting_folder)


def pipeline_of(folder, sampler, task=diffusers.StableDiffusionPipeline, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = task.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    config = {**pipeline.scheduler.config, **options}
    pipeline.scheduler = SCHEDULERS[sampler].from_config(config)
    return pipeline


def theirs(pipeline, steps=6, **settings):
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    pictures = pipeline(
        prompt=[PROMPT] * 2,
        negative_prompt=[NEGATIVE] * 2,
        num_inference_steps=steps,
        generator=generators,
        output_type="np",
        **settings,
    ).images
    return np.rint(pictures * 255).astype(int)


def draw(method, *arguments, sampler, steps=6, **settings):
    return method(
        *arguments,
        PROMPT,
        negative_prompt=NEGATIVE,
        batch_size=2,
        seed=SEEDS[0],
        num_steps=steps,
        sampler=sampler,
        verbose=0,
        **settings,
    ).astype(int)


def check(ours, reference):
    difference = np.abs(ours - reference)
    assert reference.std() > 10
    assert difference.max() <= 1
    assert np.mean(difference == 0) > 0.99


def picture(height, width):
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


def as_pil(array):
    from PIL import Image

    return Image.fromarray(array)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("size", [(64, 64), (56, 40)])
def test_text_to_image(ours, folder, sampler, size):
    height, width = size
    reference = theirs(pipeline_of(folder, sampler), height=height, width=width)
    check(draw(ours.text_to_image, sampler=sampler, height=height, width=width), reference)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_spacings(ours, folder, spacing):
    pipeline = pipeline_of(folder, "euler", timestep_spacing=spacing)
    reference = theirs(pipeline, height=64, width=64)
    check(draw(ours.text_to_image, sampler="euler", spacing=spacing), reference)


def test_karras(ours, folder):
    pipeline = pipeline_of(folder, "dpmpp_2m", use_karras_sigmas=True)
    reference = theirs(pipeline, steps=20, height=64, width=64)
    images = draw(ours.text_to_image, sampler="dpmpp_2m", spacing="leading+karras", steps=20)
    check(images, reference)


def test_guidance_rescale_and_scale(ours, folder):
    from kdiffusion import Guidance

    settings = {"height": 64, "width": 64, "guidance_scale": 3.0, "guidance_rescale": 0.7}
    reference = theirs(pipeline_of(folder, "ddim"), **settings)
    images = draw(
        ours.text_to_image,
        sampler="ddim",
        unconditional_guidance_scale=3.0,
        guidance=Guidance(rescale=0.7),
    )
    check(images, reference)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_a", "heun"])
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_image_to_image(ours, folder, sampler, strength):
    image = picture(56, 40)
    pipeline = pipeline_of(folder, sampler, diffusers.StableDiffusionImg2ImgPipeline)
    reference = theirs(pipeline, image=as_pil(image), strength=strength, steps=10)
    images = draw(ours.image_to_image, image, sampler=sampler, strength=strength, steps=10)
    check(images, reference)


@pytest.mark.parametrize("kind", ["blending", "conditioned"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_a"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpaint(request, kind, sampler, strength):
    names = ("ours", "folder") if kind == "blending" else ("inpainting", "inpainting_folder")
    model, path = map(request.getfixturevalue, names)
    image = picture(56, 40)
    mask = np.zeros((56, 40), np.uint8)
    mask[10:37, 5:30] = 255
    pipeline = pipeline_of(path, sampler, diffusers.StableDiffusionInpaintPipeline)
    reference = theirs(
        pipeline,
        # One for each generator: a single picture would draw from the first generator only.
        image=[as_pil(image)] * 2,
        mask_image=[as_pil(mask)] * 2,
        strength=strength,
        steps=10,
        height=56,
        width=40,
    )
    images = draw(model.inpaint, image, mask, sampler=sampler, strength=strength, steps=10)
    check(images, reference)
