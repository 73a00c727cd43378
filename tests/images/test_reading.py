"""Reading pictures: one row of a table for each mode, dtype and fault."""

import io
import zlib

import numpy as np
import pytest
from picture_blocks import (
    ALPHA,
    COLOURS,
    GREYS,
    LA_COLOURS,
    RGB,
    RGBA,
    RGBA_COLOURS,
    RGBA_EXACT,
    SECOND_IS_WHITE,
    SIXTEEN,
    SIXTEEN_COLOURS,
    SOFT,
    L,
    blocks,
    grey,
    in_blocks,
    one_channel,
)
from PIL import Image, ImageCms

from kdiffusion import images


def with_alpha(image):
    image.putalpha(ALPHA)
    return image


def with_transparent_colour(image):
    image = image.copy()
    image.info["transparency"] = image.getpixel((8, 0))
    return image


MODES = {
    "1": (one_channel([0, 0, 255, 255]).convert("1"), grey([0, 0, 255, 255]), 0),
    "L": (L, grey(GREYS), 0),
    "LA": (Image.merge("LA", (L, ALPHA)), LA_COLOURS, 0),
    "La": (Image.merge("LA", (L, ALPHA)).convert("La"), LA_COLOURS, 1),
    "P": (RGB.quantize(4), COLOURS, 0),
    "P with transparency": (with_transparent_colour(RGB.quantize(4)), SECOND_IS_WHITE, 0),
    "L with transparency": (with_transparent_colour(L), grey([0, 255, 128, 255]), 0),
    "RGB with transparency": (with_transparent_colour(RGB), SECOND_IS_WHITE, 0),
    "PA": (with_alpha(RGB.quantize(4)), RGBA_COLOURS, 0),
    "RGB": (RGB, COLOURS, 0),
    "RGBX": (RGB.convert("RGBX"), COLOURS, 0),
    "RGBA": (RGBA, RGBA_COLOURS, 0),
    "RGBa": (RGBA.convert("RGBa"), RGBA_COLOURS, 1),
    "CMYK": (RGB.convert("CMYK"), COLOURS, 0),
    "YCbCr": (RGB.convert("YCbCr"), COLOURS, 2),
    "LAB": (Image.fromarray(in_blocks(SOFT)).convert("LAB"), SOFT, 3),
    "HSV": (RGB.convert("HSV"), COLOURS, 2),
    "I": (Image.fromarray(SIXTEEN.astype(np.int32)), SIXTEEN_COLOURS, 0),
    "I;16": (Image.fromarray(SIXTEEN), SIXTEEN_COLOURS, 0),
    "I;16B": (Image.frombytes("I;16B", (16, 16), SIXTEEN.astype(">u2")), SIXTEEN_COLOURS, 0),
    "F": (one_channel([0, 1, 0.25, 0.5], np.float32),
          grey([0, 255, 63.75, 127.5]), 0),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_mode(mode):
    image, colours, tolerance = MODES[mode]
    assert image.mode == mode.split()[0]
    before = image.tobytes()
    found = blocks(images.to_model(image))
    np.testing.assert_allclose(found, colours, rtol=0, atol=tolerance + 1e-4)
    assert image.tobytes() == before


ARRAYS = {
    "uint8, two axes": (in_blocks(GREYS)[..., 0], grey(GREYS)),
    "uint8, one channel": (in_blocks(GREYS), grey(GREYS)),
    "uint8, three channels": (in_blocks(COLOURS), COLOURS),
    "uint8, four channels": (np.asarray(RGBA), RGBA_COLOURS),
    "uint8, batch": (in_blocks(COLOURS)[None], COLOURS),
    "bool": (in_blocks([False, True, True, False]), grey([0, 255, 255, 0])),
    "int64": (in_blocks(COLOURS).astype(np.int64), COLOURS),
    "uint16": (SIXTEEN, SIXTEEN_COLOURS),
    "uint16, big endian": (SIXTEEN.astype(">u2"), SIXTEEN_COLOURS),
    "float16": (in_blocks([0.0, 1.0, 0.25, 0.5]).astype(np.float16), grey([0, 255, 63.75, 127.5])),
    "float32": (in_blocks(COLOURS / np.float32(255)), COLOURS),
    "float64": (in_blocks(COLOURS / 255.0), COLOURS),
    "float, four channels": (np.asarray(RGBA) / 255.0, RGBA_EXACT),
    "float, rounding outside": (in_blocks([-0.001, 1.001, 0.0, 1.0]), grey([0, 255, 0, 255])),
    "not contiguous": (in_blocks(COLOURS)[::-1], COLOURS[[2, 3, 0, 1]]),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_array(case):
    array, colours = ARRAYS[case]
    np.testing.assert_allclose(blocks(images.to_model(array)), colours, rtol=0, atol=1e-4)


SQUARE = np.zeros((8, 8, 3), np.float32)
FAULTS = {
    "nothing": (None, "path of a file, an array or a list of these. Received: NoneType"),
    "empty list": ([], "at least one image"),
    "list in a list": ([[SQUARE]], r"`image\[0\]` must be .* Received: list"),
    "second of a list": ([SQUARE, 3], r"`image\[1\]` must be"),
    "bytes": (b"\x89PNG", "Received: bytes"),
    "NaN": (SQUARE * np.nan, "must be finite"),
    "infinite": (SQUARE + np.inf, "must be finite"),
    "floats to 255": (SQUARE + 255, r"from 0 to 1\. .* from 255 to 255\. Use `array / 255`"),
    "floats from -1": (SQUARE - 1, r"from -1 to -1\. Use `array / 2 \+ 0.5`"),
    "mode F to 255": (L.convert("F"), r"Use `array / 255`"),
    "mode I of 8 bits": (L.convert("I"), r"from 0 to 255\. Use `convert\('L'\)`"),
    "mode I below 0": (Image.new("I", (8, 8), -1), "from -1 to -1"),
    "mode I over 16 bits": (Image.new("I", (8, 8), 65536), "from 65536 to"),
    "int64 over 8 bits": (np.full((8, 8), 256), r"from 0 to 255\. .* `astype\('uint16'\)`"),
    "int64 below 0": (np.full((8, 8), -1), "from -1 to -1"),
    "complex": (np.zeros((8, 8), complex), "dtype complex128"),
    "text": (np.array([["a"]]), "dtype <U1"),
    "objects": (np.array([[None]]), "dtype object"),
    "channels first": (np.zeros((3, 8, 9)), r"use `np.moveaxis\(array, -3, -1\)`"),
    "batch with channels first": (np.zeros((2, 3, 8, 9)), r"np.moveaxis\(array, -3, -1\)"),
    "grey batch": (np.zeros((2, 8, 9)), r"shape \(2, 8, 9\)\. Use `array\[..., None\]`"),
    "latents with five channels": (np.zeros((8, 8, 5)), "with 1, 3 or 4 channels"),
    "one axis": (np.zeros(8), r"shape \(8,\)"),
    "no axis": (np.float32(1), r"shape \(\)"),
    "five axes": (np.zeros((1, 1, 8, 8, 3)), r"shape \(1, 1, 8, 8, 3\)"),
    "no rows": (np.zeros((0, 8, 3)), "It is empty"),
    "no pictures": (np.zeros((0, 8, 8, 3)), "It is empty"),
    "no pixels": (Image.new("RGB", (0, 8)), "It is empty"),
    "no pixels, mode I": (Image.new("I", (0, 8)), "It is empty"),
    "array too large": (np.broadcast_to(np.uint8(0), (8001, 8000)), "at most 64 megapixels"),
    "image too large": (Image.new("1", (8001, 8000)), "8000 x 8001 pixels"),
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("name", ["image", "mask"])
def test_fault(name, case):
    picture, message = FAULTS[case]
    with pytest.raises(ValueError, match=message.replace("`image", f"`{name}")) as error:
        images.to_model(picture) if name == "image" else images.to_mask(picture, 8, 8)
    assert str(error.value).startswith(f"`{name}")


def test_several_sizes():
    with pytest.raises(ValueError, match="need `height` and `width`"):
        images.to_model([SQUARE, np.zeros((8, 16))])


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (0, 8), (-8, 8), (8.5, 8), (True, 8)])
def test_sizes_are_not_rounded(size):
    with pytest.raises(ValueError, match="positive multiple of 8"):
        images.to_model(L, *size)


def test_size_too_large():
    with pytest.raises(ValueError, match="at most 64 megapixels"):
        images.to_model(L, 8008, 8000)


@pytest.mark.parametrize(
    "shape, size, expected",
    [
        ((1, 1), {}, (8, 8)),
        ((1, 8000), {}, (8, 8000)),
        ((23, 17), {}, (16, 16)),
        ((23, 17), {"multiple": 4}, (20, 16)),
        ((23, 17), {"height": 64}, (64, 16)),
        ((23, 17), {"width": 64}, (16, 64)),
        ((23, 17), {"height": 8, "width": 24}, (8, 24)),
    ],
)
def test_size(shape, size, expected):
    batch = images.to_model(np.full(shape, 77), **size)
    assert batch.shape == (1, *expected, 3)
    np.testing.assert_allclose(batch, 77 / 127.5 - 1.0, rtol=0, atol=1e-6)


def test_a_list_is_a_batch():
    grey_array = np.asarray(L.resize((24, 8)))
    batch = images.to_model([RGB, grey_array, np.stack([in_blocks(COLOURS)] * 2)], 16, 16)
    assert batch.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(batch[2:], batch[:1].repeat(2, axis=0))
    np.testing.assert_array_equal(batch[1:2], images.to_model(grey_array, 16, 16))


def test_resizing_of_floats_is_that_of_bytes():
    array = np.random.RandomState(0).randint(64, 192, (40, 50, 3)).astype(np.uint8)
    exact, rounded = images.to_model(array / 255.0, 64, 24), images.to_model(array, 64, 24)
    np.testing.assert_allclose(exact, rounded, rtol=0, atol=1.5 / 127.5)


def test_resizing_of_floats_stays_in_range():
    batch = images.to_model(np.tile([[0.0, 0.0, 1.0, 1.0]], (8, 4)), 64, 64)
    assert batch.min() == -1.0 and batch.max() == 1.0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    RGB.save(path, exif=exif)
    # By the EXIF standard, what 1 to 8 ask for.
    turns = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1),
        lambda a: np.rot90(a, -1),
        lambda a: a[::-1, ::-1].swapaxes(0, 1),
        lambda a: np.rot90(a),
    ]
    expected = turns[orientation - 1](in_blocks(COLOURS))
    for image in (path, Image.open(path)):
        batch = images.to_model(image)
        np.testing.assert_array_equal(batch[0], expected / np.float32(127.5) - 1.0)


