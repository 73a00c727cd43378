"""Read images of every kind: PIL images of any mode, files, and arrays.

All are turned upright by their EXIF tag, converted to sRGB if they carry another colour profile,
and laid over a background where they are transparent. Images of 16 bits and of floats keep their
precision. An input that can be understood in two ways is refused.
"""

from __future__ import annotations

import io
import os
import re
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

MAX_PIXELS = 64_000_000

# EPS is left out, because Pillow hands it to Ghostscript, and so are formats that are hardly used.
_FORMATS = "AVIF BMP GIF HEIF ICO JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP".split()

# The beginnings of files that are no images, and advice for each.
_IMPOSTORS = (
    (rb"\Z", "The file is empty: download or save it again."),
    (rb"\s*<(!doctype html|html)", "It is a web page: download the image itself."),
    (rb"\s*<(\?xml|!doctype svg|svg)", "It is an SVG or XML document: export it as PNG."),
    (rb"%(!PS|PDF)", "It is a PostScript or PDF document: export it as PNG."),
    (rb"version https://git-lfs", "It is a pointer of Git LFS: run `git lfs pull`."),
    (rb"", "It is damaged, cut short or of an unknown kind: save it as PNG again."),
)


def read(images: Any, name: str, background: float) -> list[np.ndarray]:
    """Read one image or several.

    Args:
        images: see `kdiffusion.images.to_model`.
        name: name of the argument, for errors.
        background: float from 0, black, to 1, white; the colour behind transparent parts.

    Returns:
        One array of shape (height, width, 3) for each image, uint8 or float32 in [0, 1].

    Raises:
        ValueError: If something is no image, damaged, too large or has values out of range.
    """
    if not isinstance(images, (list, tuple)):
        return _read_one(images, f"`{name}`", background)
    if not images:
        raise ValueError(f"`{name}` must hold at least one image. Received: an empty list")
    arrays = []
    for i, image in enumerate(images):
        arrays += _read_one(image, f"`{name}[{i}]`", background)
    return arrays


def resize(
    image: np.ndarray,
    height: int,
    width: int,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """Resize an image that `read` returned; by default as diffusers resizes PIL images."""
    if image.shape[:2] == (height, width):
        return image
    size = width, height
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(size, resample))
    channels = [Image.fromarray(np.ascontiguousarray(c)) for c in np.moveaxis(image, -1, 0)]
    resized = [channel.resize(size, resample) for channel in channels]
    return np.clip(np.stack([np.asarray(channel) for channel in resized], axis=-1), 0.0, 1.0)


def to_unit(image: np.ndarray) -> np.ndarray:
    """Convert an image that `read` returned to float32 in [0, 1]."""
    return image.astype(np.float32) / 255.0 if image.dtype == np.uint8 else image


def check_pixels(height: int, width: int, name: str) -> None:
    """Check a size before memory is allocated for it."""
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"{name} must have at most {MAX_PIXELS // 10**6} megapixels. "
            f"Received: {height} x {width} pixels. Make it smaller."
        )


def _read_one(image, name, background):
    if isinstance(image, (str, os.PathLike)):
        image, name = _open(image, name)
    if isinstance(image, Image.Image):
        image = _pixels(_upright(image, name), name)
    elif not hasattr(image, "__array__"):
        raise ValueError(
            f"{name} must be a PIL image, the path of a file, an array or a list of these. "
            f"Received: {type(image).__name__}"
        )
    batch = _intensities(_batch(np.asarray(image), name), name)
    if batch.shape[-1] == 4:
        batch = _lay_over(batch, background)
    return list(np.broadcast_to(batch, (*batch.shape[:3], 3)))


