"""Masks, paddings, previews and mixtures of noise."""

import numpy as np
import pytest
from picture_blocks import ALPHA, COLOURS, RGB, SIXTEEN, L, grey, in_blocks, one_channel
from PIL import Image

from kdiffusion import images

# Each of four blocks: 1 = repaint.
MASKS = {
    "1": (one_channel([0, 0, 255, 255]).convert("1"), [0, 0, 1, 1]),
    "L, one half is 1": (one_channel([127, 128, 0, 255]), [0, 1, 0, 1]),
    "L of 0 and 1": (one_channel([0, 1, 1, 0]), [0, 1, 1, 0]),
    "L of 0 and 2": (one_channel([0, 2, 255, 0]), [0, 0, 1, 0]),
    "LA, transparent is 0": (
        Image.merge("LA", (ALPHA, ALPHA.transpose(Image.Transpose.ROTATE_180))), [1, 0, 0, 1]),
    "P": (RGB.quantize(4), [0, 1, 0, 0]),
    "RGB by brightness": (RGB, [0, 1, 0, 0]),
    "RGBA, strokes on nothing": (
        Image.merge("RGBA", (*[L.point(lambda level: 255)] * 3, ALPHA)), [1, 0, 1, 1]),
    "CMYK": (RGB.convert("CMYK"), [0, 1, 0, 0]),
    "YCbCr": (RGB.convert("YCbCr"), [0, 1, 0, 0]),
    "HSV": (RGB.convert("HSV"), [0, 1, 0, 0]),
    "LAB": (RGB.convert("LAB"), [0, 1, 0, 0]),
    "I;16": (Image.fromarray(SIXTEEN), [0, 1, 0, 1]),
    "I": (Image.fromarray(SIXTEEN.astype(np.int32)), [0, 1, 0, 1]),
    "F": (one_channel([0.0, 1.0, 0.49, 0.5], np.float32), [0, 1, 0, 1]),
    "bool": (in_blocks([False, True, True, False])[..., 0], [0, 1, 1, 0]),
    "bool of one channel": (in_blocks([False, True, True, False]), [0, 1, 1, 0]),
    "uint8 of 0 and 1": (in_blocks([0, 1, 1, 0]).astype(np.uint8), [0, 1, 1, 0]),
    "int64 of 0 and 1": (in_blocks([0, 1, 1, 0]), [0, 1, 1, 0]),
    "uint8 of 0 and 255": (in_blocks([0, 255, 255, 0]).astype(np.uint8), [0, 1, 1, 0]),
    "float": (in_blocks([0.0, 0.4999, 0.5, 1.0]), [0, 0, 1, 1]),
    "float of three channels": (in_blocks(grey([0.0, 0.4999, 0.5, 1.0])), [0, 0, 1, 1]),
    "float by brightness": (in_blocks(COLOURS / 255.0), [0, 1, 0, 0]),
    "half size": (in_blocks([0, 1, 1, 0])[::2, ::2], [0, 1, 1, 0]),
    "other proportions": (in_blocks([0, 1, 1, 0]).repeat(3, axis=1), [0, 1, 1, 0]),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKS)
def test_mask(case):
    mask, expected = MASKS[case]
    result = images.to_mask(mask, 16, 16)
    assert result.dtype == np.float32 and result.shape == (1, 16, 16, 1)
    np.testing.assert_array_equal(result[0], in_blocks(expected))


def test_mask_of_an_odd_size_is_resized():
    left = np.zeros((33, 17))
    left[:, :7] = 1
    result = images.to_mask(left, 64, 48)
    assert set(np.unique(result)) == {0.0, 1.0}
    columns = result[0, :, :, 0].all(axis=0)
    assert columns[:19].all() and not columns[21:].any()


def test_one_mask_for_all_pictures_or_one_for_each():
    mask = in_blocks([0, 1, 1, 0])[..., 0]
    every = images.to_mask(mask, 16, 16, batch=3)
    assert every.shape == (3, 16, 16, 1)
    np.testing.assert_array_equal(every, every[:1].repeat(3, axis=0))
    each = images.to_mask([mask, 1 - mask], 16, 16, batch=2)
    np.testing.assert_array_equal(each[:1] + each[1:], np.ones((1, 16, 16, 1)))
    with pytest.raises(ValueError, match="one for each of 3 images. Received: 2 masks"):
        images.to_mask([mask, mask], 16, 16, batch=3)


