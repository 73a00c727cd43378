"""Targets and weights of diffusion models: by hand, and by the meaning of the terms."""

import numpy as np
import pytest
from keras import ops

from kdiffusion.sampling.schedule import Schedule
from kdiffusion.training.trainers.diffusion_objective import (
    Objective,
    loss_coefficients,
    loss_weight,
    noisy,
    squared_error,
    target,
)

SNR = np.array([0.25, 5.0, 20.0, 2000.0])
PREDICTIONS = ("epsilon", "v", "sample")


@pytest.mark.parametrize(
    "weighting, prediction, expected",
    [
        ("uniform", "epsilon", [1, 1, 1, 1]),
        ("uniform", "v", [1, 1, 1, 1]),
        ("uniform", "sample", [1, 1, 1, 1]),
        ("min_snr", "epsilon", [1, 1, 0.25, 0.0025]),
        ("min_snr", "v", [0.2, 5 / 6, 5 / 21, 5 / 2001]),
        ("min_snr", "sample", [0.25, 5, 5, 5]),
        ("debiased", "epsilon", [2, 5**-0.5, 20**-0.5, 1000**-0.5]),
        ("debiased", "v", [0.8, 1 / 6, 1 / 21, 1 / 2001]),
        ("debiased", "sample", [0.5, 5**0.5, 20**0.5, 1000**0.5]),
    ],
)
def test_weights_by_hand(weighting, prediction, expected):
    weight = loss_weight(SNR, prediction, Objective(weighting))
    np.testing.assert_allclose(weight, expected, rtol=1e-12)


def test_the_limit_of_min_snr_where_there_is_no_signal():
    weight = loss_weight(np.zeros(1), "epsilon", Objective("min_snr"))
    np.testing.assert_array_equal(weight, [1.0])


def test_gamma_is_where_min_snr_starts_to_count_less():
    weight = loss_weight(SNR, "sample", Objective("min_snr", min_snr_gamma=1.0))
    np.testing.assert_allclose(weight, [0.25, 1, 1, 1])


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_a_weighting_means_the_same_for_noise_and_sample(weighting, prediction):
    """The weighted error of the denoised latents, whatever is predicted."""
    schedule = Schedule(prediction=prediction)
    of = loss_coefficients(schedule, Objective(weighting))
    of_sample = loss_coefficients(Schedule(prediction="sample"), Objective(weighting))
    ours, theirs = of.weight / of.to_denoised, of_sample.weight
    # The ratio of timestep 0 is above the bound of the debiased weights.
    np.testing.assert_allclose(ours[1:], theirs[1:], rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_errors_are_told_as_those_of_noise_and_of_denoised(prediction):
    """Against what the prediction's error does to the estimates that follow from it."""
    schedule = Schedule(prediction=prediction)
    of = loss_coefficients(schedule, Objective())
    generator = np.random.default_rng(0)
    z, noise, wrong = generator.normal(size=(3, 1, 2, 2, 3))
    for timestep in (0, 300, 999):
        a, s = of.a[timestep], of.s[timestep]
        x = noisy(z, noise, a, s)
        output = target(prediction, z, noise, a, s) + wrong
        skip, out = schedule.denoised_coefficients(a, s)
        denoised = skip * x + out * output
        error = np.mean(wrong**2)
        np.testing.assert_allclose(
            of.to_denoised[timestep] * error, np.mean((denoised - z) ** 2), rtol=1e-6
        )
        epsilon = (x - a * denoised) / s
        np.testing.assert_allclose(
            of.to_epsilon[timestep] * error, np.mean((epsilon - noise) ** 2), rtol=1e-5
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_right_prediction_denoises_exactly(prediction):
    schedule = Schedule(prediction=prediction)
    z, noise = np.random.default_rng(0).normal(size=(2, 1, 2, 2, 3))
    a, s = schedule.level(500)
    skip, out = schedule.denoised_coefficients(a, s)
    output = target(prediction, z, noise, a, s)
    np.testing.assert_allclose(skip * noisy(z, noise, a, s) + out * output, z, atol=1e-12)


def test_errors_are_float32_means_of_each_sample():
    prediction = ops.cast(np.array([[[[1.0]], [[3.0]]], [[[257.0]], [[0.0]]]]), "bfloat16")
    wanted = np.array([[[[0.0]], [[0.0]]], [[[0.0]], [[0.5]]]], "float32")
    error = squared_error(prediction, wanted)
    assert ops.dtype(error) == "float32"
    # 257 has no bfloat16: it travels as 256, but its square is not rounded once more.
    np.testing.assert_allclose(ops.convert_to_numpy(error), [5.0, 32768.125])


def test_pure_noise_tells_a_network_that_predicts_noise_nothing():
    schedule = Schedule(rescale_zero_terminal_snr=True)
    with pytest.raises(ValueError, match="prediction='epsilon' with zero terminal"):
        loss_coefficients(schedule, Objective())


@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_levels_at_pure_noise_are_finite(prediction):
    schedule = Schedule(prediction=prediction, rescale_zero_terminal_snr=True)
    of = loss_coefficients(schedule, Objective())
    assert (of.a[-1], of.s[-1]) == (0.0, 1.0)
    assert all(np.isfinite(values).all() for values in of)
    # There v is minus the latents, and a wrong one is as wrong as the latents that follow.
    assert of.to_denoised[-1] == 1.0


@pytest.mark.parametrize(
    "weighting, prediction", [("min_snr", "v"), ("min_snr", "sample"), ("debiased", "sample")]
)
def test_weights_that_leave_pure_noise_untrained_are_warned_of(weighting, prediction):
    schedule = Schedule(prediction=prediction, rescale_zero_terminal_snr=True)
    with pytest.warns(UserWarning, match=f"weighting='{weighting}' gives pure noise"):
        of = loss_coefficients(schedule, Objective(weighting))
    assert of.weight[-1] == 0.0
    assert np.isfinite(of.weight).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weighting": "snr"}, "'min_snr', 'debiased'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma=0.0"),
        ({"offset_noise": -0.1}, "offset_noise=-0.1"),
        ({"input_perturbation": float("inf")}, "input_perturbation=inf"),
        ({"caption_dropout": 1.1}, "caption_dropout=1.1"),
        ({"caption_dropout": float("nan")}, "caption_dropout=nan"),
    ],
)
def test_objectives_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)
