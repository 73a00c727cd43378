"""Small pictures of four blocks in different colours, and what those colours are."""

import numpy as np
from PIL import Image

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 100, 50]], np.uint8)
SOFT = COLOURS // 4 + 96
GREYS = np.array([0, 64, 128, 255], np.uint8)


def in_blocks(colours):
    """Two by two blocks of 8 x 8 pixels."""
    return np.asarray(colours).reshape(2, 2, -1).repeat(8, axis=0).repeat(8, axis=1)


def blocks(batch):
    """The colours of the blocks, which must be uniform, as levels from 0 to 255."""
    assert batch.dtype == np.float32
    assert batch.shape == (1, 16, 16, 3)
    colours = batch[0, ::8, ::8]
    np.testing.assert_array_equal(colours.repeat(8, axis=0).repeat(8, axis=1), batch[0])
    return (colours.reshape(4, 3) + 1.0) * 127.5


def grey(levels):
    return np.repeat(np.asarray(levels, np.float64)[:, None], 3, axis=1)


def one_channel(levels, dtype=np.uint8):
    return Image.fromarray(in_blocks(levels)[..., 0].astype(dtype))


RGB = Image.fromarray(in_blocks(COLOURS))
L = Image.fromarray(in_blocks(GREYS)[..., 0])
ALPHA = one_channel([255, 0, 255, 200])
RGBA = Image.merge("RGBA", (*RGB.split(), ALPHA))
RGBA_COLOURS = [[255, 0, 0], [255, 255, 255], [0, 0, 255], [212, 133, 94]]
SECOND_IS_WHITE = [[255, 0, 0], [255, 255, 255], [0, 0, 255], [200, 100, 50]]
RGBA_EXACT = [*RGBA_COLOURS[:3], (200.0 * COLOURS[3] + 55.0 * 255.0) / 255.0]
LA_COLOURS = grey([0, 255, 128, 255])
SIXTEEN = in_blocks([0, 65535, 12345, 40000])[..., 0].astype(np.uint16)
SIXTEEN_COLOURS = grey([0, 255, 12345 / 257, 40000 / 257])
