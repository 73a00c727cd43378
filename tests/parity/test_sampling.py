import diffusers
import numpy as np
import pytest
import reference_samplers as reference
import scipy.stats
from reference_samplers import Case

from kdiffusion.sampling.samplers import SAMPLERS, Sampler
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing, spread_sigmas

# The whole grid is run by tests/acceptance/sampler_parity.py.
STEPS = {1: "epsilon", 5: "epsilon", 20: "v"}


def cases(sampler):
    return [
        case for case in reference.grid(sampler, STEPS) if case.prediction == STEPS[case.num_steps]
    ]


def test_every_sampler_has_a_reference():
    assert sorted(reference.REFERENCE) == sorted(SAMPLERS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_equals_its_reference_call_by_call(sampler):
    compared = [
        (reference.largest_error(case) / reference.tolerance(case), case) for case in cases(sampler)
    ]
    assert compared
    for error, case in compared:
        assert error < 1.0, case


@pytest.mark.parametrize("case", list(reference.zero_terminal_snr_grid(STEPS)), ids=str)
def test_zero_terminal_snr_equals_its_reference(case):
    assert reference.largest_error(case) < reference.tolerance(case)


@pytest.mark.parametrize("case", list(reference.image_to_image_grid((5, 20))), ids=str)
def test_run_from_the_middle_equals_its_reference(case):
    assert reference.largest_error(case) < reference.tolerance(case)


@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_ipndm_on_the_schedule_of_diffusers(num_steps):
    assert reference.error_of_ipndm_on_its_own_schedule(num_steps) < 1e-12


@pytest.mark.parametrize("sigmas", reference.SIGMA_SPACINGS)
@pytest.mark.parametrize("timesteps", reference.TIMESTEP_SPACINGS)
def test_dpmpp_3m_without_noise_is_the_third_order_solver_of_diffusers(timesteps, sigmas):
    case = Case(Sampler("dpmpp_3m_sde"), 20, timesteps, sigmas)
    assert reference.error_of_3m_without_noise(case) < 1e-9


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
