"""Draws are published bits, the same everywhere, and distributed as they should be."""

import hashlib
from statistics import NormalDist

import numpy as np
import pytest
from keras import ops

from kdiffusion.runtime import programs
from kdiffusion.training import random

INDEX = np.arange(8, dtype=np.int32)

# kat_vectors of Random123 1.09 (D. E. Shaw Research): counter, key, result.
KNOWN_ANSWERS = (
    ("00000000 00000000", "00000000 00000000", "6b200159 99ba4efe"),
    ("ffffffff ffffffff", "ffffffff ffffffff", "1cb996fc bb002be7"),
    ("243f6a88 85a308d3", "13198a2e 03707344", "c4923a9c 483df7a0"),
)


def words(text):
    return tuple(np.array([int(word, 16)], np.uint32) for word in text.split())


def numpy_words(seed, step, index, size, purpose):
    """Compute the random bits of one sample each by plain Python integers."""

    def threefry(key, counter):
        keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
        x, y = (a + b & 0xFFFFFFFF for a, b in zip(counter, keys))
        for number in range(20):
            rotation = (13, 15, 26, 6, 17, 29, 16, 24)[number % 8]
            x = x + y & 0xFFFFFFFF
            y = (y << rotation | y >> 32 - rotation) & 0xFFFFFFFF ^ x
            if number % 4 == 3:
                group = number // 4 + 1
                x = x + keys[group % 3] & 0xFFFFFFFF
                y = y + keys[(group + 1) % 3] + group & 0xFFFFFFFF
        return x, y

    half = (size + 1) // 2
    rows = []
    for i in index:
        pairs = [threefry((seed, step), (e, purpose * 2**26 + int(i))) for e in range(half)]
        rows.append([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
    return np.array(rows, np.uint32)[:, :size]


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_published_vectors(counter, key, result):
    received = random.threefry(words(key), words(counter))
    for word, expected in zip(received, words(result)):
        np.testing.assert_array_equal(ops.convert_to_numpy(word), expected)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_values_are_those_of_plain_integers(shape):
    size = int(np.prod(shape))
    bits = numpy_words(7, 11, INDEX, size, random.OFFSET).reshape(8, *shape)
    uniform = random.uniform(7, 11, INDEX, shape, random.OFFSET)
    np.testing.assert_array_equal(ops.convert_to_numpy(uniform), (bits >> 8) * 2.0**-24)
    normal = ops.convert_to_numpy(random.normal(7, 11, INDEX, shape, random.OFFSET))
    assert normal.dtype == np.float32
    inverse = np.vectorize(NormalDist().inv_cdf)
    tails = ((bits & 0x7FFFFFFF) + 0.5) / 2.0**32
    expected = np.where(bits >> 31, 1.0, -1.0) * inverse(tails)
    np.testing.assert_allclose(normal, expected, atol=1e-5)


def test_bits_are_pinned():
    # Were they others, runs could no longer be resumed.
    uniform, normal = (
        ops.convert_to_numpy(draw(3, 5, INDEX, (64, 64, 4), random.NOISE))
        for draw in (random.uniform, random.normal)
    )
    assert hashlib.sha256(uniform.tobytes()).hexdigest().startswith("eac970ec472993e9")
    assert hashlib.sha256(normal.tobytes()).hexdigest().startswith("27ab9c26152c273a")


@pytest.mark.parametrize("jit_compile", [True, False])
def test_compiled_draws_have_the_same_bits(jit_compile):
    def draw(seed, step, index):
        return (
            random.uniform(seed, step, index, (5, 7), random.NOISE),
            random.normal(seed, step, index, (64, 64), random.NOISE),
            random.stratified(seed, step, index),
        )

    compiled = programs.compile_function(draw, jit_compile)
    arguments = (np.uint32(2**32 - 1), np.int32(12345), INDEX)
    received = compiled(*map(ops.convert_to_tensor, arguments))
    for values, expected in zip(received, draw(2**32 - 1, 12345, INDEX)):
        np.testing.assert_array_equal(ops.convert_to_numpy(values), ops.convert_to_numpy(expected))


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
def test_a_sample_does_not_depend_on_the_batch(draw):
    whole = ops.convert_to_numpy(draw(1, 2, INDEX, (4, 3), random.NOISE))
    parts = [draw(1, 2, INDEX[part], (4, 3), random.NOISE) for part in (slice(0, 5), slice(5, 8))]
    np.testing.assert_array_equal(np.concatenate([*map(ops.convert_to_numpy, parts)]), whole)
    even = ops.convert_to_numpy(random.stratified(1, 2, INDEX))[::2]
    np.testing.assert_array_equal(ops.convert_to_numpy(random.stratified(1, 2, INDEX[::2])), even)


def test_draws_differ_in_seed_step_sample_and_purpose():
    def draw(seed=0, step=0, first=0, purpose=random.NOISE):
        return ops.convert_to_numpy(random.normal(seed, step, INDEX + first, (4096,), purpose))

    others = [draw(), draw(seed=1), draw(step=1), draw(first=8), draw(purpose=random.POSTERIOR)]
    correlation = np.corrcoef(np.concatenate(others))
    assert np.abs(correlation - np.eye(40)).max() < 5.0 / 4096**0.5


def test_purposes_do_not_overlap_and_fit():
    last = random.MAX_SAMPLES - 1
    a = random.uniform(0, 0, np.array([last], np.int32), (), random.NOISE)
    b = random.uniform(0, 0, np.array([0], np.int32), (), random.TIMESTEP)
    assert ops.convert_to_numpy(a)[0] != ops.convert_to_numpy(b)[0]
    assert (random.PERTURBATION + 1) * random.MAX_SAMPLES < 2**32


def test_tails_of_normals(monkeypatch):
    bits = np.array([0, 1, 2**13, 2**19 - 1, 2**19, 2**23 - 1, 2**27, 2**31 - 1], np.uint32)
    bits = np.concatenate([bits, bits + np.uint32(2**31)])
    monkeypatch.setattr(random, "_words", lambda *_: ops.convert_to_tensor(bits))
    normal = ops.convert_to_numpy(random.normal(0, 0, INDEX, (), random.NOISE))
    tails = ((bits & 0x7FFFFFFF) + 0.5) / 2.0**32
    expected = np.array([-NormalDist().inv_cdf(tail) for tail in tails])
    expected[8:] *= -1.0
    rare = np.abs(expected) > 4.6
    np.testing.assert_allclose(normal[~rare], expected[~rare], atol=1e-5)
    np.testing.assert_allclose(normal[rare], expected[rare], atol=0.25)
    assert rare.sum() == 6 and np.abs(normal).max() < 6.4


def test_moments_of_normals():
    values = random.normal(0, 0, INDEX, (1 << 18,), random.NOISE)
    values = ops.convert_to_numpy(values).astype(np.float64).ravel()
    error = 4.0 / values.size**0.5  # four standard errors, times each moment's own deviation
    assert abs(values.mean()) < error
    assert abs((values**2).mean() - 1.0) < error * 2**0.5
    assert abs((values**3).mean()) < error * 15**0.5
    assert abs((values**4).mean() - 3.0) < error * 96**0.5
    for bound in (1.0, 2.0, 3.0, 4.0):
        share = 2.0 * NormalDist().cdf(-bound)
        assert abs((np.abs(values) > bound).mean() - share) < error * share**0.5


def test_uniforms_fill_the_interval():
    values = ops.convert_to_numpy(random.uniform(0, 0, INDEX, (1 << 16,), random.NOISE)).ravel()
    assert 0.0 <= values.min() and values.max() < 1.0
    counts = np.histogram(values, 64, (0.0, 1.0))[0]
    expected = values.size / 64
    # Chi-squared of 63 degrees of freedom: mean 63, deviation 11.2.
    assert 63 - 40 < ((counts - expected) ** 2 / expected).sum() < 63 + 40


@pytest.mark.parametrize("size", [2, 5, 16, 64])
def test_stratified_draws_leave_no_large_gap(size):
    index = np.arange(size, dtype=np.int32)
    for step in range(5):
        values = np.sort(ops.convert_to_numpy(random.stratified(9, step, index)))
        gaps = np.diff(np.append(values, values[0] + 1.0))
        assert gaps.max() < 2.0 / size


def test_each_stratified_draw_is_uniform():
    third = [
        float(ops.convert_to_numpy(random.stratified(0, step, INDEX[2:3]))[0])
        for step in range(400)
    ]
    assert abs(np.mean(third) - 0.5) < 4.0 / (12 * 400) ** 0.5
    assert abs(np.var(third) - 1 / 12) < 0.02
