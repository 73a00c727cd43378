"""Convert images and masks to arrays for networks, and latents and arrays to images."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from PIL import Image

from kdiffusion.images.reading import check_pixels, read, resize, to_unit

# Transparent pixels hold arbitrary colours. Most images are made to be seen on a white page, and
# AUTOMATIC1111's default is white, too. In a mask, parts that nobody painted on are kept.
_WHITE, _BLACK = 1.0, 0.0

_SMALL_ANGLE = 1e-6

# By K. Turner and torridgristle for Stable Diffusion 1.5, also used by InvokeAI:
# https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204
_LATENTS_TO_RGB = np.array(
    [
        [0.3444, 0.1385, 0.0670],
        [0.1247, 0.4027, 0.1494],
        [-0.3192, 0.2513, 0.2103],
        [-0.1307, -0.1874, -0.7445],
    ],
    np.float32,
)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert the output of a decoder to pixels, rounded.

    Args:
        images: float array of any shape, nominally in [-1, 1].

    Returns:
        uint8 array of the same shape.
    """
    images = np.clip(np.asarray(images, np.float32) * 0.5 + 0.5, 0.0, 1.0)
    return np.rint(images * 255.0).astype(np.uint8)


def check_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Check that the autoencoder can make images of a size; it is never rounded silently.

    Args:
        height: int, in pixels.
        width: int, in pixels.
        multiple: int, the autoencoder's downsampling factor.

    Returns:
        Height and width as plain ints.

    Raises:
        ValueError: If one of them is not a positive multiple of `multiple`.
    """
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or value != int(value) or value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ValueError(
                f"`{name}` must be a positive multiple of {multiple}. Received: {name}={value}. "
                f"Use {nearest}."
            )
    return int(height), int(width)


def to_model(
    image: Any, height: int | None = None, width: int | None = None, multiple: int = 8
) -> np.ndarray:
    """Convert images to the inputs of the image encoder.

    They are turned upright by their EXIF tag, converted to sRGB if they carry another colour
    profile, and resized by Lanczos' filter, without keeping proportions.

    Args:
        image: a PIL image (the frame at which it stands), the path of a local file, or an array of
            shape (height, width), (height, width, 1 | 3 | 4) or (batch, height, width, channels),
            or a list of these. Arrays are bool, uint8 or another integer dtype from 0 to 255,
            uint16 from 0 to 65535, or float from 0 to 1. Transparent images are laid over white.
        height: int, in pixels, a multiple of `multiple`; `None` for the image's own height,
            rounded down to a multiple of `multiple`, but not to 0.
        width: int, likewise.
        multiple: int, the autoencoder's downsampling factor.

    Returns:
        (batch, height, width, 3) float32 in [-1, 1].

    Raises:
        ValueError: If something is no image, damaged, larger than 64 megapixels, or has values
            out of range, or images of several sizes are given without a size.

    Example:

    ```python
    to_model("portrait.jpg", 768, 512).shape  # (1, 768, 512, 3)
    ```
    """
    arrays = read(image, "image", _WHITE)
    if height is None or width is None:
        sizes = {array.shape[:2] for array in arrays}
        if len(sizes) > 1:
            raise ValueError(
                f"Images of several sizes need `height` and `width`. Received: {sorted(sizes)}"
            )
        own = [max(multiple, side - side % multiple) for side in arrays[0].shape[:2]]
        height, width = own[0] if height is None else height, own[1] if width is None else width
    height, width = check_size(height, width, multiple)
    check_pixels(height, width, "`height` times `width`")
    return 2.0 * np.stack([to_unit(resize(array, height, width)) for array in arrays]) - 1.0


def to_mask(mask: Any, height: int, width: int, batch: int = 1) -> np.ndarray:
    """Convert masks of what to repaint to zeros and ones.

    A colour becomes 1 if its brightness is at least one half, as in diffusers. Transparent parts
    become 0. Integers up to 1 are taken as zeros and ones, not as black. A mask that repaints
    nothing is allowed, with a warning.

    Args:
        mask: anything that `to_model` reads as an image; white, 1 and `True` mean repaint.
        height: int, of the image; the mask is resized to it.
        width: int, likewise.
        batch: int, how many images there are; a single mask serves for all of them.

    Returns:
        (batch, height, width, 1) float32 of zeros and ones.

    Raises:
        ValueError: See `to_model`, or if there are neither one nor `batch` masks.
    """
    masks = read(mask, "mask", _BLACK)
    if len(masks) not in (1, batch):
        raise ValueError(
            f"`mask` must hold one mask or one for each of {batch} images. "
            f"Received: {len(masks)} masks"
        )
    masks = [255 * m if m.dtype == np.uint8 and m.max() == 1 else m for m in masks]
    grey = np.stack([_grey(resize(m, height, width)) for m in masks])
    binary = (grey >= 0.5).astype(np.float32)[..., None]
    _warn_of_empty(~_painted(binary), "no pixel reaches one half; white is what to repaint")
    return np.repeat(binary, batch // len(masks), axis=0)


def latent_mask(mask: np.ndarray, factor: int = 8) -> np.ndarray:
    """Resize masks to the size of latents; each value is that of its upper left pixel.

    This is the nearest-neighbour choice of `torch.nn.functional.interpolate` in diffusers. A mask
    that is lost because it is too thin causes a warning.

    Args:
        mask: (batch, height, width, 1), see `to_mask`; height and width are multiples of `factor`.
        factor: int, the autoencoder's downsampling factor.

    Returns:
        (batch, height / factor, width / factor, 1) array.

    Raises:
        ValueError: If the size is not a multiple of `factor`.
    """
    height, width = mask.shape[1:3]
    check_size(height, width, factor)
    small = np.ascontiguousarray(mask[:, ::factor, ::factor])
    lost = _painted(mask) & ~_painted(small)
    _warn_of_empty(lost, f"it is too thin for latents of {factor} x {factor} pixels; grow it")
    return small


def masked_image(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Make images grey where they will be repainted, as inputs of inpainting networks.

    Args:
        image: (batch, height, width, 3) float32 in [-1, 1].
        mask: (batch, height, width, 1), 1 = repaint.

    Returns:
        (batch, height, width, 3) float32 in [-1, 1], 0 under the mask.
    """
    return image * (mask < 0.5)


