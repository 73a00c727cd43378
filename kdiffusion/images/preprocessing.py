"""Crop and resize images of any size to the size of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from kdiffusion.images.reading import check_pixels, read, resize

_CROPS = ("center", "random")
_WHITE = 1.0
_MIDDLE = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocessing:
    """A crop and a resize of images, which keep their proportions.

    The largest part of the image that has the proportions of `height` and `width` is cut out,
    then resized by Pillow's bicubic filter, as in the training and evaluation of latent diffusion
    (CompVis/latent-diffusion, ldm/data/lsun.py). To compare a model with its training images,
    preprocess them in the same way.

    Args:
        height: int, in pixels.
        width: int, in pixels.
        crop: `"center"`, or `"random"` for a part at a random place.
        crop_share: float in (0, 1], the sides of the part as a share of the largest that fits. The
            first stages of latent diffusion cut 256 pixels from a side of 384: 2 / 3, random.
        flip: bool, whether images are mirrored at random, half of them.

    Raises:
        ValueError: If one of them is out of range.

    Example:

    ```python
    Preprocessing(256, 256)("portrait.jpg").shape  # (256, 256, 3)
    ```
    """

    height: int
    width: int
    crop: str = "center"
    crop_share: float = 1.0
    flip: bool = False

    def __post_init__(self):
        for name in ("height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(
                    f"`{name}` must be a whole number of pixels. Received: {name}={value!r}"
                )
        check_pixels(self.height, self.width, "`height` times `width`")
        if self.crop not in _CROPS:
            raise ValueError(f"`crop` must be one of {_CROPS}. Received: crop={self.crop!r}")
        if not isinstance(self.crop_share, (int, float)) or not 0.0 < self.crop_share <= 1.0:
            raise ValueError(
                f"`crop_share` must be above 0 and at most 1. Received: {self.crop_share!r}"
            )
        if not isinstance(self.flip, bool):
            raise ValueError(f"`flip` must be True or False. Received: flip={self.flip!r}")

    def __call__(self, image: Any, draws: Sequence[float] | np.ndarray = _MIDDLE) -> np.ndarray:
        """Read, crop and resize one image.

        Args:
            image: a PIL image, the path of a file or an array, see `images.to_model`. Transparent
                parts are laid over white, and the EXIF orientation is obeyed.
            draws: three random floats in [0, 1): the place of the part from top to bottom, from
                left to right, and the flip, which happens below one half. By default the part is
                in the middle and nothing is mirrored.

        Returns:
            (height, width, 3), uint8 for images of 8 bits, else float32 in [0, 1].

        Raises:
            ValueError: If it is no image, damaged, too large or has values out of range.
        """
        pixels = read(image, "image", _WHITE)
        if len(pixels) != 1:
            raise ValueError(f"One image was expected. Received: a batch of {len(pixels)}")
        part = np.ascontiguousarray(self._cut(pixels[0], draws))
        resized = resize(part, self.height, self.width, Image.Resampling.BICUBIC)
        return resized[:, ::-1] if self.flip and draws[2] < 0.5 else resized

    def _cut(self, pixels, draws):
        height, width = pixels.shape[:2]
        scale = min(height / self.height, width / self.width) * self.crop_share
        tall = min(max(round(self.height * scale), 1), height)
        wide = min(max(round(self.width * scale), 1), width)
        if self.crop == "center":
            top, left = (height - tall) // 2, (width - wide) // 2
        else:
            top = int(draws[0] * (height - tall + 1))
            left = int(draws[1] * (width - wide + 1))
        return pixels[top : top + tall, left : left + wide]
