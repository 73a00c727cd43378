"""Collect what one backend makes of public names alone; `moves.py` compares it with what it made.

Weights begin as functions of their paths, so that training starts from the same numbers on every
backend. Texts have to be equal everywhere, digests where bytes have to.
"""

import hashlib
import json
import tempfile
import zlib

import numpy as np

SAMPLERS = ("ddim", "dpmpp_2m", "euler_a")
# The others' pictures are thinned: a sixteenth of their pixels tells as much.
OTHERS = """ddpm pndm euler heun lms ipndm dpm2 dpm2_a dpmpp_2s_a dpmpp_sde dpmpp_2m_sde
    dpmpp_3m_sde deis unipc lcm tcd""".split()
SETTINGS = {"num_steps": 5, "seed": 42, "verbose": 0}
PROMPTS = {
    "shapes": ("a red circle on a blue background", "a small yellow cross", "a green ring"),
    "random-tiny": ("a red circle", "", "many words, one after the other"),
}
TEXTS = (
    "",
    "a red circle on a blue background",
    "A Large ORANGE square\nleft of   a white diamond",
    "a black triangle at the top right",
    "photo of a cat, 4k, (best quality:1.2), [blurry]",
    "it's the dog's bone; they'll go, I'd've stayed",
    "naïve café, Ångström, Straße",
    "schÃ¶n and â€œquotedâ€\x9d",
    "AT&amp;T &lt;tag&gt; &amp;amp;",
    "日本の夏、蛍",
    "красный круг на синем фоне",
    "שלום עולם مرحبا",
    "👩‍🚀 on the 🌕, ☕️",
    "e\u0301 and \u00e9, ﬁ and fi",
    "1234567890 3.14159 1,000,000",
    "!?#$%^&*()_+-=~`|\\/<>",
    "<|startoftext|> a <|endoftext|> b",
    "\t\u00a0 tabs\u2003and spaces \u200b ",
    "word" * 40,
    "one two three " * 40,
    "\x00\x07 control \ufffd",
)

TEXT = {
    "vocabulary_size": 514,
    "max_length": 12,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_width": 32,
    "end_id": 513,
}
AUTOENCODER = {"channels": (8, 16), "layers_per_level": 1, "num_groups": 4}
NETWORK = {
    "channels": (8, 16),
    "layers_per_level": 1,
    "depths": (1, 0),
    "num_heads": (2, 2),
    "context_width": 16,
    "num_groups": 4,
}
TOWER = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_width": 32,
    "projection_width": 8,
}
SIZE, COUNT, STEPS = 16, 12, 20
SHOWN = 32  # numbers of each variable


def collect(folder):
    """Write `found.npz`, `found.json` and the saved models `random-tiny` and `wide`."""
    found = {"texts": {}, "digests": {}, "figures": {}}
    arrays = {}
    for preset in PROMPTS:
        model = open_preset(preset)
        for name, row in tokens(model.tokenizer):
            found["texts"][f"{preset} {name}"] = row
        arrays |= {f"pictures|{preset}, {name}": array for name, array in draw(model, preset)}
    model.save(folder / "random-tiny")
    wide_model().save(folder / "wide")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found["texts"][path.relative_to(folder).as_posix()] = digest
    for name, model in new_models():
        arrays |= shown(f"new {name}", model.variables)
        found["digests"][f"new {name}"] = digest_of(model.variables)
    for name, make in TRAINERS.items():
        figures, variables = train(make)
        arrays |= shown(name, variables)
        found["digests"][name] = digest_of(variables)
        found["figures"][name] = figures
    np.savez(folder / "found.npz", **arrays)
    (folder / "found.json").write_text(json.dumps(found), "utf-8")


def open_preset(preset):
    from kdiffusion import StableDiffusion

    return StableDiffusion.from_preset(preset)


