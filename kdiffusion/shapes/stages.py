"""The stages of training our own small model: `python -m kdiffusion.shapes`.

Images of plain things and their captions, rendered by `scenes`, train an autoencoder, then CLIP,
whose text tower becomes the text encoder, then that and a diffusion model of latents. Every stage
leaves its result in the run's folder and is not done again; training resumes from its checkpoints,
so the same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from PIL import Image

from kdiffusion.images.preprocessing import Preprocessing
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.pipelines.stable_diffusion import StableDiffusion
from kdiffusion.shapes.data import (
    SPLITS,
    SceneSource,
    evaluation_scenes,
    scene_tokenizer,
)
from kdiffusion.shapes.evaluation import evaluate, judge_all
from kdiffusion.shapes.recipe import MICRO, Recipe, Stage
from kdiffusion.shapes.report import (
    card,
    gallery,
    generate,
    measure_clip,
    plot_stages,
    psnr,
    reconstruct,
    versions,
)
from kdiffusion.shapes.scenes import render
from kdiffusion.training.config.optimizers import make_optimizer
from kdiffusion.training.config.sections import OptimizerSettings
from kdiffusion.training.data.batches import Batches, Data, Prefetch
from kdiffusion.training.data.cache import cached
from kdiffusion.training.loop.loop import Loop
from kdiffusion.training.loop.report import grid
from kdiffusion.training.loop.settings import LoopSettings
from kdiffusion.training.trainers import clip_initialization
from kdiffusion.training.trainers.autoencoder import (
    AutoencoderObjective,
    AutoencoderTrainer,
)
from kdiffusion.training.trainers.base import Trainer
from kdiffusion.training.trainers.clip import CLIPTrainer, exclude_from_decay
from kdiffusion.training.trainers.diffusion import DiffusionTrainer
from kdiffusion.training.trainers.diffusion_objective import Objective
from kdiffusion.weights.sources import CheckpointSource
from kdiffusion.weights.variables import without_projection


def train_autoencoder(recipe: Recipe, folder: Path) -> None:
    """Train the autoencoder of a recipe."""
    trainer = AutoencoderTrainer(
        ImageEncoder(recipe.autoencoder, name="image_encoder"),
        ImageDecoder(recipe.autoencoder, name="image_decoder"),
        perceptual=squared_distance,
        # It is 0.001 of the mean divergence beside means over pixels.
        objective=AutoencoderObjective(perceptual_weight=2.0, kl_weight=0.012),
    )
    _train(trainer, recipe.data(), recipe.autoencoder_stage, folder / "autoencoder" / "run")
    trainer.prepare(recipe.data(), 512)
    trainer.save(folder / "autoencoder" / "model")


def squared_distance(images: Any, others: Any) -> Any:
    """Compute the mean squared difference of each image, (batch,); large errors weigh most."""
    return ops.mean(ops.square(images - others), axis=(1, 2, 3))


def check_autoencoder(recipe: Recipe, folder: Path) -> None:
    """Measure reconstructions, and refuse an autoencoder that is too poor for a diffusion model.

    Raises:
        ValueError: If reconstructions miss the recipe's bars.
    """
    figures, shown = measure_autoencoder(recipe, folder / "autoencoder" / "model")
    Image.fromarray(grid(shown)).save(folder / "autoencoder.png")
    print("autoencoder:", figures, flush=True)
    if figures["psnr"] < recipe.min_psnr or figures["all"] < recipe.min_accuracy:
        raise ValueError(
            f"The autoencoder must reach {recipe.min_psnr} dB and {recipe.min_accuracy:.0%} right "
            f"reconstructions. Received: {figures['psnr']:.2f} dB and {figures['all']:.1%}. Train "
            "it longer, or make it wider, in another folder."
        )
    _write_json(folder / "autoencoder.json", figures)


def measure_autoencoder(recipe: Recipe, folder: Path) -> tuple[dict[str, float], np.ndarray]:
    """Return figures of an autoencoder in a folder, and images, each beside its reconstruction."""
    scenes = evaluation_scenes("seen", recipe.prompts, words=recipe.words)
    images = render(scenes, recipe.image_size)
    halves = _parts(folder, "image_encoder", "image_decoder")
    reconstructions = reconstruct(**halves, images=images)
    shown = np.stack([images[:16], reconstructions[:16]], axis=1)
    figures = {"psnr": psnr(images, reconstructions)} | judge_all(reconstructions, scenes)
    return figures, shown.reshape(-1, *shown.shape[2:])


def train_clip(recipe: Recipe, folder: Path) -> None:
    """Train CLIP, and refuse it if it finds too few held-out images and captions.

    Raises:
        ValueError: If retrieval misses the recipe's bar.
    """
    tower = ImageTower(recipe.image_tower, name="image_tower")
    encoder = TextEncoder(recipe.text_encoder, name="text_encoder")
    for network in (tower, encoder):
        clip_initialization.initialize(network, recipe.seed)
    clip_initialization.separate_embeddings(tower, encoder)
    trainer = CLIPTrainer(tower, encoder, tokenizer=scene_tokenizer())
    _train(trainer, recipe.data(contrasts=True), recipe.clip_stage, folder / "clip" / "run")
    figures = measure_clip(trainer, recipe.words, recipe.prompts // 2)
    print("clip:", figures, flush=True)
    found = min(figures["text_to_image@1"], figures["image_to_text@1"])
    if found < recipe.min_retrieval:
        raise ValueError(
            f"CLIP must find {recipe.min_retrieval:.0%} of held-out captions and images. "
            f"Received: {found:.1%}. Train it longer, or make it wider, in another folder."
        )
    _write_json(folder / "clip.json", figures)
    trainer.save(folder / "clip" / "model", "float16")


def train_diffusion(recipe: Recipe, folder: Path) -> None:
    """Train the diffusion model on cached latents, and the text encoder with it.

    CLIP can tell images apart with little sense of position and order; the diffusion model needs
    all of it.
    """
    trainer, latents = diffusion_parts(recipe, folder)
    loop = _train(trainer, latents, recipe.diffusion_stage, folder / "diffusion" / "run")
    with loop.averages.applied():
        trainer.save(folder / "diffusion" / "model")


def diffusion_parts(recipe: Recipe, folder: Path) -> tuple[DiffusionTrainer, Batches]:
    """Make the trainer of the diffusion model and its data from the results in the folder."""
    clip = CLIPTrainer.from_folder(folder / "clip" / "model", "float32")
    models = _parts(folder / "autoencoder" / "model", "image_encoder", "image_decoder")
    size = (recipe.image_size,) * 2
    source = SceneSource(recipe.data(), recipe.latents)
    latents = cached(
        Data(source, Preprocessing(*size), clip.tokenizer, seed=recipe.seed),
        folder / "autoencoder" / "latents",
        image_encoder=models["image_encoder"],
        batch_size=32,
    )
    models["text_encoder"] = without_projection(clip.text_encoder)
    models["diffusion_model"] = DiffusionModel(recipe.diffusion_model, name="diffusion_model")
    model = StableDiffusion.from_parts(models, recipe.schedule, size, tokenizer=clip.tokenizer)
    prompts = [scene.caption for scene in evaluation_scenes("seen", 16, words=recipe.words)]
    trainer = DiffusionTrainer.from_model(
        model,
        cached=("latents",),
        train_text_encoder=True,
        objective=Objective(caption_dropout=0.1),
        draw=lambda count: generate(model, prompts[:count]),
    )
    return trainer, latents


def export(recipe: Recipe, folder: Path) -> None:
    """Write the model as it is shipped, in float16."""
    from weights_conversion import convert, open_model

    convert(open_model(folder / "diffusion" / "model"), folder / "model", dtype="float16")


def export_clip(recipe: Recipe, folder: Path) -> None:
    """Write the whole CLIP into a part of the model's folder that diffusers ignores."""
    trainer = CLIPTrainer.from_folder(folder / "clip" / "model", "float32")
    trainer.save(folder / "model" / "clip", "float16")