def test_mask_that_repaints_nothing_is_warned_of():
    dark = np.full((8, 8), 2, np.uint8)
    with pytest.warns(UserWarning, match="`mask` 1, 2 of the batch repaints nothing.*white"):
        result = images.to_mask([np.ones((8, 8)), np.zeros((8, 8)), dark], 8, 8, batch=3)
    np.testing.assert_array_equal(result.mean(axis=(1, 2, 3)), [1, 0, 0])


def test_latent_mask_takes_the_upper_left_pixel():
    mask = np.zeros((2, 16, 24, 1), np.float32)
    mask[0, 8, 16] = 1
    mask[1, :9, 1:16] = 1
    result = images.latent_mask(mask)
    expected = [[[0, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 1, 0]]]
    np.testing.assert_array_equal(result[..., 0], expected)
    np.testing.assert_array_equal(images.latent_mask(mask, 1), mask)


def test_latent_mask_that_is_lost_is_warned_of():
    mask = np.zeros((3, 16, 16, 1), np.float32)
    mask[0] = 1
    mask[1, 3] = 1
    with pytest.warns(UserWarning, match="`mask` 1 of the batch .*too thin"):
        result = images.latent_mask(mask)
    assert result.sum() == 4


def test_latent_mask_refuses_what_the_autoencoder_cannot_make():
    with pytest.raises(ValueError, match="multiple of 8"):
        images.latent_mask(np.zeros((1, 16, 12, 1)))


def test_masked_image():
    image = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 2, 2, 3)
    mask = np.array([1, 0, 0.5, 0.49], np.float32).reshape(1, 2, 2, 1)
    result = images.masked_image(image, mask)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result[:, 0, 0], 0)
    np.testing.assert_array_equal(result[:, 1, 0], 0)
    np.testing.assert_array_equal(result[:, :, 1], image[:, :, 1])


def test_padding_repeats_the_edge_and_masks_the_borders():
    image, mask = images.pad_for_outpainting(RGB, left=8, top=16, right=24, bottom=32)
    assert image.dtype == np.uint8 and image.shape == (64, 48, 3)
    np.testing.assert_array_equal(image[16:32, 8:24], in_blocks(COLOURS))
    np.testing.assert_array_equal(image[:, :8], image[:, 8:9].repeat(8, axis=1))
    np.testing.assert_array_equal(image[32:], image[31:32].repeat(32, axis=0))
    np.testing.assert_array_equal(image[0, -1], COLOURS[1])
    assert mask.dtype == np.float32 and mask.shape == (64, 48)
    assert not mask[16:32, 8:24].any()
    assert mask.sum() == 64 * 48 - 16 * 16
    # What `inpaint` makes of both.
    np.testing.assert_array_equal(images.to_model(image).shape, (1, 64, 48, 3))
    np.testing.assert_array_equal(images.to_mask(mask, 64, 48)[0, ..., 0], mask)


def test_padding_keeps_the_batch_and_the_dtype():
    floats = np.random.RandomState(0).rand(2, 8, 8, 3).astype(np.float32)
    image, mask = images.pad_for_outpainting(floats, right=8)
    assert image.shape == (2, 8, 16, 3) and image.dtype == np.float32 and mask.shape == (8, 16)
    np.testing.assert_array_equal(image[:, :, :8], floats)
    assert images.pad_for_outpainting(floats[:1])[0].shape == (1, 8, 8, 3)
    assert images.pad_for_outpainting([RGB])[0].shape == (1, 16, 16, 3)
    assert images.pad_for_outpainting(np.zeros((5, 6)), top=3)[0].shape == (8, 6, 3)


@pytest.mark.parametrize("border", [{"left": -1}, {"top": 0.5}, {"right": "8"}, {"bottom": None}])
def test_padding_refuses(border):
    with pytest.raises(ValueError, match=f"`{[*border][0]}` must be a whole number"):
        images.pad_for_outpainting(RGB, **border)