def tokens(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        yield f"tokens of {text!r}", " ".join(map(str, ids))
        yield f"decoded tokens of {text!r}", tokenizer.decode(ids)
    rows = tokenizer.rows(TEXTS, warn=False)
    digest = hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()
    yield "rows of tokens", f"{rows.shape} {digest}"


def draw(model, preset):
    """Pictures of 64 x 64, few programs to compile."""
    from kdiffusion import Guidance, Sampler, images

    first, second, third = PROMPTS[preset]

    def picture(**settings):
        return model.text_to_image(first, **{**SETTINGS, "negative_prompt": second, **settings})[0]

    for sampler in SAMPLERS:
        yield sampler, picture(sampler=sampler)
    yield "a batch", model.text_to_image(
        [first, second, third],
        ["", third, "blurry"],
        **{**SETTINGS, "seed": [3, 1, 2], "num_steps": [4, 5, 6]},
        sampler=["ddim", Sampler("ddim", eta=0.5), "unipc"],
        unconditional_guidance_scale=[7.5, 3.0, 1.0],
    )
    start = pattern()
    yield "image_to_image", model.image_to_image(
        start, first, strength=0.6, sampler="euler_a", **SETTINGS
    )
    image, mask = images.pad_for_outpainting(start[8:, :48], right=16, top=8)
    yield "inpaint", model.inpaint(image, mask, first, sampler="dpmpp_2m", **SETTINGS)
    if preset == "shapes":
        return
    for sampler in OTHERS:
        yield f"{sampler}, thinned", picture(sampler=sampler)[::4, ::4]
    yield "spacing, thinned", picture(sampler="euler", spacing="trailing+karras")[::4, ::4]
    yield "noise of a GPU, thinned", picture(noise="cuda")[::4, ::4]
    guidance = Guidance(rescale=0.7, interval=(0.2, 0.8))
    yield "guidance, thinned", picture(guidance=guidance)[::4, ::4]
    text = images.slerp(*model.encode_text([first, third]), 0.3)
    yield "two texts, thinned", model.generate_image(text, **SETTINGS)[0, ::4, ::4]
    latents = model.encode_image(start, seed=1)
    yield "preview", images.preview(latents)
    states = []
    picture(sampler="dpmpp_2m", callback=lambda step: states.append(step.state))
    yield "resumed, thinned", picture(sampler="dpmpp_2m", resume=states[2])[::4, ::4]


def pattern():
    """A picture of 64 x 64."""
    rows, columns = np.mgrid[:64, :64]
    return np.stack([4 * rows, 4 * columns, 255 - 2 * (rows + columns)], axis=-1).astype(np.uint8)


def wide_model():
    """The smallest that is told to be Stable Diffusion 1, by the width of its texts."""
    from kdiffusion import (
        DiffusionModel,
        ImageDecoder,
        ImageEncoder,
        Schedule,
        SimpleTokenizer,
        StableDiffusion,
        TextEncoder,
    )

    text = {**TEXT, "width": 768, "max_length": 77}
    networks = {
        "text_encoder": TextEncoder(text),
        "image_encoder": ImageEncoder(AUTOENCODER),
        "image_decoder": ImageDecoder(AUTOENCODER),
        "diffusion_model": DiffusionModel({**NETWORK, "context_width": 768}),
    }
    parts = {name: begun(model, n) for n, (name, model) in enumerate(networks.items())}
    words = SimpleTokenizer.byte_level()
    return StableDiffusion.from_parts(parts, Schedule(), (SIZE, SIZE), tokenizer=words)


def new_models():
    """A new network of each kind, whose weights follow from Keras's seed."""
    import keras

    from kdiffusion import DiffusionModel, ImageDecoder, ImageEncoder, ImageTower, TextEncoder
    from kdiffusion.training import Discriminator

    labelled = {**NETWORK, "context_width": None, "num_classes": 3}
    codebook = {**AUTOENCODER, "codebook_size": 16}
    kinds = {
        "diffusion model of texts": lambda: DiffusionModel(NETWORK),
        "diffusion model of classes": lambda: DiffusionModel(labelled),
        "image encoder": lambda: ImageEncoder(AUTOENCODER),
        "image decoder with a codebook": lambda: ImageDecoder(codebook),
        "text encoder": lambda: TextEncoder(TEXT),
        "image tower": lambda: ImageTower(TOWER),
        "discriminator": lambda: Discriminator({"channels": 8, "depth": 1}),
    }
    for name, make in kinds.items():
        keras.utils.set_random_seed(7)
        yield name, make()


def diffusion_trainer():
    """Latents and texts, both encoders there and one of them learning."""
    from kdiffusion import DiffusionModel, ImageEncoder, Schedule, SimpleTokenizer, TextEncoder
    from kdiffusion.training import DiffusionTrainer, Objective

    tokenizer = SimpleTokenizer.byte_level(max_length=12)
    return DiffusionTrainer(
        begun(DiffusionModel(NETWORK, name="diffusion_model"), 0),
        Schedule(prediction="v"),
        image_encoder=begun(ImageEncoder(AUTOENCODER, name="image_encoder"), 1),
        text_encoder=begun(TextEncoder(TEXT, name="text_encoder"), 2),
        objective=Objective(caption_dropout=0.3, offset_noise=0.1),
        train_text_encoder=True,
        empty={"tokens": tokenizer.rows([""])[0]},
    )


def autoencoder_trainer():
    """A codebook and a discriminator."""
    from kdiffusion import ImageDecoder, ImageEncoder
    from kdiffusion.training import AutoencoderObjective, AutoencoderTrainer, Discriminator

    architecture = {**AUTOENCODER, "codebook_size": 16}
    return AutoencoderTrainer(
        begun(ImageEncoder(architecture, name="image_encoder"), 0),
        begun(ImageDecoder(architecture, name="image_decoder"), 1),
        discriminator=begun(Discriminator({"channels": 8, "depth": 1}, name="discriminator"), 2),
        objective=AutoencoderObjective(disc_start=5, disc_warmup=5),
    )


def clip_trainer():
    from kdiffusion import ImageTower, TextEncoder
    from kdiffusion.training import CLIPTrainer

    return CLIPTrainer(
        begun(ImageTower(TOWER, name="image_tower"), 0),
        begun(TextEncoder({**TEXT, "projection_width": 8}, name="text_encoder"), 1),
    )


TRAINERS = {
    "diffusion model and text encoder": diffusion_trainer,
    "autoencoder": autoencoder_trainer,
    "clip": clip_trainer,
}


def begun(model, number):
    """A model whose weights are functions of their paths."""
    for variable in model.variables:
        generator = np.random.default_rng([number, zlib.crc32(variable.path.encode())])
        values = 2.0 * generator.random(tuple(variable.shape)) - 1.0
        if len(variable.shape) < 2:
            values = 0.1 * values + variable.path.endswith("gamma")
        else:
            values *= np.prod(variable.shape[:-1]) ** -0.5
        variable.assign(values.astype(np.float32))
    return model


def train(make):
    """The last figures of a run and all variables after it."""
    import keras

    from kdiffusion import SimpleTokenizer
    from kdiffusion.training import Data, InMemory, Loop, LoopSettings, Preprocessing

    trainer = make()
    pictures = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    captions = [TEXTS[number] for number in range(COUNT)]
    data = Data(
        InMemory(pictures, captions),
        Preprocessing(SIZE, SIZE, flip=True),
        SimpleTokenizer.byte_level(max_length=12),
    )
    settings = LoopSettings(
        batch_size=4,
        accumulation=2 if trainer.separable else 1,
        clip_norm=1.0,
        ema_decay=0.9,
        log_every=STEPS,
        verbose=False,
    )
    # With Keras's own epsilon rounding decides where gradients vanish.
    optimizer = keras.optimizers.AdamW(1e-3, epsilon=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(trainer, optimizer, data, folder, settings)
        figures = loop.run(STEPS)
        figures.pop("images_per_second", None)
        with loop.averages.applied():
            averaged = {f"averaged {v.path}": value_of(v) for v in trainer.trainable_variables}
    return figures, {**numbered(trainer.variables), **averaged}


def numbered(variables):
    """Values by path; two networks may have the same paths."""
    return {f"{number} {v.path}": value_of(v) for number, v in enumerate(variables)}


def value_of(variable):
    from keras import ops

    return ops.convert_to_numpy(variable.value).copy()


def shown(name, variables):
    """Some of the numbers, as one array."""
    values = variables.values() if isinstance(variables, dict) else map(value_of, variables)
    parts = [np.ravel(v)[:: max(1, v.size // SHOWN)][:SHOWN] for v in values]
    return {f"weights|{name}": np.concatenate(parts).astype(np.float32)}


def digest_of(variables):
    values = variables if isinstance(variables, dict) else numbered(variables)
    total = hashlib.sha256()
    for name, value in values.items():
        total.update(f"{name} {value.shape} {value.dtype}".encode() + value.tobytes())
    return total.hexdigest()


def flat(figures):
    """Nested dictionaries of numbers as one."""
    return {f"{name}, {key}": x for name, rows in figures.items() for key, x in rows.items()}


def _pictures_apart(before, now):
    if before.shape != now.shape:
        return np.inf
    return np.abs(before.astype(int) - now.astype(int)).max()


def _weights_apart(before, now):
    if before.shape != now.shape:
        return np.inf
    return np.linalg.norm(before.astype(float) - now) / np.linalg.norm(before.astype(float))


# How far two arrays are from each other, by kind.
KINDS = {"pictures": _pictures_apart, "weights": _weights_apart}