def report(recipe: Recipe, folder: Path) -> None:
    """Measure the model as it is shipped, and write the results beside its weights."""
    if not recipe.reported:
        return
    model = StableDiffusion.from_preset(folder / "model")
    prompts = [scene.caption for split in SPLITS for scene in evaluation_scenes(split, 8)]
    gallery(generate(model, prompts), prompts).save(folder / "gallery.png")
    plot_stages(folder)
    scales: dict[str, dict[str, float]] = {
        "guided": {},
        "unguided": {"unconditional_guidance_scale": 1.0},
    }
    figures = {
        name: evaluate(
            lambda prompts: generate(model, prompts, **settings),
            recipe.prompts,
            recipe.seed,
            recipe.latents,
        )
        for name, settings in scales.items()
    }
    clip = CLIPTrainer.from_folder(folder / "model" / "clip", "float32")
    manifest = {
        "recipe": dataclasses.asdict(recipe),
        "versions": versions(),
        # It is measured anew, because float16 has rounded its weights.
        "autoencoder": measure_autoencoder(recipe, folder / "model")[0],
        "clip": measure_clip(clip, recipe.words, recipe.prompts // 2),
        **figures,
    }
    (folder / "model" / "README.md").write_text(card(manifest), encoding="utf-8")
    _write_json(folder / "model" / "manifest.json", manifest)


# Each stage leaves a result in the folder and is skipped if that is there.
STAGES = {
    "autoencoder/model": train_autoencoder,
    "autoencoder.json": check_autoencoder,
    "clip/model": train_clip,
    "diffusion/model": train_diffusion,
    "model": export,
    "model/clip": export_clip,
    "model/manifest.json": report,
}


def run(recipe: Recipe, folder: Path) -> None:
    """Run all stages that are not done.

    Args:
        recipe: `Recipe`.
        folder: path of the run's folder.

    Raises:
        ValueError: If a stage misses its bar, or the folder holds a run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_recipe(recipe, folder / "recipe.json")
    for result, stage in STAGES.items():
        if not (folder / result).exists():
            start = time.monotonic()
            keras.utils.set_random_seed(recipe.seed)
            stage(recipe, folder)
            print(f"{result}: {time.monotonic() - start:.0f} s", flush=True)


def _check_recipe(recipe, path):
    """Refuse the folder of another recipe's run."""
    text = json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"
    if not path.exists():
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"The folder must be new, or that of a run of the same recipe. Received: "
            f"{str(path.parent)!r} with a {path.name} that differs. Choose another folder."
        )


def _train(trainer: Trainer, data: Batches, stage: Stage, folder: Path) -> Loop:
    settings = OptimizerSettings(
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        decay="cosine",
        settings={"beta_2": 0.99, "weight_decay": 0.01},
    )
    optimizer = make_optimizer(settings, stage.steps)
    if isinstance(trainer, CLIPTrainer):
        exclude_from_decay(optimizer, trainer)
    loop_settings = LoopSettings(
        stage.batch_size,
        clip_norm=1.0,
        ema_decay=stage.ema_decay,
        save_every=stage.save_every,
        keep=2,
        sample_every=4 * stage.save_every,
    )
    with Prefetch(data) as batches:
        loop = Loop(trainer, optimizer, batches, folder, loop_settings)
        loop.run(stage.steps)
    return loop


def _parts(folder, *kinds):
    """Return networks of a folder that need not be a whole model."""
    source = CheckpointSource(folder)
    return {kind: source.model(kind, "float32") for kind in kinds}


def _write_json(path, values):
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Train the model `shapes`, or continue its training."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--micro", action="store_true", help="a run of minutes, with a few words")
    arguments = parser.parse_args()
    run(MICRO if arguments.micro else Recipe(), arguments.out)
