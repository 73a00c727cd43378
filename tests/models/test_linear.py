"""Dense layers and the gated GELU."""

import math

import numpy as np
import pytest
from keras import ops
from tiny_networks import numbers

from kdiffusion.models.kernels import linear
from kdiffusion.models.layers.base import Dense
from kdiffusion.runtime import backend, processor


def test_gated_gelu_is_exact(run):
    x = np.linspace(-4.0, 4.0, 12, dtype=np.float32)[None]
    value, gate = np.split(x.astype(np.float64), 2, axis=-1)
    expected = value * gate * 0.5 * (1.0 + np.vectorize(math.erf)(gate / math.sqrt(2.0)))
    np.testing.assert_allclose(run(linear.gated_gelu, x), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def long(monkeypatch):
    """Make any tokens many, on any processor, and return whether that counts here."""
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(linear, "_MANY_TOKENS", 6)
    return backend.name() == "tensorflow" and not backend.on_accelerator()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
def test_many_tokens_are_multiplied_the_same(long, monkeypatch, policy, activation):
    layer = Dense(5, activation=activation, dtype=policy)
    x = ops.cast(numbers(2, 3, 4), layer.compute_dtype)
    layer.build(x.shape)
    layer.set_weights([numbers(4, 5), numbers(5)])
    convolutions, genuine = [], linear._convolution
    monkeypatch.setattr(
        linear, "_convolution", lambda *inputs: convolutions.append(inputs) or genuine(*inputs)
    )

    def value_and_gradient():
        parts = backend.value_and_gradient(lambda x: ops.sum(ops.square(layer(x))), x)
        return [ops.convert_to_numpy(ops.cast(part, "float32")) for part in parts]

    computed = value_and_gradient()
    assert len(convolutions) == long
    monkeypatch.setattr(linear, "_is_long", lambda x: False)
    for ours, expected in zip(computed, value_and_gradient()):
        np.testing.assert_allclose(ours, expected, rtol=1e-5 if policy == "float32" else 2e-2)


def test_weights_learn_the_same_from_many_tokens(long):
    x, kernel, bias = numbers(2, 3, 4), numbers(4, 5), numbers(5)

    def gradient(function):
        return ops.convert_to_numpy(
            backend.value_and_gradient(
                lambda kernel: ops.sum(ops.square(function(x, kernel, bias))),
                ops.convert_to_tensor(kernel),
            )[1]
        )

    plain = gradient(lambda x, kernel, bias: ops.matmul(x, kernel) + bias)
    np.testing.assert_allclose(gradient(linear.dense), plain, rtol=1e-5, atol=1e-4)


def test_many_tokens_are_those_of_a_sequence_with_avx512(long, monkeypatch):
    assert linear._is_long(ops.zeros((2, 3, 1))) == long
    assert not linear._is_long(ops.zeros((1, 5, 1)))
    assert not linear._is_long(ops.zeros((1, 2, 3, 1)))
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx2"}))
    assert not linear._is_long(ops.zeros((2, 3, 1)))
