import numpy as np
import pytest

from kdiffusion.sampling.noise import noise_stream

# Published by AUTOMATIC1111 beside its Philox generator: seed 0, shape (3, 4).
PHILOX_SEED_0 = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


def test_cpu_noise_is_the_stream_of_torch():
    # torch.randn(1, 4, 64, 64) of seeds 0 and 42.
    seed_0 = noise_stream(0).normal((1, 4, 64, 64)).ravel()
    expected = [-1.1258398, -1.1523602, -0.2505786, -0.4338788]
    np.testing.assert_allclose(seed_0[:4], expected, rtol=0, atol=1e-6)
    seed_42 = noise_stream(42).normal((1, 4, 64, 64)).ravel()
    np.testing.assert_allclose(seed_42[:2], [1.9269152, 1.4872841], rtol=0, atol=1e-6)


def test_cpu_noise_of_few_values():
    # torch.manual_seed(0); torch.randn(3); torch.randn(2): the second value of a pair is kept.
    stream = noise_stream(0)
    np.testing.assert_allclose(
        stream.normal((3,)), [1.5409961, -0.2934289, -2.1787894], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(stream.normal((2,)), [0.5684313, -1.0845224], rtol=0, atol=1e-6)


def test_cpu_noise_draws_the_last_16_values_anew():
    # torch.manual_seed(0); torch.randn(18): the first two are those of the block of 16.
    values = noise_stream(0).normal((18,))
    expected = [-1.1258398, -1.1523602, 0.5666506, 0.7935084, 0.9318266, 1.2590092]
    np.testing.assert_allclose(values[[0, 1, 2, 3, 16, 17]], expected, rtol=0, atol=1e-6)


def test_cuda_noise_of_a_zero_word_is_finite(monkeypatch):
    zeros = np.zeros(2, np.uint32)
    monkeypatch.setattr("kdiffusion.sampling.noise._philox", lambda counter, key: (zeros,) * 4)
    assert np.isfinite(noise_stream(0, "cuda").normal((2,))).all()


def test_cuda_noise_is_the_published_philox():
    values = noise_stream(0, "cuda").normal((3, 4))
    np.testing.assert_allclose(values, PHILOX_SEED_0, rtol=0, atol=1e-6)


def test_cuda_draws_differ_and_repeat():
    stream = noise_stream(7, "cuda")
    first, second = stream.normal((3, 4)), stream.normal((3, 4))
    assert np.abs(first - second).min() > 1e-4
    again = noise_stream(7, "cuda")
    np.testing.assert_array_equal(first, again.normal((3, 4)))
    np.testing.assert_array_equal(second, again.normal((3, 4)))


def test_cuda_noise_uses_the_high_half_of_the_seed():
    low, high = noise_stream(5, "cuda").normal((8,)), noise_stream(5 + 2**32, "cuda").normal((8,))
    assert np.abs(low - high).max() > 0.1


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_draw_is_channels_last_of_a_channels_first_stream(kind):
    drawn = noise_stream(3, kind).draw(5, 7, 4)
    assert drawn.shape == (5, 7, 4) and drawn.dtype == np.float32
    expected = noise_stream(3, kind).normal((4, 5, 7))
    np.testing.assert_array_equal(drawn[2, 6], expected[:, 2, 6])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_noise_is_unit_normal(kind):
    values = noise_stream(11, kind).normal((200_000,)).astype(np.float64)
    # Standard errors: 0.0022 of the mean, 0.0032 of the variance, 0.011 of the fourth moment.
    assert abs(values.mean()) < 0.01
    assert abs(values.var() - 1.0) < 0.015
    assert abs((values**4).mean() - 3.0) < 0.1
    assert np.abs(values).max() < 6.0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_negative_seeds_count_down_from_two_to_the_64(kind):
    np.testing.assert_array_equal(
        noise_stream(-1, kind).normal((20,)), noise_stream(2**64 - 1, kind).normal((20,))
    )


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "42", None])
def test_a_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match="Received: seed="):
        noise_stream(seed)


def test_an_unknown_kind_lists_the_known():
    with pytest.raises(ValueError, match=r"'gpu'.*\['cpu', 'cuda'\]"):
        noise_stream(0, "gpu")
