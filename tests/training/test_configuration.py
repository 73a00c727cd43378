"""Configurations that are refused before anything is downloaded, opened, made or cached."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdiffusion import cli
from kdiffusion.models.base import ArchitectureModel
from kdiffusion.records import fields
from kdiffusion.training.config import build, new_model
from kdiffusion.training.config.build import make_job
from kdiffusion.training.config.optimizers import make_optimizer
from kdiffusion.training.config.schema import resolve
from kdiffusion.training.loop import checkpoints
from kdiffusion.training.trainers.diffusion_objective import Objective
from kdiffusion.weights import hub
from kdiffusion.weights.random_tiny import RandomSource
from weights_conversion import FAMILIES, configs

TEXT = {
    **{"vocabulary_size": 514, "end_id": 513, "max_length": 24},
    **{"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 16},
}
NETWORK = {
    **{"channels": [8, 8], "layers_per_level": 1, "num_groups": 4},
    **{"depths": [0, 0], "mid_depth": 1, "num_heads": [1, 1]},
}
PIXELS = NETWORK | {"in_channels": 3, "out_channels": 3, "context_width": None}
CLASSES = PIXELS | {"num_classes": 4}
TEXTS = {
    "diffusion_model": NETWORK | {"context_width": 16},
    "autoencoder": "random-tiny",
    "text_encoder": TEXT,
}
AUTOENCODER = {"channels": [8, 8], "layers_per_level": 1, "num_groups": 4, "mid_attention": False}
TOWER = {
    **{"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2},
    **{"mlp_width": 16, "projection_width": 8},
}
CLIP = {"image_tower": TOWER, "text_encoder": TEXT | {"projection_width": 8}}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Make an empty folder, with images of four colours in `data` and one image in `bare`."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "bare"):
        Path(folder).mkdir()
    rows = []
    for label in range(4):
        Image.new("RGB", (10, 8), (60 * label, 0, 0)).save(f"data/{label}.png")
        rows.append({"file_name": f"{label}.png", "text": f"a {label}", "label": label})
    Path("data/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (10, 8)).save("bare/0.png")


def forbid(monkeypatch, owner, name):
    def fail(first=None, *arguments, **settings):
        pytest.fail(f"{name} was called before the configuration was refused")

    monkeypatch.setattr(owner, name, fail)


@pytest.fixture
def no_networks(monkeypatch):
    """Fail where a network is made, a cache filled or the hub asked."""
    for owner, name in ((ArchitectureModel, "__init__"), (build, "cached"), (hub, "fetch")):
        forbid(monkeypatch, owner, name)


@pytest.fixture
def no_sources(monkeypatch, no_networks):
    """Fail where a model is opened, too."""
    forbid(monkeypatch, new_model, "open_source")
    for name in ("open_source", "open_model"):
        forbid(monkeypatch, build, name)


def merged(low, high):
    both = {**low, **high}
    nested = [key for key in low.keys() & high if isinstance(low[key], dict)]
    return both | {key: low[key] | high[key] for key in nested}


def start(kind, values, folder="run"):
    """Make the job of a configuration that is sound but for some values."""
    values = merged({"data": {"folder": "data", "height": 8, "width": 8}}, values)
    return make_job(resolve(kind, values), folder=folder)


PRESET = {"preset": "random-tiny"}
NEW = {"model": {"diffusion_model": PIXELS}}

OF_DIFFUSION = [
    # keys and types
    ({"modle": {}}, "the configuration has no 'modle'. Known keys: data, dtype, gradient_"),
    (NEW | {"loop": {"batchsize": 2}}, "loop has no 'batchsize'. Known keys: accumulation, "),
    (NEW | {"loop": {"batch_size": "2"}}, 'batch_size must be a whole number. Received: "2"'),
    (NEW | {"steps": True}, "steps must be a whole number. Received: true"),
    (NEW | {"loop": {"seed": 2}}, "Give `seed` beside `loop`"),
    (NEW | {"objective": {"wieghting": "min_snr"}}, "objective has no 'wieghting'. Known keys: c"),
    # numbers
    (NEW | {"steps": 0}, "`steps` must be 1 or more. Received: steps=0"),
    (NEW | {"seed": -1}, r"from 0 to 2\*\*32 - 1. Received: seed=-1"),
    (NEW | {"loop": {"batch_size": 0}}, "`batch_size` must be a whole number, 1 or more"),
    (NEW | {"loop": {"batch_size": 8, "accumulation": 3}}, "must be a multiple of `accumulation`"),
    (NEW | {"loop": {"jit_compile": "yes"}}, "`jit_compile` must be True, False or 'auto'"),
    (NEW | {"dtype": "flaot32"}, "Received: dtype='flaot32'. Use 'float32' or 'mixed_bfloat16'"),
    (NEW | {"dtype": "int8_from_float32"}, "must be a Keras dtype policy of floating numbers"),
    (NEW | {"dtype": "mixed_float16"}, "computes in float16. Use bfloat16"),
    (NEW | {"objective": {"weighting": "snr"}}, "Unknown `weighting`. Received: 'snr'. Use one of"),
    (NEW | {"objective": {"caption_dropout": 2}}, "a share from 0 to 1. Received: caption_dropo"),
    (NEW | {"samples": {"num_steps": 0}}, "`num_steps` must be 1 or more. Received: num_steps=0"),
    (NEW | {"samples": {"seed": 2**64}}, "Received: seed=18446744073709551616"),
    (
        NEW | {"samples": {"num_steps": 1001}, "loop": {"sample_every": 5}},
        "`num_steps` must be .*1001",
    ),
    # the optimizer
    (NEW | {"optimizer": {"name": "sdg"}}, "one of adadelta, adafactor, .*Received: 'sdg'"),
    (NEW | {"optimizer": {"settings": {"momentun": 1}}}, "optimizer.settings: "),
    (NEW | {"optimizer": {"settings": {"use_ema": True}}}, "use_ema=True. Use .*`ema_decay`"),
    (NEW | {"optimizer": {"settings": {"global_clipnorm": 1.0}}}, "Use `clip_norm`"),
    (NEW | {"optimizer": {"settings": {"learning_rate": 1}}}, "beside `settings`, not in it"),
    (NEW | {"optimizer": {"learning_rate": 0}}, "must be positive .*learning_rate=0"),
    (NEW | {"optimizer": {"decay": "linear"}}, "'constant' or 'cosine'. Received: decay='linear'"),
    # the data
    (NEW | {"data": {"folder": None}}, "`data.folder` is missing: give the folder of the images"),
    (NEW | {"data": {"folder": "nowhere"}}, "'nowhere' is no folder. Expected one with images"),
    (NEW | {"data": {"crop": "top"}}, "data: `crop` must be one of .*Received: crop='top'"),
    (NEW | {"data": {"crop_share": 0}}, "above 0 and at most 1. Received: 0"),
    (NEW | {"data": {"height": 0}}, "`height` must be 1 or more, or null. Received: height=0"),
    (NEW | {"data": {"workers": 0}}, "`workers` must be 1 or more, or null. Received: workers=0"),
    (NEW | {"data": {"height": None}}, "A new model needs `data.height` and `data.width`"),
    (NEW | {"data": {"augmentation": [{"layer": "Sequential"}]}}, "Received: 'Sequential'"),
    (
        NEW | {"data": {"augmentation": [{"layer": "RandomContrast"}]}},
        "data.augmentation, RandomContrast: ",
    ),
    (
        NEW | {"data": {"augmentation": [{"layer": "Rescaling", "scale": 0.001}]}},
        "data.augmentation: Rescaling must return values from 0 to 255",
    ),
    (NEW | {"data": {"cache": "cache"}}, "nothing to cache. Leave out `data.cache`"),
    (PRESET | {"data": {"cache": "bare/0.png/cache"}}, "'bare/0.png' is no folder|is no folder"),
    (PRESET | {"data": {"cache": "c", "crop": "random"}}, "use crop='center' and no augmentation"),
    (
        PRESET | {"data": {"cache": "c", "augmentation": [{"layer": "RandomContrast"}]}},
        "center' and some augmentation",
    ),
    # the model
    ({}, "Give either `preset`, a model to fine-tune, or `model`.*Received: neither"),
    (NEW | PRESET, "Received: both"),
    ({"preset": "nowhere"}, "preset: `preset` must be a known name.*Received: preset='nowhere'"),
    ({"model": TEXTS | {"autoencoder": "nowhere"}}, "model.autoencoder: .*'nowhere', which is no"),
    ({"model": TEXTS | {"text_encoder": "nowhere"}}, "model.text_encoder: .*'nowhere', which is"),
    ({"model": TEXTS | {"tokenizer": "nowhere"}}, "model.tokenizer: .*'nowhere', which is no"),
    ({"model": TEXTS, "data": {"folder": "bare"}}, "prompted with texts, and 'bare' has no captio"),
    ({"model": TEXTS | {"autoencoder": None}}, "generates latents: give `autoencoder` too"),
    ({"model": TEXTS | {"text_encoder": None}}, "context_width=16 and no text_encoder"),
    (
        {"model": TEXTS | {"text_encoder": TEXT | {"width": 32}}},
        "Received: context_width=16, width=32",
    ),
    ({"model": {"diffusion_model": {"channels": [8]}}}, "`depths` needs one value for each"),
    ({"model": {"diffusion_model": PIXELS | {"out_channels": 4}}}, "which have 3 channels"),
    (
        {"model": {"diffusion_model": PIXELS | {"in_channels": 7}}},
        "An inpainting network .*channels=7",
    ),
    ({"model": {"diffusion_model": PIXELS | {"mid_depth": 0}}}, "mid_depth"),
    (
        {"model": {"diffusion_model": CLASSES | {"num_classes": 3}}},
        "Give a new model num_classes=4",
    ),
    ({"model": {"diffusion_model": CLASSES}, "data": {"folder": "bare"}}, "'bare' has no labels"),
    (NEW | {"train_text_encoder": True}, "needs a model of texts"),
    (
        {"model": NEW["model"] | {"schedule": {"rescale_zero_terminal_snr": True}}},
        "learns nothing of the image where the input is noise",
    ),
    ({"model": NEW["model"] | {"schedule": {"prediction": "x"}}}, "prediction"),
]

OF_AUTOENCODERS = [
    ({"data": {"height": None}}, "`data.height` and `data.width` are missing"),
    ({"data": {"height": 9}}, "`height` must be a positive multiple of 2. Received: height=9"),
    ({"model": AUTOENCODER | {"image_channels": 1}}, "Images have three channels"),
    ({"model": AUTOENCODER | {"num_groups": 3}}, "must be a multiple of `num_groups`"),
    ({"latent_scale": "local"}, "one of global, channel, keep. Received: latent_scale='local'"),
    (
        {"model": AUTOENCODER | {"codebook_size": 8}, "latent_scale": "channel"},
        "by one number. Received: latent_scale='channel'",
    ),
    ({"model": AUTOENCODER | {"codebook_size": 8, "quant_conv": False}}, "quant_conv"),
    ({"objective": {"pixel": "l3"}}, "`pixel` must be 'l1' or 'l2'. Received: pixel='l3'"),
    ({"discriminator": {"depth": 0}}, "discriminator: `depth` must be 1 or more. Received"),
    ({"discriminator": {"depth": 2}}, "discriminator needs images of 12 x 12 pixels at least"),
    ({"discriminator": {"depth": 1, "image_channels": 1}}, "discriminator must take them"),
    (
        {"discriminator": {"depth": 1}, "loop": {"batch_size": 4, "accumulation": 2}},
        "Received: accumulation=2. Use 1",
    ),
    (
        {"perceptual": {"vgg16": "vgg16.pth", "linear": "vgg.pth"}},
        "perceptual.vgg16 must be a file. Received: 'vgg16.pth'",
    ),
    (
        {"perceptual": {"vgg16": "bare/0.png", "linear": "bare/0.png"}},
        "perceptual network needs images of 16 x 16",
    ),
]

OF_CLIP = [
    ({"data": {"folder": "bare"}}, "compares images with texts, and 'bare' has no captions"),
    ({"data": {"height": 16}}, "takes images of 8 x 8 pixels. Received: data.height=16"),
    ({"loop": {"batch_size": 1}}, "Received: batch_size=1. Use two or more"),
    ({"loop": {"batch_size": 4, "accumulation": 2}}, "Received: accumulation=2. Use 1"),
    (
        {"model": CLIP | {"image_tower": TOWER | {"projection_width": 16}}},
        "same width. Received: projection_width=16 and 8",
    ),
    (
        {"model": CLIP | {"image_tower": TOWER | {"image_channels": 1, "mean": [0.5], "std": [1]}}},
        "image_tower must take them",
    ),
    (
        {"model": CLIP | {"text_encoder": CLIP["text_encoder"] | {"vocabulary_size": 100}}},
        "Received: a tokenizer of 514 tokens .*Use vocabulary_size=514",
    ),
    ({"model": None, "preset": "shapes"}, "fine-tuned from a folder.*Received: preset='shapes'"),
]

CASES = [
    *(("diffusion", *case) for case in OF_DIFFUSION),
    *(("autoencoder", {"model": AUTOENCODER} | values, text) for values, text in OF_AUTOENCODERS),
    *(("clip", {"model": CLIP} | values, text) for values, text in OF_CLIP),
]


@pytest.mark.parametrize("kind, values, message", CASES)
def test_nothing_is_opened_or_made_for_a_wrong_configuration(kind, values, message, no_sources):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        start(kind, values)
    assert sorted(path.name for path in Path().iterdir()) == ["bare", "data"]


SOUND = [
    ("diffusion", {"model": {"diffusion_model": CLASSES}}),
    ("diffusion", {"model": TEXTS}),
    ("diffusion", PRESET | {"data": {"cache": "cache"}}),
    ("autoencoder", {"model": AUTOENCODER, "discriminator": {"depth": 1}}),
    ("autoencoder", PRESET),
    ("clip", {"model": CLIP}),
]


@pytest.mark.parametrize("kind, values", SOUND)
def test_sound_configurations_come_as_far_as_their_networks(kind, values, no_networks):
    with pytest.raises(pytest.fail.Exception, match="__init__ was called"):
        start(kind, values)


# ── what the architectures tell ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind, values, message",
    [
        ("diffusion", PRESET | {"data": {"folder": "bare"}}, "'bare' has no captions"),
        ("diffusion", PRESET | {"data": {"height": 12}}, "positive multiple of 8.*height=12"),
        (
            "diffusion",
            {"model": TEXTS | {"diffusion_model": PIXELS | {"context_width": 16}}},
            "latent_channels=4, out_channels=3",
        ),
        ("diffusion", {"model": TEXTS | {"text_encoder": "random-tiny"}}, "width=32, context_wi"),
        (
            "diffusion",
            {"model": TEXTS | {"text_encoder": TEXT | {"end_id": 5}}},
            "ends texts with id 5. Received: a tokenizer .*513",
        ),
        (
            "diffusion",
            {"model": TEXTS | {"tokenizer": "random-tiny"}},
            "rows of 24 tokens at most.*have 77",
        ),
        ("diffusion", {"model": TEXTS, "data": {"width": 12}}, "multiple of 8.*width=12"),
        ("autoencoder", PRESET | {"data": {"height": 12}}, "multiple of 8.*height=12"),
    ],
)
def test_architectures_refuse_before_a_network_is_made(kind, values, message, no_networks):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        start(kind, values)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "changes, values, message",
    [
        ({"in_channels": 9}, {}, "An inpainting network .*in_channels=9, out_channels=4"),
        ({"context_width": None}, {"train_text_encoder": True}, "needs a `text_encoder`"),
        ({"context_width": None, "num_classes": 3}, {}, "Give a new model num_classes=4"),
    ],
)
def test_presets_refuse_before_a_network_is_made(
    changes, values, message, no_networks, monkeypatch
):
    architecture = RandomSource.architecture

    def changed(source, kind):
        record = architecture(source, kind)
        return dataclasses.replace(record, **changes) if kind == "diffusion_model" else record

    monkeypatch.setattr(RandomSource, "architecture", changed)
    if "context_width" in changes:
        monkeypatch.setattr(RandomSource, "family", FAMILIES["latent-diffusion"])
    with pytest.raises(ValueError, match=message):
        start("diffusion", PRESET | values)


def test_a_folder_of_clip_refuses_before_its_weights_are_read(no_networks):
    clip = resolve("clip", {"model": CLIP}).model
    records = (dataclasses.asdict(clip.text_encoder), dataclasses.asdict(clip.image_tower))
    Path("clip").mkdir()
    Path("clip/config.json").write_text(json.dumps(configs.clip_config(*records)))
    with pytest.raises(ValueError, match="'clip' holds no tokenizer. Put the one"):
        start("clip", {"preset": "clip"})


# ── the run's folder ──────────────────────────────────────────────────────────────────────────


def known_identity(values):
    """Return what is known of a run before its model is opened."""
    configuration = resolve("diffusion", values)
    optimizer = make_optimizer(configuration.optimizer, configuration.steps)
    return build.known_identity(configuration, optimizer)


def save_checkpoint(identity):
    Path("run").mkdir()
    checkpoints.save(Path("run"), 3, {}, {"identity": identity})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 7}, "settings/seed was 7 and is 0"),
        ({"loop": {"ema_decay": 0.5}}, "settings/ema_decay was 0.5 and is 0.9999"),
        ({"optimizer": {"name": "sgd"}}, "optimizers/model/class was 'SGD' and is 'AdamW'"),
    ],
)
def test_the_folder_of_another_run_is_refused_first(changes, message, no_sources):
    save_checkpoint(known_identity(PRESET | changes))
    with pytest.raises(ValueError, match=f"belongs to another run: .*{message}"):
        start("diffusion", PRESET)


def test_the_folder_of_another_trainer_is_refused_first(no_sources):
    save_checkpoint(known_identity(PRESET) | {"trainer": {"class": "CLIPTrainer"}})
    with pytest.raises(ValueError, match="trainer/class was 'CLIPTrainer' and is 'DiffusionTra"):
        start("diffusion", PRESET)


def test_another_objective_is_another_run(no_networks):
    identity, source = known_identity(PRESET), RandomSource()
    identity["trainer"] |= {
        "architecture": fields(source.architecture("diffusion_model")),
        "schedule": fields(source.schedule()),
        "objective": fields(Objective(caption_dropout=0.5)),
        "train_text_encoder": False,
    }
    save_checkpoint(identity)
    with pytest.raises(
        ValueError, match="run: trainer/objective/caption_dropout was 0.5 and is 0.1"
    ):
        start("diffusion", PRESET)


@pytest.mark.parametrize("folder", ["bare/0.png", "bare/0.png/run"])
def test_a_run_needs_a_folder_that_can_be_written(folder, no_sources):
    with pytest.raises(ValueError, match="the run's folder must be .*0.png' is no folder"):
        start("diffusion", PRESET, folder=folder)


def test_the_folder_of_a_run_that_trains_now_is_refused_first(no_sources):
    with checkpoints.locked(Path("run")):
        with pytest.raises(ValueError, match="Another process trains in run"):
            start("diffusion", PRESET)


# ── on the command line ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind, values", [("diffusion", {}), ("clip", {"model": CLIP, "dtype": "x"})]
)
def test_the_command_line_fails_in_one_line(kind, values, no_sources, capsys):
    Path("config.json").write_text(json.dumps({"data": {"folder": "data"}} | values))
    command = ["train", kind, "--config", "config.json", "--output", "run"]
    assert cli.main(command) == cli.FAILED
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kdiffusion: error: ") and err.count("\n") == 1
    assert not Path("run").exists()


def test_new_weights_follow_from_the_seed_alone():
    def weights(seed):
        np.random.default_rng().random()
        values = {"model": {"diffusion_model": CLASSES}, "seed": seed}
        return start("diffusion", values, folder=None).trainer.diffusion_model.get_weights()

    first, again, other = map(weights, (3, 3, 4))
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    assert any(np.any(one != different) for one, different in zip(first, other))
