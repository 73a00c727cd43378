"""The settings of a call."""

import warnings

import pytest

from kdiffusion import Sampler, Spacing
from kdiffusion.pipelines.settings import resolve_sampling

KARRAS = Spacing("trailing", "karras", steps_offset=0)
PLAIN = Spacing("trailing", steps_offset=0)


@pytest.mark.parametrize(
    "sampler, spacing, expected",
    [
        (None, None, ("euler", KARRAS)),
        ("dpmpp_2m", None, ("dpmpp_2m", KARRAS)),
        ("ddim", None, ("ddim", PLAIN)),
        (None, "linspace", ("euler", Spacing("linspace", steps_offset=0))),
        (None, "beta", ("euler", Spacing("trailing", "beta", steps_offset=0))),
        ("ddim", "karras", ("ddim", KARRAS)),
        ("ddim", Spacing(), ("ddim", Spacing())),
    ],
)
def test_what_the_user_leaves_out_is_the_checkpoints_own(sampler, spacing, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resolve_sampling(sampler, spacing, ("euler", KARRAS))
    assert found == (Sampler(expected[0]), expected[1])


def test_a_sampler_with_options_stays_as_it_is():
    chosen = Sampler("ddim", eta=0.5)
    assert resolve_sampling(chosen, None, ("euler", KARRAS)) == (chosen, PLAIN)


def test_a_checkpoints_sampler_that_is_not_available_is_replaced_and_warned_of():
    with pytest.warns(UserWarning, match="'edm_euler', which is not available; 'ddim' draws"):
        assert resolve_sampling(None, None, ("edm_euler", KARRAS)) == (Sampler("ddim"), PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_sampling("lms", None, ("edm_euler", KARRAS))[0] == Sampler("lms")


@pytest.mark.parametrize("sampler, spacing", [("eulre", None), ("euler", "sideways")])
def test_unknown_names_list_the_known(sampler, spacing):
    with pytest.raises(ValueError, match="Unknown.*karras|Unknown.*euler_a"):
        resolve_sampling(sampler, spacing, ("euler", PLAIN))
