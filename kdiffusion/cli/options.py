"""The options of `kdiffusion generate` and `kdiffusion train`, in groups."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any


def count(text: str) -> int:
    """Parse a whole number from 1 on."""
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, received {text!r}")
    return value


def whole(text: str) -> int:
    """Parse a whole number from 0 on."""
    return 0 if re.fullmatch(r"0+", text) else count(text)


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, received {text!r}")
    return value


def rate(text: str) -> float:
    """Parse a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, received {text!r}")
    return value


FORCE: dict[str, Any] = {"action": "store_true", "help": "overwrite files"}
DEBUG: dict[str, Any] = {"action": "store_true", "help": "show the traceback of an error"}
SPACING: dict[str, Any] = {
    "help": "leading, trailing, linspace, karras, exponential, beta, or a pair such as "
    "leading+karras (default: the model's own)",
}

GENERATE: dict[str, dict[str, dict[str, Any]]] = {
    "what to generate": {
        "prompt": {"nargs": "?", "help": "what the image shows; none for models without texts"},
        "--label": {
            "type": whole,
            "metavar": "N",
            "help": "the class to generate, for models of classes (default: none in particular)",
        },
        "--negative-prompt": {"metavar": "TEXT", "help": "what it does not show"},
        "--height": {
            "type": count,
            "metavar": "PIXELS",
            "help": "default: that of --image, else the model's own",
        },
        "--width": {"type": count, "metavar": "PIXELS", "help": "default: likewise"},
        "--batch-size": {
            "type": count,
            "default": 1,
            "metavar": "N",
            "help": "images of this prompt (default: 1)",
        },
    },
    "from an image": {
        "--image": {"type": Path, "metavar": "PATH", "help": "the image to start from"},
        "--strength": {
            "type": share,
            "metavar": "SHARE",
            "help": "how much to change, 0.3 a little, 0.8 much (default: 0.8, with --mask 1)",
        },
        "--mask": {
            "type": Path,
            "metavar": "PATH",
            "help": "an image that is white where --image is to be repainted, black elsewhere",
        },
    },
    "how to generate it": {
        "--preset": {
            "help": "name of a model, a folder, or hf://organisation/repository (default: "
            "shapes, which comes with kdiffusion and knows plain shapes)",
        },
        "--steps": {
            "type": count,
            "default": 50,
            "metavar": "N",
            "help": "steps of the sampler (default: 50)",
        },
        "--sampler": {
            "metavar": "NAME",
            "help": "ddim, euler_a, dpmpp_2m, unipc ...; `kdiffusion samplers` lists them "
            "(default: the model's own)",
        },
        "--spacing": SPACING,
        "--eta": {
            "type": share,
            "metavar": "SHARE",
            "help": "fresh noise of each step, 0 is none (default: the sampler's own)",
        },
        "--order": {
            "type": count,
            "metavar": "N",
            "help": "order of the sampler (default: its own)",
        },
        "--guidance-scale": {
            "type": float,
            "metavar": "SCALE",
            "help": "how closely to follow the prompt, 1 is off (default: 7.5, of a class 1)",
        },
        "--guidance-rescale": {
            "type": share,
            "default": 0.0,
            "metavar": "SHARE",
            "help": "reduces the glare of a high guidance scale; 0.7 is usual (default: 0, off)",
        },
        "--guidance-interval": {
            "type": share,
            "nargs": 2,
            "default": (0.0, 1.0),
            "metavar": ("START", "STOP"),
            "help": "the share of the steps that is guided (default: 0 1)",
        },
        "--seed": {
            "type": int,
            "metavar": "N",
            "help": "of the first image, the next has N + 1 (default: a random one, reported)",
        },
        "--noise": {
            "choices": ("cpu", "cuda"),
            "default": "cpu",
            "help": "whose random numbers a seed means: PyTorch's on a CPU, as in diffusers and "
            "ComfyUI, or on a GPU, as in AUTOMATIC1111 (default: cpu)",
        },
        "--dtype": {"metavar": "NAME", "help": "float32, bfloat16 or float16 (default: Keras's)"},
    },
    "files and messages": {
        "--output": {
            "type": Path,
            "metavar": "PATH",
            "help": "a PNG file, or a folder (default: a file here named after prompt and seed); "
            "several images get -0, -1 ...",
        },
        "--preview": {
            "type": Path,
            "metavar": "PATH",
            "help": "a PNG file that shows, after each step, roughly what the images will be",
        },
        "--force": FORCE,
        "--quiet": {"action": "store_true", "help": "print only the files' names and errors"},
        "--debug": DEBUG,
    },
}

TRAIN: dict[str, dict[str, dict[str, Any]]] = {
    "what to train": {
        "kind": {
            "choices": ("autoencoder", "clip", "diffusion"),
            "help": "an autoencoder; CLIP, two networks that compare images with texts; or a "
            "diffusion model",
        },
        "--config": {
            "type": Path,
            "metavar": "FILE.json",
            "help": "all settings; options of the command line override them",
        },
        "--preset": {
            "help": "the model to fine-tune: a name, a folder, or hf://organisation/repository; "
            "for a new one the configuration says the architecture",
        },
    },
    "on which images": {
        "--data": {
            "type": Path,
            "metavar": "FOLDER",
            "help": "with a metadata.jsonl of captions or labels, a folder for each class, or "
            "images alone",
        },
        "--height": {"type": count, "metavar": "PIXELS", "help": "default: the model's own"},
        "--width": {"type": count, "metavar": "PIXELS", "help": "default: the model's own"},
        "--cache": {
            "type": Path,
            "metavar": "FOLDER",
            "help": "keep latents and text states there, and train without encoders",
        },
    },
    "how to train": {
        "--steps": {"type": count, "metavar": "N", "help": "in all (default: 10000)"},
        "--batch-size": {"type": count, "metavar": "N", "help": "images of a step"},
        "--accumulation": {
            "type": count,
            "metavar": "N",
            "help": "parts of a step that are computed in turn, to save memory (default: 1)",
        },
        "--learning-rate": {"type": rate, "metavar": "RATE", "help": "of the optimizer"},
        "--seed": {"type": int, "metavar": "N", "help": "of all random numbers (default: 0)"},
        "--dtype": {
            "metavar": "NAME",
            "help": "float32, bfloat16 or mixed_bfloat16 (default: float32)",
        },
    },
    "files and messages": {
        "--output": {
            "type": Path,
            "required": True,
            "metavar": "FOLDER",
            "help": "of the run: checkpoints, log, curves, and the trained model in `model`",
        },
        "--resume": {
            "action": "store_true",
            "help": "continue the run in --output, with its own configuration unless one is given",
        },
        "--quiet": {"action": "store_true", "help": "print only the model's folder and errors"},
        "--debug": DEBUG,
    },
}
