"""Models without a text: of classes and of nothing in particular, in latents and in pixels."""

import dataclasses
import inspect

import numpy as np
import pytest
from families import FAMILIES, V, model_of

from kdiffusion import (
    DiffusionModel,
    ImageEncoder,
    LatentDiffusion,
    PixelDiffusion,
    Schedule,
    StableDiffusion,
)
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.weights.find import open_source
from kdiffusion.weights.random_tiny import RandomSource
from kdiffusion.weights.save import save
from kdiffusion.weights.sources import PartsSource

PARTS = FAMILIES["pixels of classes"].parts


def network(**changes):
    return DiffusionModel(dataclasses.replace(PARTS["diffusion_model"], **changes))


@pytest.fixture
def pixels():
    return model_of("pixels of classes")


@pytest.fixture
def latents():
    return model_of("latents of classes")


@pytest.fixture
def unconditional():
    return model_of("latents")


def draw(model, label=None, **settings):
    return model.generate_image(label, **{"num_steps": 3, "seed": 7, "verbose": 0, **settings})


def close(first, second):
    return np.abs(first.astype(int) - second.astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_images_follow_label_and_seed(name, request):
    model = request.getfixturevalue(name)
    images = draw(model, [3, 1], batch_size=2)
    assert images.dtype == np.uint8
    assert images.std() > 10
    assert close(images[1:2], draw(model, 3, seed=8))
    assert close(images[2:3], draw(model, 1, seed=9))
    assert not close(draw(model, 3), draw(model, 1))


def test_no_label_draws_of_no_class(pixels):
    of_none = draw(pixels)
    assert not any(close(of_none, draw(pixels, label)) for label in range(5))


def test_guidance_goes_away_from_no_class(pixels):
    plain, weak = draw(pixels, 2), draw(pixels, 2, unconditional_guidance_scale=1.0 + 1e-6)
    assert close(plain, weak)
    assert not close(plain, draw(pixels, 2, unconditional_guidance_scale=4.0))
    # Away from itself there is nothing to go.
    assert close(draw(pixels), draw(pixels, unconditional_guidance_scale=4.0))


def test_an_unconditional_model_is_given_nothing(unconditional):
    assert draw(unconditional, batch_size=2).shape == (2, 16, 24, 3)
    with pytest.raises(ValueError, match="knows no classes.*label=3"):
        draw(unconditional, 3)
    with pytest.raises(ValueError, match="nothing to be guided to.*=2.0"):
        draw(unconditional, unconditional_guidance_scale=2.0)


def test_given_noise_is_where_it_starts(pixels):
    noise = np.random.default_rng(0).normal(size=(12, 10, 3))
    first = draw(pixels, 1, seed=None, diffusion_noise=noise)
    assert close(first, draw(pixels, 1, seed=None, diffusion_noise=noise[None]))
    assert not close(first, draw(pixels, 1, seed=None, diffusion_noise=-noise))


@pytest.mark.parametrize("label", [5, -1, 1.5, [], [[1]], "cat", True, [0, 9]])
def test_labels_that_are_none(pixels, label):
    with pytest.raises(ValueError, match="`label` must be a whole number from 0 to 4"):
        draw(pixels, label)


def test_latents_are_encoded_and_decoded(latents):
    images = draw(latents, 0)
    codes = latents.encode_image(images)
    assert codes.shape == (1, 4, 6, 4)
    assert latents.decode(codes).shape == images.shape
    with pytest.raises(ValueError, match="`height` must be a positive multiple of 4"):
        draw(latents, 0, height=18)


def test_pure_noise_is_drawn_from_where_the_schedule_ends_in_it():
    schedule = Schedule(prediction="v", rescale_zero_terminal_snr=True)
    source = PartsSource({"diffusion_model": network()}, schedule, (8, 8))
    assert source.sampling() == ("ddim", Spacing("trailing"))
    model = PixelDiffusion.from_parts({"diffusion_model": network()}, schedule, (8, 8))
    assert draw(model, 0).std() > 0


@pytest.mark.parametrize(
    "cls, changes, message",
    [
        (StableDiffusion, {}, "Use LatentDiffusion or PixelDiffusion"),
        (StableDiffusion, {"context_width": 8}, "num_classes=5"),
        (LatentDiffusion, {"context_width": 8}, "Use StableDiffusion"),
        (PixelDiffusion, {"in_channels": 6}, "in_channels=6"),
    ],
)
def test_each_class_refuses_the_networks_of_the_others(cls, changes, message):
    with pytest.raises(ValueError, match=message):
        cls.from_parts({"diffusion_model": network(**changes)}, V, (16, 16))


def test_a_folder_of_another_class_is_refused(pixels, tmp_path):
    pixels.save(tmp_path / "model")
    with pytest.raises(ValueError, match="Use LatentDiffusion or PixelDiffusion"):
        StableDiffusion.from_preset(tmp_path / "model")
    with pytest.raises(ValueError, match="Use LatentDiffusion or PixelDiffusion"):
        StableDiffusion(16, 16, preset=tmp_path / "model").diffusion_model


def test_parts_that_are_missing_are_named(pixels):
    model = LatentDiffusion.from_parts({"diffusion_model": network()}, V, (16, 16))
    with pytest.raises(ValueError, match="no image_decoder"):
        draw(model, 0)
    source = RandomSource()
    parts = {"diffusion_model": source.model("diffusion_model", None)}
    with pytest.raises(ValueError, match="no tokenizer"):
        StableDiffusion.from_parts(parts, V, (64, 64)).encode_text("a cat")


def test_half_an_autoencoder_is_not_saved(tmp_path):
    models = {
        "diffusion_model": network(),
        "image_encoder": ImageEncoder(FAMILIES["latents"].parts["image_encoder"]),
    }
    with pytest.raises(ValueError, match="image_decoder"):
        save(tmp_path / "model", models, V)
    assert not (tmp_path / "model").exists()


def test_drawing_takes_what_stable_diffusion_takes():
    theirs = list(inspect.signature(StableDiffusion.generate_image).parameters)
    ours = list(inspect.signature(PixelDiffusion.generate_image).parameters)
    theirs = [name for name in theirs if name not in ("encoded_text", "negative_prompt")]
    assert ours == [theirs[0], "label", *theirs[1:]]


def test_parts_draw_what_their_source_draws(tiny):
    source = open_source("random-tiny")
    kinds = ("text_encoder", "image_encoder", "image_decoder", "diffusion_model")
    parts = {kind: source.model(kind, None) for kind in kinds}
    model = StableDiffusion.from_parts(
        parts, source.schedule(), (64, 64), tokenizer=source.tokenizer(), jit_compile=False
    )
    settings = {"num_steps": 2, "seed": 1, "verbose": 0}
    assert close(model.text_to_image("a", **settings), tiny.text_to_image("a", **settings))
