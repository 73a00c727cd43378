"""The report of `shapes`: its images, the measures of its CLIP, and its model card."""

from __future__ import annotations

import importlib.util
import platform
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from PIL import Image, ImageDraw, ImageFont

import kdiffusion
from kdiffusion.evaluation.retrieval import retrieval
from kdiffusion.images import to_uint8
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.pipelines.stable_diffusion import StableDiffusion
from kdiffusion.shapes.data import SPLITS, evaluation_scenes
from kdiffusion.shapes.evaluation import markdown
from kdiffusion.shapes.scenes import Words, render
from kdiffusion.training.loop.report import read_log
from kdiffusion.training.trainers.clip import CLIPTrainer

_AT_A_TIME = 16  # images

# Each curve has the folder of a stage, a figure of its log, and a title.
_CURVES = (
    ("autoencoder", "psnr", "autoencoder: reconstructions, dB"),
    ("clip", "text_to_image@1", "CLIP: right among the batch"),
    ("diffusion", "loss", "diffusion: loss"),
)


def generate(model: StableDiffusion, prompts: list[str], **settings) -> np.ndarray:
    """Generate images of prompts for the report: with 20 steps, and all else by default.

    Args:
        model: `StableDiffusion`.
        prompts: list of n texts.
        settings: of `text_to_image`.

    Returns:
        (n, height, width, 3) uint8.
    """
    images = []
    for start in range(0, len(prompts), _AT_A_TIME):
        some = prompts[start : start + _AT_A_TIME]
        # The number is always the same, so nothing is compiled for the last ones.
        some = some + some[-1:] * (min(_AT_A_TIME, len(prompts)) - len(some))
        images.append(model.text_to_image(some, num_steps=20, seed=start, verbose=0, **settings))
    return np.concatenate(images)[: len(prompts)]


def reconstruct(
    image_encoder: ImageEncoder, image_decoder: ImageDecoder, images: np.ndarray
) -> np.ndarray:
    """Reconstruct images from the means of their latents.

    Args:
        image_encoder, image_decoder: the two halves of an autoencoder.
        images: (n, height, width, 3) uint8.

    Returns:
        Likewise.
    """
    parts = []
    for start in range(0, len(images), _AT_A_TIME):
        part = _to_model(images[start : start + _AT_A_TIME])
        decoded = image_decoder(image_encoder(part)["mean"])
        parts.append(to_uint8(ops.convert_to_numpy(decoded)))
    return np.concatenate(parts)


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Compute the mean peak signal-to-noise ratio of images, in dB.

    Args:
        images, others: (n, height, width, 3) uint8.
    """
    error = np.square(np.subtract(images, others, dtype=np.float64)).mean(axis=(1, 2, 3))
    return float(np.mean(10.0 * np.log10(255.0**2 / np.maximum(error, 1e-3))))


def measure_clip(trainer: CLIPTrainer, words: Words = Words(), count: int = 256) -> dict[str, Any]:
    """Measure how well CLIP finds images by captions and captions by images.

    Args:
        trainer: `CLIPTrainer`.
        words: `Words` that it was trained with.
        count: int, how many scenes; half of them have things that training does not show, the
            captions of the others have a form that training does not have. All captions differ.

    Returns:
        Dictionary, see `evaluation.retrieval.retrieval`.

    Raises:
        ValueError: If the trainer has no tokenizer.
    """
    if trainer.tokenizer is None:
        raise ValueError("`trainer` must have the tokenizer of its captions. Received: None")
    scenes = [
        scene for split in SPLITS[1:] for scene in evaluation_scenes(split, count // 2, words=words)
    ]
    images = render(scenes, trainer.image_tower.architecture.image_size)
    captions = [scene.caption for scene in scenes]
    return retrieval(
        trainer.encode_images(_to_model(images)),
        trainer.encode_text(trainer.tokenizer.rows(captions)),
        captions,
    )


def _to_model(images):
    return images / np.float32(127.5) - np.float32(1.0)


def gallery(images: np.ndarray, captions: list[str], columns: int = 8) -> Image.Image:
    """Lay out images, twice as large, each above its caption.

    Args:
        images: (n, height, width, 3) uint8.
        captions: list of n texts.
        columns: int, images side by side.
    """
    height, width = (2 * side for side in images.shape[1:3])
    margin, text_height = 10, 64
    cell = width + margin, height + text_height
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * cell[0] + margin, rows * cell[1] + margin), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(size=11)
    for number, (image, caption) in enumerate(zip(images, captions)):
        x, y = (number % columns) * cell[0] + margin, (number // columns) * cell[1] + margin
        shown = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        whole.paste(shown, (x, y))
        pen.text((x, y + height + 3), textwrap.fill(caption, 23), "black", font)
    return whole


def plot_stages(folder: Path) -> Path | None:
    """Plot the curves of a run's stages as its `curves.png`.

    Args:
        folder: the run's folder.

    Returns:
        The path of the plot, or `None` without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 2.8), layout="tight")
    for axes, (stage, name, title) in zip(figure.subplots(1, len(_CURVES)), _CURVES):
        entries = [entry for entry in read_log(folder / stage / "run") if name in entry]
        steps, values = ([entry[key] for entry in entries] for key in ("step", name))
        axes.plot(steps, values, color="#26323d", linewidth=1.0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
    path = folder / "curves.png"
    figure.savefig(path, dpi=80)
    return path


def versions() -> dict[str, str]:
    """Return the versions of the software that computed."""
    names = ("keras", "numpy", keras.backend.backend())
    return {
        "kdiffusion": kdiffusion.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def card(manifest: dict[str, Any]) -> str:
    """Write the model card with the measured figures.

    Args:
        manifest: dictionary of `autoencoder`, `clip`, `guided` and `unguided` figures, and of the
            `recipe`.

    Returns:
        A text in Markdown.
    """
    autoencoder, clip = manifest["autoencoder"], manifest["clip"]
    return _CARD.format(
        psnr=autoencoder["psnr"],
        right=autoencoder["all"],
        text_to_image=clip["text_to_image@1"],
        image_to_text=clip["image_to_text@1"],
        captions=manifest["recipe"]["prompts"] // 2,
        guided=markdown(manifest["guided"]),
        unguided=markdown(manifest["unguided"]),
    )


_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# shapes

A small Stable Diffusion, trained from scratch by `python -m kdiffusion.shapes`. It generates images
of 64 x 64 pixels: one or two plain things on a plain background, as a sentence describes them. The
weights are float16 in diffusers' layout, licensed under Apache-2.0. Nobody's images or texts were
used: a program rendered every scene.

## What it understands

- colours, also of the background: red, green, blue, yellow, purple, orange, black, white
- shapes: circle, square, triangle, diamond, ring, cross
- of a single thing, sizes: small, large; and positions: "at the left", "in the centre" ...
- two things: left of, right of, above, below

"a small orange ring at the left on a black background", "a red circle above a white square on a
blue background". It knows no other words, and nothing of the world.

## What was measured

Per cent of images that our detector accepts, with 20 steps and all else by default. "another
prompt" is the chance level. Held-out pairs are colours with shapes, shapes with positions, and
pairs of things that training never shows. Held-out templates are forms of sentences that it never
uses.

{guided}

Without guidance:

{unguided}

The autoencoder alone: reconstructions of {psnr:.1f} dB, {right:.1%} of them all right. CLIP is in
`clip/`; the text encoder is its text tower, trained further with the diffusion model. CLIP finds
the image of {text_to_image:.1%} of {captions} held-out captions, and the caption of
{image_to_text:.1%} of their images.

How it was trained, with which versions and seeds, and all figures: `manifest.json`.
"""
