"""What the tests share: one tiny model for a whole run, because compiling it takes seconds."""

import pytest


@pytest.fixture(scope="session")
def tiny():
    """`random-tiny` as a plain graph where there is one; do not change it."""
    from kdiffusion import StableDiffusion

    return StableDiffusion.from_preset("random-tiny", jit_compile=False)
