"""What the tests share: one tiny model for a whole run, because compiling it takes seconds."""

import os

import pytest

import kdiffusion  # before Keras, which loads TensorFlow: see there

# Tests leave nothing in the home of whoever runs them, and find nothing there.
os.environ["KDIFFUSION_COMPILE_CACHE"] = "off"


@pytest.fixture(scope="session")
def tiny():
    """`random-tiny` as a plain graph where there is one; do not change it."""
    from kdiffusion import StableDiffusion

    return StableDiffusion.from_preset("random-tiny", jit_compile=False)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A stand-in for the model, in an empty folder, with the user's environment put back."""
    from cli_stand_in import StandIn, chosen_sampling

    from kdiffusion.cli import generate

    class Fresh(StandIn):
        asked: dict = {}

    monkeypatch.setitem(vars(kdiffusion), "open_model", Fresh.from_preset)
    monkeypatch.setattr(generate, "_sampling", chosen_sampling)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"))
    monkeypatch.chdir(tmp_path)
    return Fresh
