"""Schedules and spacings against diffusers and SciPy.

Samplers are compared by `acceptance/sampler_parity.py`.
"""

import diffusers
import numpy as np
import pytest
import reference_samplers as reference
import scipy.stats

from kdiffusion.sampling.samplers import SAMPLERS
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing, spread_sigmas


def test_every_sampler_has_a_reference():
    assert sorted(reference.REFERENCE) == sorted(SAMPLERS)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedule_equals_its_reference(beta_schedule, zero_terminal_snr):
    ours = Schedule(1000, 0.0001, 0.02, beta_schedule, rescale_zero_terminal_snr=zero_terminal_snr)
    with reference.reference_in_float64():
        theirs = diffusers.DDIMScheduler(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule=beta_schedule,
            rescale_betas_zero_snr=zero_terminal_snr,
        )
    np.testing.assert_allclose(
        ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-9, atol=1e-15
    )


def test_beta_sigmas_equal_the_quantiles_of_scipy():
    shares = 1.0 - np.linspace(0.0, 1.0, 101)
    expected = scipy.stats.beta.ppf(shares, 0.6, 0.6)
    np.testing.assert_allclose(
        spread_sigmas(Spacing(sigmas="beta"), 1.0, 0.0, 101), expected, rtol=0, atol=1e-14
    )
