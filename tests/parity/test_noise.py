import numpy as np
import pytest
import torch

from kdiffusion.sampling.noise import noise_stream

SHAPES = [(1, 4, 64, 64), (3,), (5,), (2, 4, 17, 9), (16,), (17,), (15,), (31,), (1,), (0,), (2,)]


@pytest.mark.parametrize(
    "seed", [0, 1, 42, 2**32 - 1, 2**32, 2**32 + 5, 2**63 + 5, 2**64 - 1, -1, -5, -(2**63)]
)
def test_cpu_noise_equals_torch_for_successive_draws(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    stream = noise_stream(seed)
    for shape in SHAPES:
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(stream.normal(shape), expected, rtol=0, atol=1e-6)


def test_cpu_noise_equals_torch_for_every_count():
    for count in range(70):
        generator = torch.Generator("cpu").manual_seed(count)
        stream = noise_stream(count)
        for _ in range(3):
            expected = torch.randn(count, generator=generator).numpy()
            np.testing.assert_allclose(stream.normal((count,)), expected, rtol=0, atol=1e-6)
