"""Samplers as tables: by hand, on an exact denoiser, and in how fast they converge."""

import doctest
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from kdiffusion.sampling import levels as levels_module
from kdiffusion.sampling import noise, one_step, rows, samplers, schedule, spacing
from kdiffusion.sampling.levels import Level, Levels
from kdiffusion.sampling.rows import DENOISED, Row, X, register
from kdiffusion.sampling.samplers import SAMPLERS, Sampler, default_spacing, make_table
from kdiffusion.sampling.schedule import Schedule, level_of_sigma
from kdiffusion.sampling.spacing import Spacing
from kdiffusion.sampling.table import pack, tabulate

EPSILON, V = Schedule(), Schedule(prediction="v")
ZERO_SNR = Schedule(prediction="v", rescale_zero_terminal_snr=True)
TWO_CALLS = ("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde")
DISTILLED = ("lcm", "tcd")


def step_ends(table):
    """Rows that are the last of their step."""
    return [*np.flatnonzero(np.diff(table.steps)), len(table.steps) - 1]


def landings(table):
    return [*zip(table.a[1:], table.s[1:]), table.end]


def trace(table, denoise):
    """Runs a table on symbols: returns (z, then each noise's) coefficients of x after each row."""
    count = len(table.next)
    registers = np.zeros((5, count + 2))
    registers[0, :2] = table.a[0], table.s[0]
    states = []
    for row, matrix in enumerate(table.next):
        x, noise_column = registers[0], np.eye(count + 2)[row + 2]
        denoised = denoise(table, row, x)
        network = (denoised - table.skip[row] * x) / table.out[row]
        registers = matrix @ np.vstack([registers, denoised, network, noise_column])
        states.append(registers[0])
    return states


def exactly_z(table, row, x):
    return np.eye(len(x))[0]


# By hand -----------------------------------------------------------------------------------------


def test_move_by_hand():
    # (0.6, 0.8) to (0.8, 0.6): keep 3/4 of x, of which 0.45 z; 0.35 z is missing.
    at, to = Level(9, 0.6, 0.8), Level(3, 0.8, 0.6)
    assert one_step.move(X, at, to) == pytest.approx({"x": 0.75, "denoised": 0.35})


def test_ancestral_by_hand():
    # From sigma 2 to 1: up = sqrt(1 - 1/4), down = 1/2, as in k-diffusion.
    assert one_step.ancestral(2.0, 1.0, 1.0) == pytest.approx((math.sqrt(0.75), 0.5))
    assert one_step.ancestral(2.0, 1.0, 0.0) == pytest.approx((0.0, 1.0))


def test_ddim_by_hand():
    table = make_table("ddim", EPSILON, 2, Spacing())
    (a, s), (a_to, s_to) = EPSILON.level(501), EPSILON.level(1)
    assert table.next[0, 0, 0] == pytest.approx(s_to / s)
    assert table.next[0, 0, 5] == pytest.approx(a_to - a * s_to / s)
    np.testing.assert_allclose([table.skip[0], table.out[0]], [1 / a, -s / a])
    assert table.timesteps.tolist() == [501, 1] and table.end == EPSILON.level(0)


def test_dpmpp_2m_by_hand():
    # Even steps in log(sigma): the correction is (1 - E)/2 of the last difference, E = 1/2.
    points = [Level(t, *level_of_sigma(sigma)) for t, sigma in [(2, 4.0), (1, 2.0), (0, 1.0)]]
    table = tabulate_points("dpmpp_2m", points)
    expected = np.sqrt(0.5) * 0.5 * np.array([1.5, -0.5])
    np.testing.assert_allclose([table.next[1, 0, 5], table.next[1, 0, 1]], expected)


def test_pndm_repeats_its_first_step_with_the_mean_of_its_ends():
    table = make_table("pndm", EPSILON, 4, Spacing())
    first, again = table.next[0, 0], table.next[1, 0]
    assert table.timesteps.tolist() == [751, 501, 501, 251, 1]
    assert table.steps.tolist() == [0, 0, 1, 2, 3]
    # The outputs at both ends have half the weight that the one had; x is where it started from.
    halves = sorted(again[np.flatnonzero(again)])[:2]
    np.testing.assert_allclose(halves, first[6] / 2)
    assert first[0] == pytest.approx(again.max()) and again[0] == 0


def tabulate_points(name, points, schedule=EPSILON, **options):
    levels = Levels(tuple(points), 1000, schedule, Spacing(lower_order_final=False), 1.0)
    rows_of = SAMPLERS[name].rows
    return tabulate(rows_of(levels, **Sampler(name, **options).options), levels)