def test_padding_refuses_several_sizes_and_too_large_ones():
    with pytest.raises(ValueError, match="must have one size"):
        images.pad_for_outpainting([RGB, np.zeros((8, 8))])
    with pytest.raises(ValueError, match="at most 64 megapixels"):
        images.pad_for_outpainting(RGB, left=10**12)


def test_preview_of_single_channels():
    latents = np.zeros((5, 1, 2, 4), np.float32)
    latents[np.arange(4), 0, 0, np.arange(4)] = 1.0
    result = images.preview(latents)
    assert result.dtype == np.uint8 and result.shape == (5, 1, 2, 3)
    # 127.5 + 127.5 * factor, by hand from the published factors.
    expected = [[171, 145, 136], [143, 179, 147], [87, 160, 154], [111, 104, 33], [128, 128, 128]]
    np.testing.assert_array_equal(result[:, 0, 0], expected)
    np.testing.assert_array_equal(result[:, 0, 1], 128)


def test_preview_of_another_family_takes_its_matrix():
    matrix = [[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]
    latents = np.array([1.0, 1.0]).reshape(1, 1, 1, 2)
    assert images.preview(latents, matrix=matrix)[0, 0, 0].tolist() == [255, 128, 0]
    with pytest.raises(ValueError, match=r"\(batch, height, width, 2\).*shape \(1, 1, 1, 4\)"):
        images.preview(np.zeros((1, 1, 1, 4)), matrix=matrix)


def test_preview_saturates_and_grows():
    result = images.preview(np.full((1, 2, 3, 4), [40.0, 40.0, 0.0, 0.0]), upscale=8)
    assert result.shape == (1, 16, 24, 3)
    assert (result == 255).all()


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (8, 8, 4), (1, 4, 8, 8)])
def test_preview_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="shape \\(batch, height, width, 4\\)"):
        images.preview(np.zeros(shape))


def test_slerp_by_hand():
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(images.slerp(x, y, 0.5), [half, half], rtol=0, atol=1e-7)
    third = images.slerp(x, y, [[0.0, 1 / 3, 1.0]])
    assert third.shape == (1, 3, 2) and third.dtype == np.float32
    expected = [[[1, 0], [np.sqrt(0.75), 0.5], [0, 1]]]
    np.testing.assert_allclose(third, expected, rtol=0, atol=1e-7)


def test_slerp_of_noise_stays_noise_and_ends_exactly():
    first, second = np.random.RandomState(0).randn(2, 64, 64, 4).astype(np.float32)
    path = images.slerp(first, second, np.linspace(0, 1, 5))
    np.testing.assert_array_equal(path[0], first)
    np.testing.assert_array_equal(path[-1], second)
    np.testing.assert_allclose(path.std(axis=(1, 2, 3)), 1.0, rtol=0, atol=0.02)


def test_slerp_goes_equal_arcs():
    ends = np.random.RandomState(0).randn(2, 3, 5)
    ends /= np.linalg.norm(ends, axis=(1, 2), keepdims=True)
    path = images.slerp(*ends, np.linspace(0, 1, 5)).reshape(5, -1)
    cosines = (path[1:] * path[:-1]).sum(axis=1)
    expected = np.cos(np.arccos((ends[0] * ends[1]).sum()) / 4)
    np.testing.assert_allclose(cosines, expected, rtol=0, atol=1e-6)


def test_slerp_of_nearly_parallel_arrays():
    x = np.array([1.0, 0.0])
    for angle in (0.0, 1e-9, 2e-6, 1e-4):
        y = np.array([np.cos(angle), np.sin(angle)])
        expected = [np.cos(angle / 4), np.sin(angle / 4)]
        np.testing.assert_allclose(images.slerp(x, y, 0.25), expected, rtol=1e-6, atol=1e-16)
    np.testing.assert_array_equal(images.slerp(x, 3 * x, 0.5), 2 * x)
    np.testing.assert_array_equal(images.slerp(0 * x, x, 0.5), x / 2)


def test_slerp_refuses():
    x = np.array([1.0, 0.0])
    with pytest.raises(ValueError, match="opposite directions"):
        images.slerp(x, -2 * x, 0.5)
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        images.slerp(x, np.ones(3), 0.5)
