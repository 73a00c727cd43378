"""The functions of whole feature maps against their formulas in NumPy float64, fused or not."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion.models.kernels import normalization
from kdiffusion.models.layers.base import Convolution, Linear, Upsample
from kdiffusion.models.layers.norms import LayerNorm
from kdiffusion.runtime import backend, processor, programs, tracing


@pytest.fixture(params=["plain", "fused"])
def run(request, monkeypatch):
    """Computes a function in a plain graph, with its kernels compiled alone or not at all."""
    fused = request.param == "fused"
    monkeypatch.setattr(tracing, "_WORTH_FUSING", 0 if fused else math.inf)

    def run(function, *arrays):
        compiled = programs.compile_function(function, jit_compile=False)
        return ops.convert_to_numpy(compiled(*map(ops.convert_to_tensor, arrays)))

    return run


def numbers(*shape):
    return np.random.default_rng(0).normal(3.0, 2.0, shape).astype("float32")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_group_normalization(run, activation):
    x, gamma, beta = numbers(2, 5, 3, 8), numbers(8), numbers(8)[::-1].copy()
    groups = x.astype(np.float64).reshape(2, 15, 4, 2)
    mean = groups.mean(axis=(1, 3), keepdims=True)
    variance = groups.var(axis=(1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 0.1)).reshape(x.shape) * gamma + beta
    if activation:
        expected = expected / (1.0 + np.exp(-expected))
    result = run(
        lambda *a: normalization.normalize(a[0], 4, 0.1, *a[1:], activation), x, gamma, beta
    )
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_layer_normalization_is_that_of_keras(run):
    x = numbers(2, 7, 16)
    ours, theirs = LayerNorm(epsilon=0.1), keras.layers.LayerNormalization(epsilon=0.1)
    for layer in (ours, theirs):
        layer.build(x.shape)
        layer.set_weights([numbers(16), numbers(16)[::-1]])
    np.testing.assert_allclose(run(ours, x), ops.convert_to_numpy(theirs(x)), rtol=1e-5, atol=1e-5)


def test_gated_gelu_is_exact(run):
    x = np.linspace(-4.0, 4.0, 12, dtype=np.float32)[None]
    value, gate = np.split(x.astype(np.float64), 2, axis=-1)
    expected = value * gate * 0.5 * (1.0 + np.vectorize(math.erf)(gate / math.sqrt(2.0)))
    np.testing.assert_allclose(run(normalization.gated_gelu, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_softmax_goes_through_float32(run, dtype):
    x = ops.cast(numbers(3, 200), dtype)
    logits = ops.convert_to_numpy(ops.cast(x, "float32")).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    result = run(lambda x: ops.cast(normalization.softmax(x), "float32"), x)
    # Half a unit in the last place of the result, and nothing from sums in half precision.
    half_unit = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(result, expected, rtol=1.1 * half_unit, atol=1e-7)


@pytest.mark.parametrize(
    "batch, height, width, padding, strides",
    [(*shape, "same", 1) for shape in [(1, 2, 3), (2, 8, 8), (3, 1, 1)]]
    + [(*shape, "valid", n) for shape in [(1, 3, 4), (2, 8, 9), (3, 3, 3)] for n in (1, 2)],
)
def test_small_feature_maps_are_convolved_the_same(
    monkeypatch, batch, height, width, padding, strides
):
    layer = Convolution(5, 3, strides=strides, padding=padding, data_format="channels_last")
    x = numbers(batch, height, width, 4)
    layer.build(x.shape)
    layer.set_weights([numbers(3, 3, 4, 5), numbers(5)])
    products, genuine = [], normalization.convolve_small
    monkeypatch.setattr(
        normalization, "convolve_small", lambda *inputs: products.append(inputs) or genuine(*inputs)
    )
    as_product = ops.convert_to_numpy(layer(x))
    assert len(products) == (not backend.on_accelerator())
    monkeypatch.setattr(normalization, "is_small", lambda shape: False)
    np.testing.assert_allclose(as_product, ops.convert_to_numpy(layer(x)), rtol=1e-4, atol=1e-3)


def test_small_feature_maps_have_few_positions():
    assert normalization.is_small((2, 8, 8, 999)) != backend.on_accelerator()
    assert not normalization.is_small((2, 8, 9, 1))
    assert not normalization.is_small((None, 8, 8, 1))


@pytest.fixture
def long(monkeypatch):
    """Whether any tokens are many, on any processor."""
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(normalization, "_MANY_TOKENS", 6)
    return backend.name() == "tensorflow" and not backend.on_accelerator()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
def test_many_tokens_are_multiplied_the_same(long, monkeypatch, policy, activation):
    layer = Linear(5, activation=activation, dtype=policy)
    x = ops.cast(numbers(2, 3, 4), layer.compute_dtype)
    layer.build(x.shape)
    layer.set_weights([numbers(4, 5), numbers(5)])
    convolutions, genuine = [], normalization.multiply_long
    monkeypatch.setattr(
        normalization,
        "multiply_long",
        lambda *inputs: convolutions.append(inputs) or genuine(*inputs),
    )

    def value_and_gradient():
        parts = backend.value_and_gradient(lambda x: ops.sum(ops.square(layer(x))), x)
        return [ops.convert_to_numpy(ops.cast(part, "float32")) for part in parts]

    computed = value_and_gradient()
    assert len(convolutions) == long
    monkeypatch.setattr(normalization, "is_long", lambda x: False)
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
    np.testing.assert_allclose(gradient(normalization.multiply_long), plain, rtol=1e-5, atol=1e-4)


def test_many_tokens_are_those_of_a_sequence_with_avx512(long, monkeypatch):
    assert normalization.is_long(ops.zeros((2, 3, 1))) == long
    assert not normalization.is_long(ops.zeros((1, 5, 1)))
    assert not normalization.is_long(ops.zeros((1, 2, 3, 1)))
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx2"}))
    assert not normalization.is_long(ops.zeros((2, 3, 1)))


@pytest.mark.parametrize("filters, dtype", [(3, "float32"), (4, "float32"), (3, "bfloat16")])
def test_many_channels_are_convolved_to_few_the_same(monkeypatch, filters, dtype):
    """Nine products of each filter pay where channels are no fewer, 27 here."""
    layer = Convolution(filters, 3, padding="same", data_format="channels_last", dtype=dtype)
    x = numbers(2, 9, 8, 27)
    layer.build(x.shape)
    layer.set_weights([numbers(3, 3, 27, filters), numbers(filters)])
    paying = (filters, dtype) == (3, "float32") and not backend.on_accelerator()
    x = ops.cast(x, dtype)
    assert normalization.yields_few(x, layer.kernel) == paying
    as_product = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    monkeypatch.setattr(normalization, "yields_few", lambda x, kernel: False)
    plain = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    np.testing.assert_allclose(as_product, plain, rtol=1e-4, atol=1e-3)


def test_only_convolutions_of_3x3_whose_padding_is_known_are_products(monkeypatch):
    products, genuine = [], normalization.convolve_small
    monkeypatch.setattr(
        normalization, "convolve_small", lambda *inputs: products.append(inputs) or genuine(*inputs)
    )
    x = numbers(1, 6, 6, 2)

    def height(**options):
        return Convolution(3, data_format="channels_last", **options)(x).shape[1]

    assert height(kernel_size=1, padding="same") == 6
    assert height(kernel_size=3, padding="same", strides=2) == 3
    assert height(kernel_size=2, padding="valid") == 5
    assert height(kernel_size=3, padding="valid", strides=(2, 1)) == 2
    assert not products
    assert height(kernel_size=3, padding="same") == 6
    assert len(products) == (not backend.on_accelerator())


def doubled(x):
    return np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)


def plain_doubled(x, kernel, bias):
    x = ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2)
    return ops.conv(x, kernel, padding="same", data_format="channels_last") + bias


@pytest.fixture(params=["whole", "strips"])
def strips(request, monkeypatch):
    if request.param == "strips":
        monkeypatch.setattr(normalization, "_MAX_PRODUCTS", 4 * 9 * 5 * 16)


@pytest.mark.parametrize(
    "batch, height, width", [(1, 2, 3), (2, 8, 8), (3, 1, 2), (1, 7, 9), (1, 6, 9)]
)
def test_doubled_feature_maps_are_convolved_the_same(run, strips, batch, height, width):
    x, kernel, bias = numbers(batch, height, width, 4), numbers(3, 3, 4, 5), numbers(5)
    expected = ops.convert_to_numpy(plain_doubled(x, kernel, bias))
    result = run(normalization.convolve_doubled, x, kernel, bias)
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
        for convolve in (normalization.convolve_doubled, plain_doubled)
    ]
    for ours, expected in zip(*gradients):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_doubled_feature_maps_are_summed_in_float32(strips, monkeypatch, has_bfloat16):
    monkeypatch.setattr(processor, "has_bfloat16", lambda: has_bfloat16)
    # Every product is a bfloat16, and of the sum there is only the last rounding.
    x, kernel = np.ones((1, 6, 9, 1)), np.full((3, 3, 1, 5), 1 + 2**-7)
    x, kernel, bias = (ops.cast(a, "bfloat16") for a in (x, kernel, np.zeros(5)))
    result = normalization.convolve_doubled(x, kernel, bias)
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
    result = normalization.convolve_doubled(x, kernel, np.zeros(16, np.float32))
    error = np.linalg.norm(ops.convert_to_numpy(result) - exact) / np.linalg.norm(exact)
    assert error < 2e-6


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("like", [None, (6, 8), (5, 8), (6, 7)])
def test_upsampling_doubles_and_convolves(monkeypatch, policy, like):
    layer = Upsample(3, dtype=policy)
    x = ops.cast(numbers(2, 3, 4, 2), layer.compute_dtype)
    layer.build(x.shape)
    layer.set_weights([numbers(3, 3, 2, 3), numbers(3)])
    computed, genuine = [], normalization.convolve_doubled
    monkeypatch.setattr(
        normalization,
        "convolve_doubled",
        lambda *arrays: computed.append(arrays) or genuine(*arrays),
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