@pytest.mark.parametrize("other", ["ddpm", "euler_a"])
def test_ddim_ddpm_and_euler_a_are_one(other):
    ends_at_latents = Spacing(set_alpha_to_one=True)
    ddim = make_table(Sampler("ddim", eta=1.0), EPSILON, 20, ends_at_latents)
    np.testing.assert_array_equal(ddim.next, make_table(other, EPSILON, 20, Spacing()).next)


def test_linear_multistep_of_order_1_is_euler():
    euler = make_table("euler", EPSILON, 10, Spacing("linspace"))
    for name in ("lms", "ipndm"):
        table = make_table(Sampler(name, order=1), EPSILON, 10, Spacing("linspace"))
        np.testing.assert_allclose(table.next, euler.next, atol=1e-14)


def test_lms_on_even_sigmas_has_the_weights_of_adams_and_bashforth():
    points = [Level(t, *level_of_sigma(1.0 + t)) for t in range(6, -1, -1)]
    lms, ipndm = tabulate_points("lms", points), tabulate_points("ipndm", points)
    np.testing.assert_allclose(lms.next, ipndm.next, atol=1e-12)


# On exact denoisers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_known_latents_keep_x_on_its_level(name):
    """If the denoised latents are z, x is a * z + s * (unit noise) at the end of every step."""
    # pndm is not exact for v: it extrapolates raw outputs, as its reference does, and v depends on
    # x. lcm mixes a little of x into the latents.
    schedules = [EPSILON] if name == "pndm" else [EPSILON, V, ZERO_SNR]
    tolerance = 1e-4 if name == "lcm" else 1e-11
    spacings = ("leading", "trailing", "linspace", "trailing+karras")
    for case in itertools.product(schedules, spacings, (2, 3, 5, 20), (1.0, 0.5)):
        chosen, text, num_steps, strength = case
        options = default_spacing(name, Spacing.parse(text))
        table = make_table(name, chosen, num_steps, options, strength)
        states, landing = trace(table, exactly_z), landings(table)
        for row in step_ends(table):
            reached = states[row][0], np.linalg.norm(states[row][1:])
            assert reached == pytest.approx(landing[row], abs=tolerance), case
        # Few steps have long extrapolations; at 20 the coefficients must be tame.
        assert np.abs(table.next).max() < (40 if num_steps == 20 else np.inf), case


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpmpp_2s_a", "dpmpp_sde"])
def test_known_latents_keep_x_on_its_level_within_a_step(name):
    eta = {} if SAMPLERS[name].eta is None else {"eta": 0.0}
    table = make_table(Sampler(name, **eta), EPSILON, 10, Spacing())
    for (a, s), state in zip(landings(table), trace(table, exactly_z)):
        np.testing.assert_allclose(state[:2], [a, s], atol=1e-12)


def variance_error(name, num_steps, options):
    """Error of the variance of x after a run on Gaussian data, whose denoiser is known exactly."""
    sigmas = np.geomspace(EPSILON.sigma(999), EPSILON.sigma(0), num_steps + 1)
    points = [Level(EPSILON.timestep(sigma), *level_of_sigma(sigma)) for sigma in sigmas]
    table = tabulate_points(name, points, **options)
    data = 0.25

    def posterior_mean(table, row, x):
        a, s = table.a[row], table.s[row]
        return a * data / (a**2 * data + s**2) * x

    x = trace(table, posterior_mean)[-1]
    a, s = table.end
    return abs(x[0] ** 2 * data + np.sum(x[1:] ** 2) - (a**2 * data + s**2))


@pytest.mark.parametrize(
    "name, order, options",
    [
        ("ddim", 1, {}),
        ("ddpm", 1, {}),
        ("euler", 1, {}),
        ("euler_a", 1, {}),
        ("heun", 2, {}),
        ("dpm2", 2, {}),
        ("dpm2_a", 2, {}),
        ("dpmpp_2s_a", 2, {}),
        ("dpmpp_sde", 2, {}),
        ("dpmpp_2m", 2, {}),
        ("dpmpp_2m_sde", 2, {}),
        ("dpmpp_3m_sde", 2, {}),
        ("pndm", 2, {}),
        ("ipndm", 2, {}),
        ("deis", 2, {}),
        ("deis", 2, {"order": 3}),
        ("lms", 2, {"order": 2}),
        ("lms", 3, {"order": 3}),
        ("lms", 3.5, {"order": 4}),
        ("unipc", 2, {"order": 1}),
        ("unipc", 3, {"order": 2}),
        ("unipc", 4, {"order": 3}),
    ],
)
def test_order_of_convergence(name, order, options):
    ratio = variance_error(name, 80, options) / variance_error(name, 160, options)
    assert math.log2(ratio) > order - 0.2


