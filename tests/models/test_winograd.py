"""Winograd's 3x3 convolution against the plain one."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion.models.kernels import winograd
from kdiffusion.models.kernels.parts import Elementwise
from kdiffusion.models.layers.base import Conv2D
from kdiffusion.models.layers.norms import GroupNorm
from kdiffusion.runtime import backend, processor, programs, tracing


def winograd_is_here():
    return backend.name() == "tensorflow" and not backend.on_accelerator()


def numbers(*shape):
    return np.random.default_rng(0).normal(0.0, 1.0, shape).astype("float32")


def convolved(x, kernel):
    """Convolve in float64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j].astype(np.float64)
        for i in range(3)
        for j in range(3)
    )


def plain(x, kernel, bias):
    return ops.conv(x, kernel, padding="same", data_format="channels_last") + bias


def moved(x, scale, shift):
    return x * scale + shift


@pytest.fixture(params=["one strip", "strips", "strips, kernel in turn", "tiles of 2x4"])
def layer(request, monkeypatch):
    """Return a layer that goes through `winograd`, where the backend has it."""
    if request.param != "one strip":
        for bound in ("_MAX_TILES", "_STRIP"):
            monkeypatch.setattr(winograd, bound, 1)
    if request.param == "strips, kernel in turn":
        monkeypatch.setattr(winograd, "_MAX_KERNEL", 1)
    if request.param == "tiles of 2x4":
        flags = processor.flags() | {"avx512f"}
        monkeypatch.setattr(processor, "flags", lambda *_: flags)
        monkeypatch.setattr(winograd, "_MAX_CHANNELS", 0)
    for bound in ("_WORTH_COMPILING", "_MIN_POSITIONS", "_MIN_CHANNELS"):
        monkeypatch.setattr(winograd, bound, 0)
    return Conv2D(5, 3)


@pytest.mark.parametrize("fused", [0, 2**17])
@pytest.mark.parametrize("batch, height, width", [(1, 2, 2), (1, 4, 12), (2, 12, 8), (1, 7, 13)])
def test_it_is_the_same_convolution(layer, monkeypatch, fused, batch, height, width):
    monkeypatch.setattr(tracing, "_WORTH_FUSING", fused)
    x, kernel, bias = numbers(batch, height, width, 64), numbers(3, 3, 64, 3), numbers(3)
    result = programs.compile_function(winograd.convolve, jit_compile=False)(x, kernel, bias)
    expected = convolved(x, kernel) + bias
    assert result.shape == expected.shape
    np.testing.assert_allclose(ops.convert_to_numpy(result), expected, rtol=0, atol=2e-4)


@pytest.mark.skipif(not winograd_is_here(), reason="JAX computes plain convolutions")
def test_bfloat16_is_rounded_once(layer):
    x, kernel, bias = numbers(1, 7, 13, 8), numbers(3, 3, 8, 3), numbers(3)
    x, kernel, bias, scale, shift = (
        ops.cast(values, "bfloat16") for values in (x, kernel, bias, bias[:1], bias[1:2])
    )
    exact = [
        ops.convert_to_numpy(ops.cast(values, "float32"))
        for values in (x, kernel, bias, moved(x, scale, shift))
    ]
    for result, inputs in (
        (winograd.convolve(x, kernel, bias), exact[0]),
        (winograd.convolve(x, kernel, bias, Elementwise(moved, (scale, shift))), exact[3]),
    ):
        assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
        result = ops.convert_to_numpy(ops.cast(result, "float32"))
        expected = convolved(inputs, exact[1]) + exact[2]
        np.testing.assert_allclose(result, expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("batch, height, width", [(1, 4, 12), (2, 12, 8), (1, 7, 13)])
def test_what_comes_before_is_computed_in_strips_too(layer, batch, height, width):
    x, kernel, bias = numbers(batch, height, width, 8), numbers(3, 3, 8, 3), numbers(3)
    scale, shift = numbers(batch, 1, 1, 8), 1.0 + numbers(8)

    def function(x, kernel, bias, scale, shift):
        return winograd.convolve(x, kernel, bias, Elementwise(moved, (scale, shift)))

    arguments = x, kernel, bias, scale, shift
    result = programs.compile_function(function, jit_compile=False)(*arguments)
    # What is around a feature map is zero, not moved.
    expected = convolved(moved(x, scale, shift), kernel) + bias
    np.testing.assert_allclose(ops.convert_to_numpy(result), expected, rtol=0, atol=2e-4)

    def loss(convolve):
        return lambda scale: ops.sum(ops.square(convolve(scale)))

    gradients = [
        ops.convert_to_numpy(
            backend.value_and_gradient(loss(convolve), ops.convert_to_tensor(scale))[1]
        )
        for convolve in (
            lambda scale: function(x, kernel, bias, scale, shift),
            lambda scale: plain(moved(x, scale, shift), kernel, bias),
        )
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=5e-3)


@pytest.mark.skipif(not winograd_is_here(), reason="JAX computes plain convolutions")
@pytest.mark.parametrize("channels", [320, 640, 1280, 2560])
def test_it_is_as_exact_as_plain_sums(channels):
    x, kernel = numbers(1, 16, 16, channels), numbers(3, 3, channels, 16)

    exact = convolved(x, kernel)
    result = ops.convert_to_numpy(winograd.convolve(x, kernel, np.zeros(16, np.float32)))
    # PyTorch's are off by 9.5e-7 and 1.9e-6.
    assert np.linalg.norm(result - exact) / np.linalg.norm(exact) < 2e-6


@pytest.mark.parametrize(
    "flag, channels, size", [("avx512f", 640, 4), ("avx512f", 960, 2), ("avx2", 960, 4)]
)
def test_tiles_of_many_channels_are_smaller_with_avx512(monkeypatch, flag, channels, size):
    monkeypatch.setattr(processor, "flags", lambda: frozenset({flag}))
    assert winograd._size_of_rows(channels) == size


def test_layers_use_it_and_learn_from_the_plain_one(layer, monkeypatch):
    x = numbers(2, 16, 12, 4)
    layer.build(x.shape)
    values, results = [numbers(3, 3, 4, 5), numbers(5)], []
    computed, genuine = [], winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *args: computed.append(args) or genuine(*args))
    for channels in (0, 5):
        monkeypatch.setattr(winograd, "_MIN_CHANNELS", channels)
        layer.set_weights(values)

        def both(x):
            return backend.value_and_gradient(lambda x: ops.sum(ops.square(layer(x))), x)

        both = programs.compile_function(both, jit_compile=False)(ops.convert_to_tensor(x))
        results.append([ops.convert_to_numpy(part) for part in both])
    assert len(computed) == winograd_is_here()
    for ours, expected in zip(*results):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("channels", [0, 65])
