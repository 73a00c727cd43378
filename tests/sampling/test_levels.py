"""Schedules and the levels that runs visit, against numbers that can be worked out by hand."""

import math

import numpy as np
import pytest

from kdiffusion.sampling.levels import make_levels
from kdiffusion.sampling.samplers import Sampler, default_spacing
from kdiffusion.sampling.schedule import Schedule
from kdiffusion.sampling.spacing import Spacing, spread_sigmas


def timesteps(num_steps, family, **spacing):
    levels = make_levels(Schedule(), num_steps, Spacing(**spacing), family)
    return [level.timestep for level in levels.points[:-1]]


def sigmas(num_steps, family, **spacing):
    levels = make_levels(Schedule(), num_steps, Spacing(**spacing), family)
    return [level.sigma for level in levels.points]


def test_stable_diffusion_schedule():
    schedule = Schedule()
    assert schedule.sigma(0) == pytest.approx(0.0291671582, abs=1e-10)
    assert schedule.sigma(999) == pytest.approx(14.6146412293, abs=1e-9)
    assert schedule.timestep(1.0) == pytest.approx(353.890411, abs=1e-6)
    assert schedule.alphas_cumprod[0] == pytest.approx(1 - 0.00085, abs=1e-12)


def test_linear_schedule():
    alphas_cumprod = Schedule(3, 0.1, 0.3, "linear").alphas_cumprod
    np.testing.assert_allclose(alphas_cumprod, [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7])


def test_cosine_schedule():
    schedule = Schedule(10, beta_schedule="squaredcos_cap_v2")
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    middle = math.cos(0.508 / 1.008 * math.pi / 2) ** 2
    assert schedule.alphas_cumprod[4] == pytest.approx(middle / start)
    # The last beta would be 1.
    assert schedule.alphas_cumprod[9] == pytest.approx(schedule.alphas_cumprod[8] * 0.001)


def test_trained_betas():
    schedule = Schedule(2, trained_betas=[0.5, 0.5])
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.5, 0.25])
    assert hash(schedule) == hash(Schedule(2, trained_betas=(0.5, 0.5)))


def test_zero_terminal_snr():
    plain, schedule = Schedule(), Schedule(rescale_zero_terminal_snr=True, prediction="v")
    assert schedule.alphas_cumprod[-1] == 0.0
    assert schedule.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0])
    assert schedule.level(999) == (0.0, 1.0)
    assert schedule.sigma(999) == math.inf
    assert schedule.denoised_coefficients(0.0, 1.0) == (0.0, -1.0)


@pytest.mark.parametrize("timestep", [0, 1, 353.9, 998.5, 999])
def test_timestep_is_the_inverse_of_sigma(timestep):
    schedule = Schedule()
    a, s = schedule.level(timestep)
    assert a**2 + s**2 == pytest.approx(1.0, abs=1e-14)
    assert s / a == pytest.approx(schedule.sigma(timestep), rel=1e-12)
    # sigma is interpolated itself, timestep in its logarithm.
    assert schedule.timestep(s / a) == pytest.approx(timestep, abs=2e-3)


def test_timesteps_outside_the_schedule_are_clipped():
    assert Schedule().timestep(1e-3) == 0.0
    assert Schedule().timestep(100.0) == 999.0


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_denoised_coefficients_give_the_latents(prediction):
    z, n, a, s = 0.7, -1.3, 0.6, 0.8
    skip, out = Schedule(prediction=prediction).denoised_coefficients(a, s)
    output = {"epsilon": n, "v": a * n - s * z, "sample": z}[prediction]
    assert skip * (a * z + s * n) + out * output == pytest.approx(z)


def test_whole_timesteps():
    assert timesteps(4, "ddim") == [751, 501, 251, 1]
    assert timesteps(4, "ddim", timesteps="trailing") == [999, 749, 499, 249]
    assert timesteps(5, "ddim", timesteps="linspace") == [999, 749, 500, 250, 0]
    assert timesteps(3, "ddim", steps_offset=0) == [666, 333, 0]


def test_timesteps_between():
    assert timesteps(5, "euler", timesteps="linspace") == [999, 749.25, 499.5, 249.75, 0]
    assert timesteps(4, "euler") == [751, 501, 251, 1]


def test_inner_timesteps():
    assert timesteps(4, "dpmpp") == [801, 601, 401, 201]
    assert timesteps(4, "dpmpp", timesteps="trailing") == [999, 749, 499, 249]
    assert timesteps(4, "dpmpp", timesteps="linspace") == [999, 749, 500, 250]


def test_distilled_timesteps():
    assert timesteps(4, "lcm") == [999, 759, 499, 259]
    half = make_levels(Schedule(), 4, Spacing(), "lcm", strength=0.5)
    assert [level.timestep for level in half.points] == [499, 379, 259, 139, 0]


@pytest.mark.parametrize("num_steps", [61, 103, 121])
def test_trailing_has_no_step_too_many(num_steps):
    steps = timesteps(num_steps, "ddim", timesteps="trailing")
    assert len(steps) == num_steps and steps[0] == 999 and steps[-1] > 0


def test_trailing_rounds_ties_as_an_accumulated_range_does():
    # 1000 - 3 * 1000 / 48 is 937.5, which rounds to 938; 1000 / 48 subtracted three times is less.
    assert timesteps(48, "ddim", timesteps="trailing")[3] == 936