def test_first_frame_of_a_file_and_present_frame_of_an_image(tmp_path):
    frames = [Image.new("L", (8, 8), level) for level in (255, 0, 128)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert images.to_model(tmp_path / "moving.gif").mean() == 1.0
    with Image.open(tmp_path / "moving.gif") as image:
        image.seek(1)
        assert images.to_model(image).mean() == -1.0
        assert image.tell() == 1


def profile_with_red_for_blue(name):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_profile_is_heeded(mode):
    image, expected = {"RGB": (RGB, COLOURS), "RGBA": (RGBA, RGBA_COLOURS)}[mode]
    image, expected = image.copy(), np.asarray(expected)[:, ::-1]
    image.info["icc_profile"] = profile_with_red_for_blue("bgrR")
    np.testing.assert_allclose(blocks(images.to_model(image)), expected, rtol=0, atol=2)


@pytest.mark.parametrize("profile", [b"nonsense", profile_with_red_for_blue("sRGB")])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA"])
def test_colour_profile_of_that_name_or_of_no_sense_is_left(profile, mode):
    image = RGB.convert(mode)
    expected = images.to_model(image)
    image.info["icc_profile"] = profile
    np.testing.assert_array_equal(images.to_model(image), expected)


def png():
    buffer = io.BytesIO()
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def promising_png(side):
    """A damaged file whose header tells of as many rows and columns."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + png()[24:29]
    return png()[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png()[33:]


def saved(kind, **options):
    buffer = io.BytesIO()
    RGB.save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {
    "empty": (b"", "file is empty"),
    "page.png": (b"<!DOCTYPE html><html>", "web page"),
    "page2.png": (b"\n <HTML><body>", "web page"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "drawing2.png": (b"<?xml version='1.0'?><svg/>", "SVG"),
    "figure.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "PostScript"),
    "paper.png": (b"%PDF-1.7", "PDF"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs pull"),
    "noise.png": (b"\x93\x11\x84\x05" * 64, "of an unknown kind"),
    "header.png": (png()[:20], "of an unknown kind"),
    "cut.png": (png()[:-2000], "damaged.* cut short"),
    "cut.jpg": (saved("JPEG")[:-100], "damaged.* cut short"),
    "flipped.png": (png().replace(b"IDAT", b"IDAT\0\0\0\0"), "damaged.* cut short"),
    "checksum.png": (png()[:29] + b"\0\0\0\0" + png()[33:], "cannot be opened"),
    "huge.png": (promising_png(40_000), "pixels. Make it smaller"),
    "large.png": (promising_png(9_000), "at most 64 megapixels"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_that_cannot_be_read(name, tmp_path):
    data, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        images.to_model([path])
    assert name in str(error.value)
    assert "`image[0]`" in str(error.value)


@pytest.mark.parametrize(
    "path, message",
    [
        ("https://example.org/cat.png", "Addresses are not opened"),
        ("FILE:///etc/passwd", "Addresses are not opened"),
        ("data:image/png;base64," + "A" * 10**6, "Addresses are not opened"),
        ("missing.png", "is not a file. Check the path"),
        ("nul\0.png", "is not a file"),
        (".", "is not a file"),
        ("/dev/zero", "is not a file"),
    ],
)
def test_path_that_is_no_file(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        images.to_model(path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "PPM", "TGA", "WEBP", "JPEG2000"])
def test_file_format(kind, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(saved(kind, **({"lossless": True} if kind == "WEBP" else {})))
    for given in (path, str(path)):
        np.testing.assert_allclose(blocks(images.to_model(given)), COLOURS, rtol=0, atol=1e-4)


def test_jpeg(tmp_path):
    (tmp_path / "picture.jpg").write_bytes(saved("JPEG", quality=100, subsampling=0))
    batch = images.to_model(tmp_path / "picture.jpg")
    np.testing.assert_allclose(batch[0], in_blocks(COLOURS) / 127.5 - 1, rtol=0, atol=4 / 127.5)


def test_truncated_image_that_was_opened_lazily():
    with Image.open(io.BytesIO(png()[:-2000])) as image:
        with pytest.raises(ValueError, match="`image` cannot be decoded.*cut short"):
            images.to_model(image)


def test_nothing_of_the_callers_array_is_changed():
    for array in (in_blocks(COLOURS), in_blocks(COLOURS / 255.0).astype(np.float32)):
        before = array.copy()
        batch = images.to_model(array)
        batch += 1.0
        images.to_mask(array, 16, 16)[:] = 7.0
        np.testing.assert_array_equal(array, before)
