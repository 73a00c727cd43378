"""Winograd's 3x3 convolution against the plain one."""

import numpy as np
import pytest
from keras import ops

from kdiffusion import backend
from kdiffusion.models import winograd
from kdiffusion.models.layers import Convolution


def winograd_is_here():
    return backend.name() == "tensorflow" and not backend.on_accelerator()


def numbers(*shape):
    return np.random.default_rng(0).normal(0.0, 1.0, shape).astype("float32")


def convolved(x, kernel):
    """In float64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j].astype(np.float64)
        for i in range(3)
        for j in range(3)
    )


@pytest.fixture(params=[2**27, 1], ids=["whole", "strips"])
def layer(request, monkeypatch):
    """Any convolution of even sides goes through `winograd`, where the backend has it."""
    monkeypatch.setattr(winograd, "_MAX_TILES", request.param)
    monkeypatch.setattr(winograd, "_WORTH_COMPILING", 0)
    monkeypatch.setattr(winograd, "_MIN_CHANNELS", 1)
    return Convolution(5, 3, padding="same", data_format="channels_last")


@pytest.mark.parametrize("fused", [0, 2**17])
@pytest.mark.parametrize("batch, height, width", [(1, 2, 2), (2, 12, 8)])
def test_it_is_the_same_convolution(layer, monkeypatch, fused, batch, height, width):
    monkeypatch.setattr(backend, "_WORTH_FUSING", fused)
    x, kernel = numbers(batch, height, width, 64), numbers(3, 3, 64, 3)
    run = backend.compile_function(winograd.convolve, jit_compile=False)
    result = ops.convert_to_numpy(run(ops.convert_to_tensor(x), ops.convert_to_tensor(kernel)))
    np.testing.assert_allclose(result, convolved(x, kernel), rtol=0, atol=3e-5)


def test_it_is_no_less_exact():
    x, kernel = numbers(1, 8, 8, 320), numbers(3, 3, 320, 16)
    exact = convolved(x, kernel)
    ours, plain = (
        np.sqrt(np.mean(np.square(ops.convert_to_numpy(convolve(x, kernel)) - exact)))
        for convolve in (
            winograd.convolve,
            lambda x, kernel: ops.conv(x, kernel, padding="same", data_format="channels_last"),
        )
    )
    assert ours < 1.5 * plain


def test_layers_use_it_and_learn_from_the_plain_one(layer, monkeypatch):
    x = numbers(2, 16, 12, 4)
    layer.build(x.shape)
    values, results = [numbers(3, 3, 4, 5), numbers(5)], []
    computed, genuine = [], winograd.convolve
    monkeypatch.setattr(
        winograd, "convolve", lambda *arrays: computed.append(arrays) or genuine(*arrays)
    )
    for channels in (1, 5):
        monkeypatch.setattr(winograd, "_MIN_CHANNELS", channels)
        layer.set_weights(values)

        def both(x):
            return backend.value_and_gradient(lambda x: ops.sum(ops.square(layer(x))), x)

        both = backend.compile_function(both, jit_compile=False)(ops.convert_to_tensor(x))
        results.append([ops.convert_to_numpy(part) for part in both])
    assert len(computed) == winograd_is_here()
    for ours, plain in zip(*results):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-4)


def test_kernels_learn_from_the_plain_one(layer):
    x, kernel = ops.convert_to_tensor(numbers(1, 8, 8, 4)), numbers(3, 3, 4, 5)
    gradients = [
        ops.convert_to_numpy(
            backend.value_and_gradient(
                lambda kernel: ops.sum(ops.square(convolve(x, kernel))),
                ops.convert_to_tensor(kernel),
            )[1]
        )
        for convolve in (
            winograd.convolve,
            lambda x, kernel: ops.conv(x, kernel, padding="same", data_format="channels_last"),
        )
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "shape, filters, dtype, pays",
    [
        ((2, 64, 64, 320), 320, "float32", True),
        ((1, 64, 64, 320), 320, "float32", False),
        ((2, 63, 64, 640), 320, "float32", False),
        ((2, 64, 63, 640), 320, "float32", False),
        ((1, 512, 512, 256), 128, "float32", False),
        ((1, 512, 512, 128), 256, "float32", False),
        ((2, 64, 64, 320), 320, "bfloat16", False),
    ],
)
def test_when_it_pays(shape, filters, dtype, pays):
    x, kernel = ops.zeros(shape, dtype), ops.zeros((3, 3, shape[-1], filters), dtype)
    assert winograd.pays(x, kernel) == (pays and winograd_is_here())


@pytest.mark.skipif(not winograd_is_here(), reason="JAX differentiates what is computed")
def test_a_function_has_the_gradient_of_another():
    function = backend.with_gradient_of(lambda x: x**3, lambda x: ops.stop_gradient(x) ** 2)
    value, gradient = backend.value_and_gradient(function, ops.convert_to_tensor(2.0))
    assert (float(value), float(gradient)) == (4.0, 12.0)