def test_correlated_noise_is_what_gives_dpmpp_sde_its_order():
    """The two noises of a step are one Brownian path over overlapping intervals of sigma."""
    points = [Level(t, *level_of_sigma(sigma)) for t, sigma in [(1, 4.0), (0, 1.0)]]
    table = tabulate_points("dpmpp_sde", points, schedule=V)
    inner, outer = table.next[0, 0, 7], table.next[0, 1:5, 7].max()
    total = math.hypot(outer, table.next[1, 0, 7])
    assert inner > 0 and outer / total == pytest.approx(math.sqrt((4 - 2) / (4 - 1)))


# Tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_number_of_rows(name):
    table = make_table(name, EPSILON, 10, Spacing())
    expected = 2 * 10 - 1 if name in TWO_CALLS else 10 + (name == "pndm")
    assert table.next.shape == (expected, 5, 8)
    assert sorted(set(table.steps)) == list(range(10)) and (np.diff(table.steps) >= 0).all()


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_starts_without_memories(name, strength):
    first = make_table(name, EPSILON, 10, Spacing(), strength).next[0]
    assert not first[:, 1:5].any() and first[0].any()


@pytest.mark.parametrize(
    "name, order, count",
    [("ddim", None, 1), ("heun", None, 2), ("dpmpp_2m", None, 2), ("dpmpp_3m_sde", None, 3)]
    + [("lms", 4, 4), ("pndm", None, 4), ("deis", 3, 3), ("unipc", 2, 4), ("unipc", 3, 5)],
)
def test_registers_are_packed(name, order, count):
    table = make_table(Sampler(name, order=order), EPSILON, 20, Spacing())
    assert table.next.any(axis=(0, 2)).tolist() == [True] * count + [False] * (5 - count)


def test_a_register_keeps_its_value_until_it_is_used():
    base = register("base")
    points = [Level(t, *EPSILON.level(t)) for t in (3, 2, 1, 0)]
    levels = Levels(tuple(points), 3, EPSILON, Spacing(), 1.0)
    rows_ = [
        Row(points[0], 0, {"x": DENOISED, "base": 2.0 * X}),
        Row(points[1], 1, {"x": 3.0 * X}),
        Row(points[2], 2, {"x": X + base, "base": X}),
    ]
    matrices = tabulate(rows_, levels).next
    assert matrices[0, 0, 5] == 1 and matrices[0, 1, 0] == 2
    assert matrices[1, 0, 0] == 3 and matrices[1, 1, 1] == 1
    assert matrices[2, 0, 0] == 1 and matrices[2, 0, 1] == 1
    assert not matrices[2, 1:].any(), "nothing reads the last base"


def test_too_many_registers_are_refused():
    points = [Level(t, *EPSILON.level(t)) for t in (2, 1, 0)]
    names = [f"m{i}" for i in range(5)]
    total = sum((register(name) for name in names), start=X)
    rows_ = [
        Row(points[0], 0, {"x": X} | dict.fromkeys(names, DENOISED)),
        Row(points[1], 1, {"x": total}),
    ]
    with pytest.raises(ValueError, match="5 registers.*m4"):
        tabulate(rows_, Levels(tuple(points), 2, EPSILON, Spacing(), 1.0))


@pytest.mark.parametrize("eta, draws", [(0.0, 0), (0.5, 20)])
def test_rows_that_draw_noise(eta, draws):
    assert make_table(Sampler("ddim", eta=eta), EPSILON, 20, Spacing()).draws_noise.sum() == draws


@pytest.mark.parametrize(
    "name, draws",
    [("euler_a", 9), ("dpm2_a", 9), ("dpmpp_sde", 18), ("dpmpp_2m_sde", 9), ("lcm", 9), ("tcd", 9)],
)
def test_the_last_row_draws_no_noise(name, draws):
    drawn = make_table(name, EPSILON, 10, Spacing()).draws_noise
    assert drawn.sum() == draws and not drawn[-1]


@pytest.mark.parametrize("num_steps, strength, run", [(50, 0.8, 40), (50, 0.58, 28), (3, 0.5, 1)])
def test_strength_runs_the_later_levels(num_steps, strength, run):
    # 50 * 0.58 is 28.999999999999996 in floating point, and diffusers rounds it down.
    whole = make_table("dpmpp_2m", EPSILON, num_steps, Spacing())
    part = make_table("dpmpp_2m", EPSILON, num_steps, Spacing(), strength)
    np.testing.assert_array_equal(part.timesteps, whole.timesteps[-run:])
    np.testing.assert_array_equal(part.steps, range(run))


def test_short_runs_are_those_of_few_steps_in_all():
    # 20 steps at strength 0.5 run 10, but end in full order: it is the whole run that counts.
    ends_above = replace(Spacing(), final_sigma="sigma_min")
    long = make_table("dpmpp_2m", EPSILON, 20, ends_above, 0.5)
    short = make_table("dpmpp_2m", EPSILON, 10, ends_above)
    assert long.next[-1, 0, 1] != 0 and short.next[-1, 0, 1] == 0


