"""From a picture of any size to the part of it that a network is shown, at the network's size."""

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
    """Crops and resizes pictures, keeping their proportions.

    The largest part of the picture that has the proportions of `height` and `width` is cut out,
    then resized by Pillow's bicubic filter: what latent diffusion (CompVis/latent-diffusion,
    ldm/data/lsun.py) and its evaluation do. Whoever compares a model with its training pictures
    has to give them to it in the same way.

    Args:
        height: int, in pixels.
        width: int, in pixels.
        crop: `"center"`, or `"random"` for a part that is drawn anew each time.
        crop_share: float in (0, 1], the sides of the part as a share of the largest that fits. The
            first stages of latent diffusion cut 256 pixels from a side of 384: 2 / 3, random.
        flip: bool, whether half of the pictures are mirrored, as drawn.

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

    def __call__(self, picture: Any, draws: Sequence[float] | np.ndarray = _MIDDLE) -> np.ndarray:
        """Read, crop and resize one picture.

        Args:
            picture: a PIL image, the path of a file or an array, see `images.to_model`. Transparent
                parts are laid over white, and the EXIF orientation is obeyed.
            draws: three floats in [0, 1): where the part is from top to bottom and from left to
                right, and the flip, which happens below one half. Without them the part is in the
                middle, and nothing is mirrored.

        Returns:
            (height, width, 3), uint8 for pictures of 8 bits, else float32 in [0, 1].

        Raises:
            ValueError: If it is no picture, damaged, too large or has values out of range.
        """
        pixels = read(picture, "image", _WHITE)
        if len(pixels) != 1:
            raise ValueError(f"One picture was expected. Received: a batch of {len(pixels)}")
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
