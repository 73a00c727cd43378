"""Overfitting 64 pictures: in pixels and classes, in latents and texts, each also without either.

    python tests/acceptance/training_overfit.py [--only pixels|latents] [--folder FOLDER]

The pictures are shapes of four kinds and colours on four backgrounds. A model of pixels learns
them as 64 classes, a model of latents, with an autoencoder and a text encoder of its own, learns
them from captions. Then each of them is asked for, and must come back; and what is drawn without
asking must be one of them. Each trains until that is so, or for so long that it counts as failed.
An interrupted run goes on where it was, if it has a folder.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

from kdiffusion import (
    DiffusionModel,
    ImageDecoder,
    ImageEncoder,
    PixelDiffusion,
    Schedule,
    SimpleTokenizer,
    StableDiffusion,
    TextEncoder,
)
from kdiffusion.images import to_uint8
from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.training import (
    AutoencoderObjective,
    AutoencoderTrainer,
    DiffusionTrainer,
    Loop,
    LoopSettings,
    Objective,
)
from kdiffusion.training.trainers.latent_scale import measure, scaled

SIDE = 16
BAR = 25.0  # dB, from what is drawn to a picture that was learned
CODEC_BAR = 30.0  # dB, from what the autoencoder makes of a picture to the picture
FREE = 32  # pictures drawn without asking for any
SHARE = 0.9  # of these, and of those asked for, that must reach the bar
EVERY = 400  # steps after which it is seen whether it has learned enough
LIMIT = 6000  # steps
DRAWING = {"num_steps": 20, "seed": 1, "verbose": 0}

SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 6,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 5,
    "cross": lambda x, y: np.maximum(
        np.minimum(abs(x), abs(y)) - 2, np.maximum(abs(x), abs(y)) - 7
    ),
    "ring": lambda x, y: abs(np.hypot(x, y) - 5) - 2,
}
COLOURS = {
    "red": (230, 30, 30),
    "yellow": (240, 220, 40),
    "cyan": (50, 220, 230),
    "white": (255, 255, 255),
}
BACKGROUNDS = {
    "black": (0, 0, 0),
    "blue": (20, 30, 160),
    "green": (10, 90, 30),
    "purple": (90, 20, 110),
}
SCHEDULE = Schedule(prediction="v")
OBJECTIVE = Objective(caption_dropout=0.2)
CODEC = AutoencoderArchitecture(
    channels=(32, 64), layers_per_level=1, num_groups=8, mid_attention=False
)
TEXT = TextEncoderArchitecture(
    vocabulary_size=514, max_length=32, width=64, depth=2, num_heads=4, mlp_width=128, end_id=513
)
NETWORK = {
    "channels": (32, 64),
    "layers_per_level": 1,
    "depths": (0, 1),
    "num_heads": (4, 4),
    "num_groups": 8,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("pixels", "latents"))
    parser.add_argument("--folder", type=Path, help="where runs are kept, and resumed from")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    captions, pictures = scenes()
    apart = psnr(pictures[:, None], pictures[None])[~np.eye(len(pictures), dtype=bool)].max()
    print(f"{len(pictures)} pictures, the most alike {apart:.1f} dB from each other", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        results = [apart < BAR]
        if arguments.only != "latents":
            results.append(pixels(pictures, folder))
        if arguments.only != "pixels":
            results.append(latents(captions, pictures, folder))
    sys.exit(not all(results))


def scenes():
    """64 captions, and their pictures (64, 16, 16, 3) uint8, with soft edges."""
    place = np.arange(SIDE) - (SIDE - 1) / 2
    y, x = np.meshgrid(place, place, indexing="ij")
    captions, pictures = [], []
    for shape, colour, background in itertools.product(SHAPES, COLOURS, BACKGROUNDS):
        inside = np.clip(0.5 - SHAPES[shape](x, y), 0, 1)[..., None]
        front, back = np.array(COLOURS[colour]), np.array(BACKGROUNDS[background])
        pictures.append(np.rint(inside * front + (1 - inside) * back).astype(np.uint8))
        captions.append(f"a {colour} {shape} on {background}")
    return captions, np.stack(pictures)


class Some:
    """Some of the 64 pictures at each step, in random order."""

    def __init__(self, **columns):
        self.columns = columns

    def batch(self, step, size):
        chosen = np.random.default_rng(step).choice(64, size, replace=False)
        return {name: column[chosen] for name, column in self.columns.items()}


def learn(name, trainer, data, folder, rate, judge):
    """Train, or go on training, until what the averaged weights make is good enough.

    Args:
        judge: function without arguments that says how good it is; the weights are then the
            averaged ones.

    Returns:
        Whether it is good enough.
    """
    optimizer = keras.optimizers.AdamW(
        keras.optimizers.schedules.PolynomialDecay(rate, LIMIT, rate / 10), weight_decay=1e-4
    )
    settings = LoopSettings(
        batch_size=32, clip_norm=1.0, ema_decay=0.99, log_every=50, save_every=EVERY
    )
    loop = Loop(trainer, optimizer, data, folder / name, settings)
    for steps in range(EVERY, LIMIT + 1, EVERY):
        loop.run(steps)
        if loop.step > steps:
            continue  # a resumed run was beyond
        with loop.averages.applied():
            print(f"{name} after {steps} steps:", flush=True)
            if judge():
                return True
    return False


def pixels(pictures, folder):
    network = DiffusionModel(
        DiffusionArchitecture(
            in_channels=3, out_channels=3, context_width=None, num_classes=64, **NETWORK
        )
    )
    model = PixelDiffusion.from_parts({"diffusion_model": network}, SCHEDULE, (SIDE, SIDE))
    trainer = DiffusionTrainer.from_model(model, objective=OBJECTIVE)
    data = Some(images=as_float(pictures), label=np.arange(64, dtype=np.int32))

    def judge():
        asked = model.generate_image(list(range(64)), **DRAWING)
        if not report_asked("pixels, classes", asked, pictures):
            return False
        free = model.generate_image(batch_size=FREE, **DRAWING)
        return report_free("pixels", free, pictures)

    return learn("pixels", trainer, data, folder, 2e-3, judge)


def latents(captions, pictures, folder):
    halves = codec(pictures, folder)
    if halves is None:
        return False
    parts = {
        "diffusion_model": DiffusionModel(
            DiffusionArchitecture(context_width=TEXT.width, **NETWORK), name="diffusion_model"
        ),
        "text_encoder": TextEncoder(TEXT),
        "image_encoder": halves[0],
        "image_decoder": halves[1],
    }
    tokenizer = SimpleTokenizer.byte_level(max_length=TEXT.max_length)
    model = StableDiffusion.from_parts(parts, SCHEDULE, (SIDE, SIDE), tokenizer=tokenizer)
    trainer = DiffusionTrainer.from_model(
        model, cached=("latents",), objective=OBJECTIVE, train_text_encoder=True
    )
    cached = {
        name: keras.ops.convert_to_numpy(values)
        for name, values in halves[0](as_float(pictures)).items()
    }
    data = Some(tokens=tokenizer.rows(captions), **cached)

    def judge():
        drawing = {"unconditional_guidance_scale": 1.0, **DRAWING}
        asked = model.text_to_image(captions, **drawing)
        if not report_asked("latents, captions", asked, pictures):
            return False
        free = model.text_to_image("", batch_size=FREE, **drawing)
        return report_free("latents", free, pictures)

    return learn("latents", trainer, data, folder, 2e-3, judge)


def codec(pictures, folder):
    """Both halves of an autoencoder that has learned the pictures, with latents of unit scale."""
    halves = ImageEncoder(CODEC), ImageDecoder(CODEC)
    trainer = AutoencoderTrainer(
        *halves, objective=AutoencoderObjective("l2", perceptual_weight=0.0), latent_scale="keep"
    )
    made = []

    def judge():
        made[:] = scaled(*halves, *measure(halves[0], as_float(pictures)))
        decibels = psnr(remade(made, pictures), pictures)
        print(
            f"autoencoder: median {np.median(decibels):.1f} dB, at least {decibels.min():.1f} dB",
            flush=True,
        )
        return decibels.min() >= CODEC_BAR

    data = Some(images=as_float(pictures))
    return made if learn("autoencoder", trainer, data, folder, 2e-3, judge) else None


def remade(halves, pictures):
    encoder, decoder = halves
    latents = encoder(as_float(pictures))["mean"]
    return to_uint8(keras.ops.convert_to_numpy(decoder(latents)))


def report_asked(name, drawn, pictures):
    """Tell if each image that was asked for came back."""
    decibels = psnr(drawn[:, None], pictures[None])
    right = decibels.argmax(axis=1) == np.arange(len(pictures))
    own = np.diag(decibels)
    share = np.mean(own >= BAR)
    print(
        f"{name}: {right.mean():.1%} are the right one, {share:.1%} reach {BAR:.0f} dB of it; "
        f"median {np.median(own):.1f} dB, at least {own.min():.1f} dB",
        flush=True,
    )
    return right.all() and share >= SHARE


def report_free(name, drawn, pictures):
    """Tell if images generated without asking are training images, and not all the same."""
    decibels = psnr(drawn[:, None], pictures[None])
    nearest = decibels.max(axis=1)
    kinds = len(set(decibels.argmax(axis=1)))
    share = np.mean(nearest >= BAR)
    print(
        f"{name}, not asked: {share:.1%} reach {BAR:.0f} dB of a picture; median "
        f"{np.median(nearest):.1f} dB, at least {nearest.min():.1f} dB; {kinds} different ones",
        flush=True,
    )
    return share >= SHARE and kinds > 1


def as_float(pictures):
    return (pictures / 127.5 - 1).astype(np.float32)


def psnr(first, second):
    """Decibels between pictures, over their last three axes."""
    error = np.mean((first.astype(float) - second.astype(float)) ** 2, axis=(-3, -2, -1))
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-6))


if __name__ == "__main__":
    main()