def test_lower_order_final_is_a_choice():
    full = Spacing(final_sigma="sigma_min", lower_order_final=False)
    assert make_table("dpmpp_2m", EPSILON, 10, full).next[-1, 0, 1] != 0


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(DISTILLED)))
def test_pure_noise_needs_a_network_that_predicts_more_than_noise(name):
    blind = replace(ZERO_SNR, prediction="epsilon")
    with pytest.raises(ValueError, match="zero signal-to-noise"):
        make_table(name, blind, 10, Spacing("trailing"))
    assert make_table(name, ZERO_SNR, 10, Spacing("trailing")).start_scale == 1.0


# Batches -----------------------------------------------------------------------------------------


def test_pack_puts_images_side_by_side():
    tables = [make_table("heun", V, 4, Spacing()), make_table("ddim", EPSILON, 3, Spacing())]
    packed = pack(tables, block=5)
    assert packed.timesteps.shape == (10, 2) and packed.next.shape == (10, 2, 5, 8)
    assert packed.prediction.shape == packed.landing.shape == (10, 2, 2)
    for array in (packed.timesteps, packed.prediction, packed.next, packed.landing):
        assert array.dtype == np.float32
    for image, table in enumerate(tables):
        count = len(table.timesteps)
        np.testing.assert_array_equal(packed.next[:count, image], table.next.astype(np.float32))
        np.testing.assert_array_equal(packed.steps[:count, image], table.steps)
        np.testing.assert_allclose(packed.landing[count - 1, image], table.end)
        np.testing.assert_allclose(packed.landing[0, image], [table.a[1], table.s[1]])
    assert packed.steps.max(axis=0).tolist() == [3, 2]


def test_padding_is_the_identity():
    packed = pack([make_table("ddim", EPSILON, 3, Spacing())], block=4)
    np.testing.assert_array_equal(packed.next[3, 0], np.eye(5, 8))
    np.testing.assert_array_equal(packed.prediction[3, 0], [1, 0])
    assert packed.steps[3, 0] == -1 and not packed.draws_noise[3, 0]
    np.testing.assert_allclose(packed.landing[3, 0], EPSILON.level(0))


def test_pack_of_a_whole_block_adds_nothing():
    table = make_table("ddim", EPSILON, 4, Spacing())
    assert len(pack([table], block=4).timesteps) == len(pack([table]).timesteps) == 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_is_enough(name):
    table = make_table(name, V, 50, Spacing())
    packed = pack([table])
    generator = np.random.default_rng(1)
    start, drawn = generator.standard_normal(64), generator.standard_normal((len(table.next), 64))
    results = []
    for prediction, matrices, dtype in [
        (np.stack([table.skip, table.out], -1), table.next, np.float64),
        (packed.prediction[:, 0], packed.next[:, 0], np.float32),
    ]:
        registers = np.zeros((5, 64), dtype)
        registers[0] = start
        for row, matrix in enumerate(matrices):
            output = np.tanh(registers[0] + dtype(table.timesteps[row] / 1000))
            denoised = prediction[row, 0] * registers[0] + prediction[row, 1] * output
            registers = matrix @ np.vstack([registers, denoised, output, drawn[row].astype(dtype)])
        results.append(registers[0])
    assert np.abs(results[0] - results[1]).max() < 2e-5 * np.abs(results[0]).max()


# Errors and examples -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sampler("eulr"), r"Received: 'eulr'.*'ddim'.*'euler'"),
        (lambda: Sampler("dpm_adaptive"), "out of reach: it chooses its steps"),
        (lambda: Sampler("euler", eta=0.5), r"\['ddim'.*eta=0.5 for 'euler'"),
        (lambda: Sampler("ddim", eta=-0.1), "Received: eta=-0.1"),
        (lambda: Sampler("ddim", eta=1.5), "Received: eta=1.5"),
        (lambda: Sampler("ddim", eta=math.nan), "Received: eta=nan"),
        (lambda: Sampler("unipc", order=4), "1 to 3. Received: order=4"),
        (lambda: Sampler("ddim", order=2), "no choice. Received: order=2"),
        (lambda: make_table("ddim", EPSILON, 2.5, Spacing()), "Received: num_steps=2.5"),
        (lambda: make_table("ddim", EPSILON, 10, Spacing(), 0.0), "Received: strength=0.0"),
        (lambda: make_table("ddim", EPSILON, 10, Spacing(), 1.1), "Received: strength=1.1"),
        (lambda: make_table("ddim", EPSILON, 5, Spacing(), 0.1), "strength >= 0.2"),
        (lambda: make_table("lcm", EPSILON, 8, Spacing(), 0.1), "num_steps <= 5"),
    ],
)
def test_errors_say_what_came_and_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "module", [schedule, spacing, levels_module, rows, samplers, one_step, noise]
)
def test_examples(module):
    assert doctest.testmod(module).failed == 0
