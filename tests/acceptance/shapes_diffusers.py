"""diffusers loads the folder of the model `shapes` and draws the same pictures.

python tests/acceptance/shapes_diffusers.py [--preset FOLDER] [--count IMAGES]
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

import kdiffusion
from kdiffusion import StableDiffusion
from kdiffusion.shapes.data import evaluation_scenes

SHAPES = Path(kdiffusion.__file__).parent / "shapes" / "model"
BAR = 2  # of 255
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 7.5}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", type=Path, default=SHAPES, help="folder of the model")
    parser.add_argument("--count", type=int, default=16, help="how many pictures")
    arguments = parser.parse_args()
    scenes = evaluation_scenes("held-out templates", arguments.count)
    prompts = [scene.caption for scene in scenes]
    ours = StableDiffusion.from_preset(arguments.preset).text_to_image(
        prompts, num_steps=20, seed=0, verbose=0
    )
    theirs = draw_theirs(arguments.preset, prompts)
    differences = np.abs(np.subtract(ours, theirs, dtype=np.int32)).max(axis=(1, 2, 3))
    print(f"{len(prompts)} pictures, largest difference of each: {differences.tolist()}")
    print(f"largest {differences.max()} of 255, bar {BAR}")
    sys.exit(bool(differences.max() > BAR))


def draw_theirs(folder, prompts):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(prompts))]
    pictures = pipeline(prompts, generator=generators, output_type="np", **SETTINGS).images
    return np.rint(pictures * 255.0).astype(np.uint8)


if __name__ == "__main__":
    main()