def test_a_normalization_before_it_is_computed_in_strips_too(layer, monkeypatch, channels):
    """Convolve plainly where there are too few channels."""
    monkeypatch.setattr(winograd, "_MIN_CHANNELS", channels)
    norm, x = GroupNorm(4, activation="silu"), numbers(2, 7, 13, 8)
    layer.build(x.shape)
    norm.build(x.shape)
    for variable in (*layer.weights, *norm.weights):
        variable.assign(numbers(*variable.shape))
    expected = ops.convert_to_numpy(layer(norm(x)))
    prologues, genuine = [], winograd.convolve
    monkeypatch.setattr(
        winograd, "convolve", lambda *args: prologues.append(args[3:]) or genuine(*args)
    )
    result = programs.compile_function(lambda x: norm.then(layer, x), jit_compile=False)(x)
    assert len([found for found in prologues if found]) == (channels == 0 and winograd_is_here())
    np.testing.assert_allclose(ops.convert_to_numpy(result), expected, rtol=0, atol=2e-4)


def test_a_kernel_learns_from_the_plain_one(layer):
    x, kernel, bias = ops.convert_to_tensor(numbers(1, 8, 8, 4)), numbers(3, 3, 4, 5), numbers(5)
    gradients = [
        ops.convert_to_numpy(
            backend.value_and_gradient(
                lambda kernel: ops.sum(ops.square(convolve(x, kernel, bias))),
                ops.convert_to_tensor(kernel),
            )[1]
        )
        for convolve in (winograd.convolve, plain)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize(
    "shape, filters, dtype, pays",
    [
        ((2, 64, 64, 320), 320, "float32", True),
        ((2, 63, 65, 320), 320, "float32", True),
        ((2, 16, 16, 1280), 1280, "float32", True),
        ((2, 8, 8, 1280), 1280, "float32", False),
        ((1, 32, 32, 320), 320, "float32", False),
        ((1, 512, 512, 64), 128, "float32", False),
        ((1, 512, 512, 128), 3, "float32", False),
        ((2, 64, 64, 320), 320, "float16", False),
    ],
)
def test_when_it_pays(shape, filters, dtype, pays):
    x, kernel = ops.zeros(shape, dtype), ops.zeros((3, 3, shape[-1], filters), dtype)
    assert winograd.pays(x, kernel) == (pays and winograd_is_here())


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_it_pays_in_bfloat16_where_a_processor_has_none(monkeypatch, has_bfloat16):
    monkeypatch.setattr(processor, "has_bfloat16", lambda: has_bfloat16)
    x, kernel = ops.zeros((2, 64, 64, 320), "bfloat16"), ops.zeros((3, 3, 320, 320), "bfloat16")
    assert winograd.pays(x, kernel) == (winograd_is_here() and not has_bfloat16)


@pytest.mark.skipif(not winograd_is_here(), reason="JAX differentiates what is computed")
def test_a_function_has_the_gradient_of_another():
    function = backend.with_gradient_of(lambda x: x**3, lambda x: ops.stop_gradient(x) ** 2)
    value, gradient = backend.value_and_gradient(function, ops.convert_to_tensor(2.0))
    assert (float(value), float(gradient)) == (4.0, 12.0)
