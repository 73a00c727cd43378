"""Pictures and masks against the image processors of diffusers' image-to-image and inpainting."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from kdiffusion import images

PICTURES = VaeImageProcessor(vae_scale_factor=8)
MASKS = VaeImageProcessor(
    vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
)
SIZES = [None, (64, 64), (8, 8), (96, 40), (200, 312)]


def pixels(height, width, channels, seed=0):
    """Smooth and rough parts, with all levels."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width][..., None] / max(height, width)
    waves = np.sin(x * random.uniform(5, 40, channels) + y * random.uniform(5, 40, channels))
    noise = random.randint(0, 256, (height, width, channels))
    return np.where(x > y, 127.5 + 127.5 * waves, noise).astype(np.uint8)


def channels_last(tensor):
    return tensor.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("own", [(64, 64), (97, 131), (300, 20)])
def test_pictures_of_8_bits(own, size):
    height, width = size or (None, None)
    image = Image.fromarray(pixels(*own, 3))
    expected = channels_last(PICTURES.preprocess(image, height, width))
    found = images.to_model(image, height, width)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(images.to_model(np.asarray(image), height, width), expected)


def test_several_pictures():
    batch = [Image.fromarray(pixels(72, 90, 3, seed)) for seed in range(3)]
    expected = channels_last(PICTURES.preprocess(batch))
    np.testing.assert_array_equal(images.to_model(batch), expected)


def test_floats_that_need_no_resize():
    batch = np.random.RandomState(0).rand(2, 64, 48, 3).astype(np.float32)
    np.testing.assert_array_equal(images.to_model(batch), channels_last(PICTURES.preprocess(batch)))
    one = batch.astype(np.float64)[0]
    expected = channels_last(PICTURES.preprocess(one))
    np.testing.assert_allclose(images.to_model(one), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("own", [(64, 64), (97, 131), (300, 20)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_masks_of_8_bits(mode, own, size):
    mask = Image.fromarray(pixels(*own, 3)).convert(mode)
    expected = channels_last(MASKS.preprocess(mask, *size))
    assert 0.0 < expected.mean() < 1.0
    np.testing.assert_array_equal(images.to_mask(mask, *size), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "HSV"])
def test_masks_that_need_no_resize(mode):
    mask = Image.fromarray(pixels(64, 48, 3)).convert(mode)
    expected = channels_last(MASKS.preprocess(mask, 64, 48))
    assert 0.0 < expected.mean() < 1.0
    np.testing.assert_array_equal(images.to_mask(mask, 64, 48), expected)


def test_masks_of_floats():
    # Float32 just below one half, one half itself, and the next above.
    half = np.float32(0.5)
    steps = [np.nextafter(half, 0, dtype=np.float32), half, np.nextafter(half, 1, dtype=np.float32)]
    mask = np.random.RandomState(0).choice(np.array([0, *steps, 1], np.float32), (64, 48))
    expected = channels_last(MASKS.preprocess(mask[None].copy(), 64, 48))
    np.testing.assert_array_equal(images.to_mask(mask, 64, 48), expected)


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("size", [(64, 64), (72, 200), (1024, 8)])
def test_latent_masks(size, factor):
    mask = np.random.RandomState(0).randint(0, 2, (2, *size, 1)).astype(np.float32)
    tensor = torch.from_numpy(mask.transpose(0, 3, 1, 2))
    small = torch.nn.functional.interpolate(tensor, size=tuple(side // factor for side in size))
    np.testing.assert_array_equal(images.latent_mask(mask, factor), channels_last(small))


def test_masked_images():
    image, mask = Image.fromarray(pixels(90, 70, 3)), Image.fromarray(pixels(90, 70, 1)[..., 0])
    picture, binary = PICTURES.preprocess(image, 64, 64), MASKS.preprocess(mask, 64, 64)
    expected = channels_last(picture * (binary < 0.5))
    found = images.masked_image(images.to_model(image, 64, 64), images.to_mask(mask, 64, 64))
    np.testing.assert_array_equal(found, expected)