def pad_for_outpainting(
    image: Any, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Add borders to an image, and make the mask that lets `inpaint` fill them.

    The borders repeat the image's outermost pixels, so that a strength below 1 starts from its
    colours. If the borders and the image's own size are multiples of 8, the edge of the mask lies
    between latents and the image need not be resized.

    Args:
        image: anything that `to_model` reads; images of a list must have one size.
        left, top, right, bottom: int, in pixels, not negative.

    Returns:
        The image, (height, width, 3), and the mask, (height, width) float32, 1 in the borders.
        Several images, (batch, height, width, 3), share one mask. Images of 8 bits are uint8,
        others float32 in [0, 1].

    Raises:
        ValueError: See `to_model`, or if a border is negative or no whole number.

    Example:

    ```python
    image, mask = pad_for_outpainting("portrait.png", left=128, right=128)
    images = model.inpaint(image, mask, "a wide landscape")
    ```
    """
    for name, value in (("left", left), ("top", top), ("right", right), ("bottom", bottom)):
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(
                f"`{name}` must be a whole number of pixels, 0 or more. Received: {name}={value}"
            )
    arrays = read(image, "image", _WHITE)
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"Images to pad must have one size. Received: {sorted(shapes)}")
    height, width = arrays[0].shape[:2]
    check_pixels(top + height + bottom, left + width + right, "The padded `image`")
    border = ((top, bottom), (left, right))
    mask = np.pad(np.zeros((height, width), np.float32), border, constant_values=1.0)
    padded = [np.pad(array, (*border, (0, 0)), mode="edge") for array in arrays]
    one = not isinstance(image, (list, tuple)) and getattr(image, "ndim", 0) != 4
    return padded[0] if one else np.stack(padded), mask


def preview(latents: np.ndarray, upscale: int = 1, matrix: np.ndarray | None = None) -> np.ndarray:
    """Estimate the images of latents in microseconds, by one matrix product for each pixel.

    Args:
        latents: (batch, height, width, channels) float, denoised.
        upscale: int, factor of the size; 1 gives one pixel for each latent.
        matrix: (channels, 3) float, from latents to RGB in [-1, 1]; `None` for that of Stable
            Diffusion 1.x and 2.x, of 4 channels.

    Returns:
        (batch, upscale * height, upscale * width, 3) uint8.

    Raises:
        ValueError: If latents and matrix have different channels.
    """
    latents = np.asarray(latents, np.float32)
    matrix = _LATENTS_TO_RGB if matrix is None else np.asarray(matrix, np.float32)
    if latents.ndim != 4 or latents.shape[-1] != len(matrix):
        raise ValueError(
            f"`latents` must have the shape (batch, height, width, {len(matrix)}), the channels of "
            f"`matrix`, by default those of Stable Diffusion 1.x and 2.x. Received: shape "
            f"{latents.shape}. Use the matrix of the latents' model, or decode them."
        )
    images = to_uint8(latents @ matrix)
    height, width = (upscale * side for side in images.shape[1:3])
    return np.stack([resize(image, height, width) for image in images])


def slerp(first: np.ndarray, second: np.ndarray, share: Any) -> np.ndarray:
    """Interpolate noise along the arc between two draws, so that it stays unit noise.

    Values on the straight line have too small a variance. Each array counts as one vector
    (Shoemake 1985, "Animating rotation with quaternion curves", section 3.3).

    Args:
        first: array of any shape, such as the unit noise of one image.
        second: array of the same shape.
        share: float, or an array of them, from 0, `first`, to 1, `second`.

    Returns:
        float32 array of the arrays' shape, after the axes of `share` if it has any.

    Raises:
        ValueError: If the shapes differ or the arrays point in exactly opposite directions, where
            no arc is the shortest.

    Example:

    ```python
    noise = slerp(first, second, np.linspace(0, 1, 9))  # (9, 64, 64, 4)
    images = model.generate_image(encoded_text, batch_size=9, diffusion_noise=noise)
    ```
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"Both arrays must have one shape. Received: shapes {first.shape} and {second.shape}"
        )
    angle = _angle(first, second)
    if np.pi - angle < _SMALL_ANGLE:
        raise ValueError(
            "The arrays point in opposite directions, so that many arcs join them. "
            "Received: an angle of 180 degrees. Interpolate by way of a third array."
        )
    share = np.asarray(share, np.float64).reshape(np.shape(share) + (1,) * first.ndim)
    near, far = 1.0 - share, share
    # On short arcs the straight line is exact to rounding, and the sines are too small to divide.
    if angle > _SMALL_ANGLE:
        near, far = np.sin(near * angle) / np.sin(angle), np.sin(far * angle) / np.sin(angle)
    return (near * first + far * second).astype(np.float32)


def _angle(first, second):
    """Return the angle between two vectors, exact even if nearly parallel (Kahan 2006)."""
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    if not all(lengths):
        return 0.0
    first, second = first / lengths[0], second / lengths[1]
    return 2.0 * np.arctan2(np.linalg.norm(first - second), np.linalg.norm(first + second))


def _grey(image):
    """Return brightness from 0 to 1, by ITU-R 601 as in Pillow."""
    if image.dtype == np.uint8:
        return to_unit(np.asarray(Image.fromarray(image).convert("L")))
    red, green, blue = np.moveaxis(image, -1, 0)
    # Differences keep grey exactly as it is.
    return red + np.float32(0.587) * (green - red) + np.float32(0.114) * (blue - red)


def _painted(masks):
    return np.any(masks, axis=(1, 2, 3))


def _warn_of_empty(empty, reason):
    if empty.any():
        shown = ", ".join(map(str, np.flatnonzero(empty)))
        warnings.warn(f"`mask` {shown} of the batch repaints nothing: {reason}.", stacklevel=4)
