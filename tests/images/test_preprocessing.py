"""Cropping and resizing of pictures, against Pillow step by step."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from kdiffusion.images.preprocessing import Preprocessing

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 60, 3), dtype=np.uint8)


def by_pillow(box, size):
    cut = Image.fromarray(PIXELS).crop(box)
    return np.asarray(cut.resize(size, Image.Resampling.BICUBIC))


def test_center_crop_is_that_of_latent_diffusion():
    # ldm/data/lsun.py: the middle square, its upper left corner rounded down, then bicubic
    expected = by_pillow((11, 0, 48, 37), (16, 16))
    np.testing.assert_array_equal(Preprocessing(16, 16)(PIXELS), expected)
    np.testing.assert_array_equal(Preprocessing(16, 16)(Image.fromarray(PIXELS)), expected)


def test_crop_has_the_proportions_of_the_result():
    np.testing.assert_array_equal(Preprocessing(8, 32)(PIXELS), by_pillow((0, 11, 60, 26), (32, 8)))
    np.testing.assert_array_equal(Preprocessing(37, 60)(PIXELS), PIXELS)
    assert Preprocessing(48, 96)(PIXELS[:1, :1]).shape == (48, 96, 3)


def test_random_crop_reaches_both_ends():
    crop = Preprocessing(16, 16, crop="random")
    for place, left in ((0.0, 0), (0.5, 12), (1 - 2**-53, 23)):
        expected = by_pillow((left, 0, left + 37, 37), (16, 16))
        np.testing.assert_array_equal(crop(PIXELS, (0.9, place, 0.1)), expected)
    share = Preprocessing(16, 16, crop="random", crop_share=2 / 3)
    expected = by_pillow((35, 6, 60, 31), (16, 16))
    np.testing.assert_array_equal(share(PIXELS, (0.5, 1 - 2**-53, 0.1)), expected)


def test_flip_mirrors_below_one_half_only():
    straight = Preprocessing(16, 16)(PIXELS)
    flip = Preprocessing(16, 16, flip=True)
    np.testing.assert_array_equal(flip(PIXELS, (0.5, 0.5, 0.49)), straight[:, ::-1])
    np.testing.assert_array_equal(flip(PIXELS, (0.5, 0.5, 0.5)), straight)
    np.testing.assert_array_equal(flip(PIXELS), straight)
    np.testing.assert_array_equal(Preprocessing(16, 16)(PIXELS, (0.5, 0.5, 0.0)), straight)


def test_pictures_are_turned_upright_and_laid_over_white(tmp_path):
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    turned = Preprocessing(60, 37)(tmp_path / "turned.png")
    np.testing.assert_array_equal(turned, np.rot90(PIXELS, -1))
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (Preprocessing(4, 4)(clear) == 255).all()
    floats = Preprocessing(16, 16)(PIXELS / 255.0)
    assert floats.dtype == np.float32
    np.testing.assert_allclose(255 * floats, Preprocessing(16, 16)(PIXELS), atol=1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"height": 0}, "`height` must be a whole number"),
        ({"width": 2.5}, "`width` must be a whole number"),
        ({"height": True}, "`height` must be a whole number"),
        ({"height": 10**5, "width": 10**5}, "at most 64 megapixels"),
        ({"crop": "middle"}, "`crop` must be one of"),
        ({"crop_share": 0.0}, "`crop_share` must be above 0"),
        ({"crop_share": float("nan")}, "`crop_share` must be above 0"),
        ({"crop_share": "1"}, "`crop_share` must be above 0"),
        ({"flip": 1}, "`flip` must be True or False"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Preprocessing(16, 16), **change)


def test_one_picture_at_a_time():
    with pytest.raises(ValueError, match="a batch of 2"):
        Preprocessing(16, 16)(np.stack([PIXELS, PIXELS]))