def _open(path, name):
    """Return the upright image of a file, and its name in errors."""
    path = os.fsdecode(path)
    shown = f"{name}, {path[:200]!r},"
    if not os.path.isfile(path):
        address = re.match(r"\w\w+:", path)
        fix = "Addresses are not opened: download the image." if address else "Check the path."
        raise ValueError(f"{shown} is not a file. {fix}")
    Image.init()
    try:
        image = Image.open(path, formats=[f for f in _FORMATS if f in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{shown} has too many pixels. Make it smaller. ({error})") from error
    # Readers of malformed files raise exceptions of any kind, here and below.
    except Exception as error:
        raise ValueError(f"{shown} cannot be opened. {_advice(path)} ({error})") from error
    with image:
        return _upright(image, shown), shown


def _advice(path):
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return "Check its permissions."
    return next(advice for start, advice in _IMPOSTORS if re.match(start, head, re.IGNORECASE))


def _upright(image, name):
    """Load a copy of an image, turned as its EXIF tag says."""
    check_pixels(image.height, image.width, name)
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be decoded: it is damaged or cut short. Download or save it again. "
            f"({error})"
        ) from error


def _pixels(image, name):
    """Return the array of a PIL image, with one, three or four channels."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":
        return _wide_integers(np.asarray(image), name)
    if image.mode == "F":
        return np.asarray(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data or image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = _to_srgb(image)
    return np.asarray(image if image.mode == "RGBA" else image.convert("RGB"))


def _wide_integers(array, name):
    """Convert mode I, which older versions of Pillow use for files of 16 bits."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > 65535 or 0 < high < 256:
        raise ValueError(
            f"{name} of mode I must have values from 0 to 65535, 16 bits. "
            f"Received: values from {low} to {high}. Use `convert('L')` if they are of 8 bits."
        )
    return array.astype(np.uint16)


def _to_srgb(image):
    """Convert an image to sRGB, if it has a readable profile of other colours."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        # Conversion from sRGB to itself would round for nothing.
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image
        target = ImageCms.createProfile("sRGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, source, target, outputMode=mode)
    # Unreadable profiles are common, and viewers ignore them. Pillow may lack ImageCms.
    except (ImageCms.PyCMSError, OSError, ValueError, ImportError):
        return image


def _batch(array, name):
    """Return the array as (batch, height, width, channels), with 1, 3 or 4 channels."""
    shape = array.shape
    batch = array[..., None] if array.ndim == 2 else array
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim == 4 and batch.size and batch.shape[-1] in (1, 3, 4):
        check_pixels(batch.shape[1], batch.shape[2], name)
        return batch
    if array.ndim in (3, 4) and shape[-3] in (1, 3, 4):
        fix = "Its channels come first: use `np.moveaxis(array, -3, -1)`."
    elif 0 in shape:
        fix = "It is empty."
    else:
        fix = "Use `array[..., None]` for a batch of grey images."
    raise ValueError(
        f"{name} must have the shape (height, width), (height, width, channels) or (batch, "
        f"height, width, channels), with 1, 3 or 4 channels. Received: shape {shape}. {fix}"
    )


def _intensities(array, name):
    """Convert values to uint8, or to float32 in [0, 1]."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.newbyteorder("=") == np.uint16:
        return array.astype(np.float32) / 65535.0
    if array.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} must be bool, uint8, uint16 or float. Received: dtype {array.dtype}. "
            "Use `astype`."
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite. Received: NaN or infinite values")
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind in "iu":
        _check_range(name, array.dtype, low, high, 255, 0, "Use `astype('uint16')` for 16 bits.")
        return array.astype(np.uint8)
    fix = "Use `array / 2 + 0.5`." if -1.0 <= low < 0.0 and high <= 1.0 else "Use `array / 255`."
    # The tolerance is half a step of 8 bits: resizes and half precision round.
    _check_range(name, array.dtype, low, high, 1, 0.5 / 255, fix)
    return np.clip(array.astype(np.float32), 0.0, 1.0)


def _check_range(name, dtype, low, high, top, tolerance, fix):
    if low < -tolerance or high > top + tolerance:
        raise ValueError(
            f"{name} of dtype {dtype} must have values from 0 to {top}. "
            f"Received: values from {low:g} to {high:g}. {fix}"
        )


def _lay_over(batch, background):
    """Lay images with an alpha channel over a grey background."""
    top = 255.0 if batch.dtype == np.uint8 else 1.0
    share = batch[..., 3:].astype(np.float32) / top
    mixed = batch[..., :3] * share + background * top * (1.0 - share)
    return np.rint(mixed).astype(np.uint8) if batch.dtype == np.uint8 else mixed
