"""Attention whole and in chunks of queries, and its softmax."""

import numpy as np
import pytest
from keras import ops
from tiny_networks import numbers

from kdiffusion.models.kernels import attention
from kdiffusion.runtime import backend, processor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_softmax_goes_through_float32(run, dtype):
    x = ops.cast(numbers(3, 200), dtype)
    logits = ops.convert_to_numpy(ops.cast(x, "float32")).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    result = run(lambda x: ops.cast(attention._softmax(x), "float32"), x)
    # Half a unit in the last place of the result, and nothing from sums in half precision.
    half_unit = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(result, expected, rtol=1.1 * half_unit, atol=1e-7)


@pytest.mark.parametrize("limit", [1, 500, 4000])
def test_attention_in_chunks_of_queries_gives_the_same_numbers(monkeypatch, limit):
    generator = np.random.default_rng(0)
    query = generator.normal(size=(2, 15, 8)).astype("float32")
    key, value = generator.normal(size=(2, 2, 9, 8)).astype("float32")
    whole = ops.convert_to_numpy(attention.attend(query, key, value, 2))
    calls = []
    original = attention._attend_chunk
    monkeypatch.setattr(attention, "_MAX_LOGITS", limit)
    monkeypatch.setattr(
        attention, "_attend_chunk", lambda *args: calls.append(args[0].shape) or original(*args)
    )
    chunked = ops.convert_to_numpy(attention.attend(query, key, value, 2))
    np.testing.assert_allclose(chunked, whole, atol=1e-6)
    assert calls[0][2] == {1: 1, 500: 3, 4000: 15}[limit]


@pytest.mark.skipif(backend.name() != "tensorflow", reason="XLA casts by itself")
def test_attention_is_in_float32_where_a_processor_has_no_bfloat16(monkeypatch):
    generator = np.random.default_rng(0)
    halves = ops.cast(generator.normal(size=(3, 1, 16, 8)), "bfloat16")
    exact = attention.attend(*ops.cast(halves, "float32"), 2)
    monkeypatch.setattr(processor, "has_bfloat16", lambda: False)
    result = attention.attend(*halves, 2)
    assert result.dtype == "bfloat16"
    both = (ops.cast(x, "float32") for x in (result, ops.cast(exact, "bfloat16")))
    np.testing.assert_array_equal(*map(ops.convert_to_numpy, both))
