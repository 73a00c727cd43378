"""Flash attention, with a stand-in for the kernel that a CPU has not."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion.models.kernels import flash
from kdiffusion.models.layers.attention import Attention
from kdiffusion.runtime import backend


@pytest.fixture
def kernel(monkeypatch):
    """Stand in for the kernel: shapes it was called with, and a factor to be wrong by."""
    plain = ops.dot_product_attention
    state = {"calls": [], "factor": 1.0}

    def stand_in(query, key, value, flash_attention):
        assert flash_attention
        if query.shape[-1] > 256:
            raise NotImplementedError("The head dim must be <= 256")
        state["calls"].append(tuple(query.shape))
        # In float32, as flash attention adds up: a processor without bfloat16 rounds in between.
        outputs = plain(*(ops.cast(x, "float32") for x in (query, key, value)))
        return ops.cast(outputs * state["factor"], query.dtype)

    monkeypatch.setattr(ops, "dot_product_attention", stand_in)
    monkeypatch.setattr(backend, "has_flash_attention", lambda: True)
    flash.works.cache_clear()
    yield state
    flash.works.cache_clear()


def layer(dtype="bfloat16", **options):
    keras.utils.set_random_seed(0)
    made = Attention(48, 2, dtype=dtype, **options)
    made.build((2, 10, 48), (2, 7, 48))
    return made


def inputs(dtype="bfloat16"):
    rng = np.random.default_rng(0)
    return [ops.convert_to_tensor(rng.normal(size=(2, n, 48)), dtype) for n in (10, 7)]


def test_a_layer_computes_the_same_through_it(kernel):
    plain = layer()
    plain.use_flash = False
    fast = layer()
    assert fast.use_flash
    kernel["calls"].clear()
    theirs, ours = (ops.convert_to_numpy(ops.cast(m(*inputs()), "float32")) for m in (plain, fast))
    assert kernel["calls"] == [(2, 10, 2, 24)]
    assert np.abs(ours - theirs).max() < 0.02 < np.abs(theirs).max()


def test_a_wrong_kernel_is_warned_of_and_not_used(kernel):
    kernel["factor"] = 1.2
    with pytest.warns(UserWarning, match="Flash attention is off: with heads of 24 in bfloat16"):
        assert not layer().use_flash


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"causal": True}])
def test_it_is_for_half_precision_and_whole_contexts(kernel, options):
    assert not layer(**options).use_flash
    assert not kernel["calls"]


def test_heads_without_a_kernel_are_attended_to_plainly(kernel):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not flash.works(512, "bfloat16")


def test_a_cpu_has_none():
    flash.works.cache_clear()
    assert backend.has_flash_attention() is False
    assert not layer().use_flash
