"""The four networks against diffusers' and transformers' results on tiny random weights.

`golden/make_components.py` made the results, `golden/random_weights.py` makes the weights again.
kdiffusion is off by less than 1e-6; the mistakes of `acceptance/exactness_mutants.py` by 4e-5 or
more.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from golden.random_weights import random_weight

from kdiffusion.weights import variables
from weights_conversion import KINDS, Checkpoint, TensorInfo, read
from weights_conversion import rows as rows_of
from weights_conversion.names import layouts

with np.load(Path(__file__).parents[1] / "golden" / "components.npz") as file:
    GOLDEN = dict(file)
CASES = [key.removesuffix("|config") for key in GOLDEN if key.endswith("|config")]


BAR = 1e-5


@pytest.mark.parametrize("case", CASES)
def test_network_equals_the_reference(case):
    assert largest_error(case, build_case(case)) <= BAR


def test_every_network_is_checked():
    assert {case.split()[0] for case in CASES} == variables.MODELS.keys() - {"image_tower"}


def largest_error(case, model):
    """Return the largest relative L2 distance of an output from the reference's."""
    inputs, expected = arrays(case, "input"), arrays(case, "output")
    outputs = model(inputs if len(inputs) > 1 else next(iter(inputs.values())))
    if not isinstance(outputs, dict):
        outputs = dict(zip(expected, [outputs]))
    assert outputs.keys() == expected.keys()
    return max(
        np.linalg.norm(np.asarray(output) - expected[name]) / np.linalg.norm(expected[name])
        for name, output in outputs.items()
    )


def build_case(case):
    kind, config = case.split()[0], json.loads(GOLDEN[f"{case}|config"].item())
    fields = KINDS[kind].fields(config)
    rows = rows_of(kind, fields)
    infos = {
        row.diffusers.name: TensorInfo(
            layouts.stored_shapes(row.diffusers.layout, row.shape)[0], np.dtype(np.float32)
        )
        for row in rows
    }
    checkpoint = Checkpoint(
        Path("golden"), infos, lambda name: random_weight(name, infos[name].shape)
    )
    model = variables.MODELS[kind](fields, initialize=False, dtype="float32", name=kind)
    variables.assign(model, read(rows, checkpoint, "diffusers"))
    return model


def arrays(case, group):
    prefix = f"{case}|{group}|"
    return {
        key.removeprefix(prefix): array for key, array in GOLDEN.items() if key.startswith(prefix)
    }