def test_ends_of_the_families():
    sigma_0 = Schedule().sigma(0)
    assert sigmas(5, "ddim")[-1] == pytest.approx(sigma_0)
    assert sigmas(5, "ddim", set_alpha_to_one=True)[-1] == 0.0
    assert sigmas(5, "ddpm")[-1] == 0.0
    for family in ("euler", "dpm2", "dpmpp"):
        assert sigmas(5, family)[-1] == 0.0
        assert sigmas(5, family, final_sigma="sigma_min")[-1] == pytest.approx(sigma_0)
    assert sigmas(5, "deis")[-1] == pytest.approx(sigma_0)
    assert sigmas(5, "lcm")[-1] == 0.0
    assert sigmas(5, "tcd")[-1] == pytest.approx(sigma_0)


def test_karras_ends():
    # The euler family spreads between its own timesteps, the dpmpp family over the schedule.
    schedule = Schedule()
    between = sigmas(5, "euler", sigmas="karras")
    assert between[0] == pytest.approx(schedule.sigma(801))
    assert between[4] == pytest.approx(schedule.sigma(1))
    whole = sigmas(5, "dpmpp", sigmas="karras")
    assert whole[0] == pytest.approx(schedule.sigma(999))
    assert whole[4] == pytest.approx(schedule.sigma(0))


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
def test_sigmas_fall_from_end_to_end(sigmas):
    spread = spread_sigmas(Spacing(sigmas=sigmas), 16.0, 1.0, 9)
    assert spread[0] == pytest.approx(16.0) and spread[-1] == pytest.approx(1.0)
    assert (np.diff(spread) < 0).all()


def test_middle_sigmas():
    middle = {
        "karras": ((16 ** (1 / 7) + 1) / 2) ** 7,
        "exponential": 4.0,
        "beta": 8.5,
    }
    for name, expected in middle.items():
        assert spread_sigmas(Spacing(sigmas=name), 16.0, 1.0, 3)[1] == pytest.approx(expected)


def test_beta_sigmas_are_quantiles():
    # The share of Beta(0.6, 0.6) below 1/4, by the substitution x = u**(1/0.6).
    u = (np.arange(200_000) + 0.5) / 200_000

    def share(x):
        return x**0.6 * np.mean((1 - x * u ** (1 / 0.6)) ** -0.4)

    quarter = share(0.25) / (2 * share(0.5))
    count = 1001
    spread = spread_sigmas(Spacing(sigmas="beta"), 1.0, 0.0, count)[::-1]
    assert np.interp(quarter, np.linspace(0, 1, count), spread) == pytest.approx(0.25, abs=1e-5)


def test_only_some_starts_are_scaled():
    first = Schedule().level(999)[1]
    for family, spacing, expected in [
        ("euler", "trailing", first),
        ("euler", "linspace", first),
        ("euler", "leading", 1.0),
        ("ddim", "trailing", 1.0),
        ("dpmpp", "trailing", 1.0),
    ]:
        levels = make_levels(Schedule(), 20, Spacing(spacing), family)
        assert levels.start_scale == expected


def test_pure_noise_has_a_sigma_to_spread_from():
    schedule = Schedule(rescale_zero_terminal_snr=True, prediction="v")
    levels = make_levels(schedule, 20, Spacing("trailing", "karras"), "euler")
    assert levels.points[0].a == 0.0
    assert levels.points[1].sigma < 4096 and math.isfinite(levels.points[1].timestep)


def test_parse_spacing():
    base = Spacing("trailing", "karras", steps_offset=0)
    assert Spacing.parse(None, base) is base
    assert Spacing.parse(base) is base
    assert Spacing.parse("leading", base) == Spacing("leading", None, steps_offset=0)
    assert Spacing.parse("beta", base) == Spacing("trailing", "beta", steps_offset=0)
    assert Spacing.parse("linspace+exponential") == Spacing("linspace", "exponential")


@pytest.mark.parametrize("text", ["karas", "leading+trailing", "karras+beta", "", "leading+"])
def test_an_unknown_spacing_lists_the_known(text):
    with pytest.raises(ValueError, match="Received.*'leading'.*'karras'.*leading\\+karras"):
        Spacing.parse(text)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Spacing("later"), "timesteps='later'"),
        (lambda: Spacing(final_sigma="one"), "'one'.*'sigma_min'"),
        (lambda: Schedule(beta_schedule="cubic"), "'cubic'.*'scaled_linear'"),
        (lambda: Schedule(prediction="x0"), "'x0'.*'sample'"),
        (lambda: Schedule(5, trained_betas=(0.1,)), "Received: 1 betas"),
        (lambda: timesteps(0, "ddim"), "Received: num_steps=0"),
        (lambda: timesteps(1001, "ddim"), "Received: num_steps=1001"),
        (lambda: timesteps(1000, "ddim"), "trailing"),
        (lambda: timesteps(1000, "dpmpp"), "trailing"),
        (lambda: timesteps(5, "ddim", sigmas="karras"), "Received: sigmas='karras'"),
        (lambda: timesteps(51, "lcm"), "num_steps <= 50"),
    ],
)
def test_errors_say_what_came_and_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_all_steps_of_the_schedule():
    assert timesteps(1000, "ddim", timesteps="trailing") == list(range(999, -1, -1))


def test_default_spacing_drops_what_a_sampler_cannot_take():
    karras = Spacing(sigmas="karras")
    assert default_spacing("ddim", karras) == Spacing()
    assert default_spacing(Sampler("euler"), karras) == karras
