"""Fixtures of the tests of kernels."""

import math

import pytest
from keras import ops

from kdiffusion.runtime import programs, tracing


@pytest.fixture(params=["plain", "fused"])
def run(request, monkeypatch):
    """Compute a function in a plain graph, with its kernels compiled alone or not at all."""
    fused = request.param == "fused"
    monkeypatch.setattr(tracing, "_WORTH_FUSING", 0 if fused else math.inf)

    def run(function, *arrays):
        compiled = programs.compile_function(function, jit_compile=False)
        return ops.convert_to_numpy(compiled(*map(ops.convert_to_tensor, arrays)))

    return run
