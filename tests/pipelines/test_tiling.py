"""Tiles: where they lie, and that blending them gives back what was cut."""

import numpy as np
import pytest

from kdiffusion.pipelines.tiling import decode_in_tiles


def upsample(latents):
    return latents[..., :3].repeat(8, axis=1).repeat(8, axis=2)


@pytest.mark.parametrize("size", [(20, 20), (21, 50), (7, 33), (16, 17), (5, 5)])
def test_tiles_of_a_local_decoder_give_the_whole_picture(size):
    latents = np.random.default_rng(0).normal(size=(1, *size, 4)).astype("float32")
    shapes = set()

    def decode(part):
        shapes.add(part.shape)
        return upsample(part)

    picture = decode_in_tiles(decode, latents, 8, tile=16, overlap=4)
    np.testing.assert_allclose(picture, upsample(latents), atol=1e-6)
    assert shapes == {(1, min(size[0], 16), min(size[1], 16), 4)}


def test_tiles_overlap_and_are_blended_without_steps():
    """Each tile has a level of its own; the picture moves between them in small steps."""
    levels = iter(range(100))

    def decode(part):
        return np.full((1, 8 * part.shape[1], 8 * part.shape[2], 3), next(levels), "float32")

    picture = decode_in_tiles(decode, np.zeros((1, 16, 40, 4), "float32"), 8, tile=16, overlap=4)
    along = picture[0, 64, :, 0]
    assert along[0] == 0.0 and along[-1] == next(levels) - 1
    assert np.abs(np.diff(along)).max() < 0.3
    assert (np.diff(along) >= 0).all()


def test_a_large_picture_is_decoded_in_tiles(tiny, monkeypatch):
    from kdiffusion.pipelines import latent

    latents = np.random.default_rng(0).normal(size=(1, 12, 20, 4)).astype("float32")
    whole = tiny.decode(latents)
    monkeypatch.setattr(latent, "MAX_CELLS", 100)
    monkeypatch.setattr(latent.decode_in_tiles, "__defaults__", (8, 4))
    tiled = tiny.decode(latents)
    assert tiled.shape == whole.shape == (1, 96, 160, 3)
    assert np.abs(tiled.astype(int) - whole).mean() < 30
