"""The codebook's losses, by hand numbers."""

import numpy as np
import pytest
from keras import ops

from kdiffusion.models.layers.codebook import Codebook
from kdiffusion.training.trainers.quantizer import (
    codebook_loss,
    perplexity,
    straight_through,
)

CODES = np.float32([[0.0, 1.0], [3.0, 3.0]]).reshape(2, 1, 1, 2)
VECTORS = np.float32([[0.0, 0.0], [2.0, 3.0], [9.0, 9.0]])


def codebook():
    layer = Codebook(3)
    layer.build(CODES.shape)
    layer.embedding.assign(VECTORS)
    return layer


def test_the_nearest_vectors_are_chosen():
    layer = codebook()
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.nearest(CODES)).ravel(), [0, 1])
    found = ops.convert_to_numpy(layer(CODES))
    np.testing.assert_array_equal(found.reshape(2, 2), VECTORS[:2])
    through = ops.convert_to_numpy(straight_through(CODES, found))
    np.testing.assert_allclose(through, found)


@pytest.mark.parametrize("legacy", [True, False])
def test_the_loss_of_each_sample(legacy):
    found = codebook_loss(CODES, codebook()(CODES), commitment=0.5, legacy=legacy)
    np.testing.assert_allclose(ops.convert_to_numpy(found), [0.75, 0.75])


@pytest.mark.parametrize("chosen, expected", [([3, 3, 3, 3], 1), ([0, 1, 2, 3], 4), ([0, 7], 2)])
def test_perplexity_counts_the_vectors_in_use(chosen, expected):
    assert float(perplexity(np.int32(chosen), 8)) == pytest.approx(expected, rel=1e-5)


def test_a_new_codebook_is_small_and_of_different_vectors():
    layer = Codebook(64)
    layer.build((None, None, None, 3))
    vectors = ops.convert_to_numpy(layer.embedding)
    assert np.abs(vectors).max() <= 1 / 64
    assert len(np.unique(vectors)) > 150
