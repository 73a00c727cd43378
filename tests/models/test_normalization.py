"""Group and layer normalization against their formulas in NumPy float64, fused or not."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny_networks import numbers

from kdiffusion.models import kernels
from kdiffusion.models.layers.norms import LayerNorm


@pytest.mark.parametrize("activation", [None, "silu"])
def test_group_normalization(run, activation):
    x, gamma, beta = numbers(2, 5, 3, 8), numbers(8), numbers(8)[::-1].copy()
    groups = x.astype(np.float64).reshape(2, 15, 4, 2)
    mean = groups.mean(axis=(1, 3), keepdims=True)
    variance = groups.var(axis=(1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 0.1)).reshape(x.shape) * gamma + beta
    if activation:
        expected = expected / (1.0 + np.exp(-expected))
    result = run(lambda *a: kernels.normalize(a[0], 4, 0.1, *a[1:], activation), x, gamma, beta)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_layer_normalization_is_that_of_keras(run):
    x = numbers(2, 7, 16)
    ours, theirs = LayerNorm(epsilon=0.1), keras.layers.LayerNormalization(epsilon=0.1)
    for layer in (ours, theirs):
        layer.build(x.shape)
        layer.set_weights([numbers(16), numbers(16)[::-1]])
    np.testing.assert_allclose(run(ours, x), ops.convert_to_numpy(theirs(x)), rtol=1e-5, atol=1e-5)
