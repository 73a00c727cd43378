"""Convolutions in all their forms against the plain one."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny_networks import numbers

from kdiffusion.models.kernels import convolution
from kdiffusion.models.layers.base import Conv2D
from kdiffusion.models.layers.residual import Upsample
from kdiffusion.runtime import backend, processor


@pytest.mark.parametrize(
    "batch, height, width, padding, strides",
    [(*shape, "same", 1) for shape in [(1, 2, 3), (2, 8, 8), (3, 1, 1)]]
    + [(*shape, "valid", n) for shape in [(1, 3, 4), (2, 8, 9), (3, 3, 3)] for n in (1, 2)],
)
def test_small_feature_maps_are_convolved_the_same(
    monkeypatch, batch, height, width, padding, strides
):
    layer = Conv2D(5, 3, strides=strides, padding=padding)
    x = numbers(batch, height, width, 4)
    layer.build(x.shape)
    layer.set_weights([numbers(3, 3, 4, 5), numbers(5)])
    products, genuine = [], convolution._convolve_small
    monkeypatch.setattr(
        convolution, "_convolve_small", lambda *inputs: products.append(inputs) or genuine(*inputs)
    )
    as_product = ops.convert_to_numpy(layer(x))
    assert len(products) == (not backend.on_accelerator())
    monkeypatch.setattr(convolution, "_is_small", lambda *shape: False)
    np.testing.assert_allclose(as_product, ops.convert_to_numpy(layer(x)), rtol=1e-4, atol=1e-3)


def test_small_feature_maps_have_few_positions():
    assert convolution._is_small(2, 8, 8) != backend.on_accelerator()
    assert not convolution._is_small(2, 8, 9)
    assert not convolution._is_small(None, 8, 8)


def test_only_convolutions_of_3x3_whose_padding_is_known_are_products(monkeypatch):
    products, genuine = [], convolution._convolve_small
    monkeypatch.setattr(
        convolution, "_convolve_small", lambda *inputs: products.append(inputs) or genuine(*inputs)
    )
    x = numbers(1, 6, 6, 2)

    def height(**options):
        return Conv2D(3, **options)(x).shape[1]

    assert height(kernel_size=1, padding="same") == 6
    assert height(kernel_size=3, padding="same", strides=2) == 3
    assert height(kernel_size=2, padding="valid") == 5
    assert height(kernel_size=3, padding="valid", strides=(2, 1)) == 2
    assert not products
    assert height(kernel_size=3, padding="same") == 6
    assert len(products) == (not backend.on_accelerator())


@pytest.mark.parametrize("filters, dtype", [(3, "float32"), (4, "float32"), (3, "bfloat16")])
def test_many_channels_are_convolved_to_few_the_same(monkeypatch, filters, dtype):
    """Use nine products for each filter where channels are no fewer, 27 here."""
    layer = Conv2D(filters, 3, dtype=dtype)
    x = numbers(2, 9, 8, 27)
    layer.build(x.shape)
    layer.set_weights([numbers(3, 3, 27, filters), numbers(filters)])
    paying = (filters, dtype) == (3, "float32") and not backend.on_accelerator()
    x = ops.cast(x, dtype)
    assert convolution._yields_few(x, layer.kernel) == paying
    as_product = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    monkeypatch.setattr(convolution, "_yields_few", lambda x, kernel: False)
    plain = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    np.testing.assert_allclose(as_product, plain, rtol=1e-4, atol=1e-3)


def doubled(x):
    return np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)


def plain_doubled(x, kernel, bias):
    x = ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2)
    return ops.conv(x, kernel, padding="same", data_format="channels_last") + bias


@pytest.fixture(params=["whole", "strips"])
def strips(request, monkeypatch):
    if request.param == "strips":
        monkeypatch.setattr(convolution, "_MAX_PRODUCTS", 4 * 9 * 5 * 16)


@pytest.mark.parametrize(
    "batch, height, width", [(1, 2, 3), (2, 8, 8), (3, 1, 2), (1, 7, 9), (1, 6, 9)]
)
def test_doubled_feature_maps_are_convolved_the_same(run, strips, batch, height, width):
    x, kernel, bias = numbers(batch, height, width, 4), numbers(3, 3, 4, 5), numbers(5)
    expected = ops.convert_to_numpy(plain_doubled(x, kernel, bias))
    result = run(convolution.convolve_doubled, x, kernel, bias)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)


def test_doubled_feature_maps_have_the_gradients_of_plain_ones(strips):
    arrays = [ops.convert_to_tensor(a) for a in (numbers(1, 6, 9, 4), numbers(3, 3, 4, 5))]
    gradients = [
        [
            ops.convert_to_numpy(
                backend.value_and_gradient(
                    lambda a: ops.sum(
                        ops.square(convolve(*arrays[:i], a, *arrays[i + 1 :], numbers(5)))
                    ),
                    array,
                )[1]
            )
            for i, array in enumerate(arrays)
        ]
        for convolve in (convolution.convolve_doubled, plain_doubled)
    ]
    for ours, expected in zip(*gradients):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_doubled_feature_maps_are_summed_in_float32(strips, monkeypatch, has_bfloat16):
    monkeypatch.setattr(processor, "has_bfloat16", lambda: has_bfloat16)
    # Every product is a bfloat16, and of the sum there is only the last rounding.
    x, kernel = np.ones((1, 6, 9, 1)), np.full((3, 3, 1, 5), 1 + 2**-7)
    x, kernel, bias = (ops.cast(a, "bfloat16") for a in (x, kernel, np.zeros(5)))
    result = convolution.convolve_doubled(x, kernel, bias)
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    inside = ops.convert_to_numpy(ops.cast(result, "float32"))[:, 1:-1, 1:-1]
    assert set(inside.ravel()) == {9.0625}


@pytest.mark.parametrize("channels", [320, 1280])
def test_doubled_feature_maps_are_as_exact_as_plain_sums(channels):
    x, kernel = numbers(1, 16, 16, channels), numbers(3, 3, channels, 16)
    padded = np.pad(doubled(x.astype(np.float64)), ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact = sum(
        padded[:, i : i + 32, j : j + 32] @ kernel[i, j].astype(np.float64)
        for i in range(3)
        for j in range(3)
    )
    result = convolution.convolve_doubled(x, kernel, np.zeros(16, np.float32))
    error = np.linalg.norm(ops.convert_to_numpy(result) - exact) / np.linalg.norm(exact)
    assert error < 2e-6


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("like", [None, (6, 8), (5, 8), (6, 7)])
def test_upsampling_doubles_and_convolves(monkeypatch, policy, like):
    layer = Upsample(3, dtype=policy)
    x = ops.cast(numbers(2, 3, 4, 2), layer.compute_dtype)
    layer.build(x.shape)
    layer.set_weights([numbers(3, 3, 2, 3), numbers(3)])
    computed, genuine = [], convolution._convolve_doubled
    monkeypatch.setattr(
        convolution, "_convolve_doubled", lambda *args: computed.append(args) or genuine(*args)
    )
    y = layer(x, None if like is None else ops.zeros((2, *like, 1), x.dtype))
    assert len(computed) == (like in (None, (6, 8)) and not backend.on_accelerator())
    height, width = like or (6, 8)
    expected = layer.convolution(doubled(ops.convert_to_numpy(x))[:, :height, :width])
    assert y.shape == expected.shape and y.dtype == x.dtype
    tolerance = 1e-5 if policy == "float32" else 1e-2
    np.testing.assert_allclose(
        *(ops.convert_to_numpy(ops.cast(a, "float32")) for a in (y, expected)),
        rtol=tolerance,
        atol=100 * tolerance,
    )


def test_upsampling_compiles_with_the_weights_that_it_has(run):
    layer = Upsample(3)
    x = numbers(2, 3, 4, 2)
    layer.build(x.shape)
    np.testing.assert_allclose(run(layer, x), ops.convert_to_numpy(layer(x)), rtol=1e-5, atol=1e-5)
