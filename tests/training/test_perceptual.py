"""The perceptual network: a distance, and the converter of its public weights."""

import numpy as np
import pytest
from keras import ops
from safetensors.numpy import save_file

from kdiffusion.runtime import backend
from kdiffusion.training.trainers.perceptual import Perceptual, PerceptualArchitecture

TINY = PerceptualArchitecture(channels=(4, 6), layers_per_level=(1, 2))


def pictures(seed, size=16):
    return np.random.default_rng(seed).uniform(-1, 1, (2, size, size, 3)).astype("float32")


def files(folder, **changes):
    """Write both files under the public names; a change of `None` leaves a tensor out."""
    generator = np.random.default_rng(0)
    shapes = {
        "features.0.weight": (4, 3, 3, 3),
        "features.0.bias": (4,),
        "features.3.weight": (6, 4, 3, 3),
        "features.3.bias": (6,),
        "features.5.weight": (6, 6, 3, 3),
        "features.5.bias": (6,),
        "classifier.6.bias": (1000,),
        "lin0.model.1.weight": (1, 4, 1, 1),
        "lin1.model.1.weight": (1, 6, 1, 1),
        **changes,
    }
    tensors = {
        name: generator.uniform(0, 1, shape).astype("float32")
        for name, shape in shapes.items()
        if shape is not None
    }
    for file, is_linear in (("vgg16", False), ("linear", True)):
        own = {name: x for name, x in tensors.items() if name.startswith("lin") == is_linear}
        save_file(own, folder / f"{file}.safetensors")
    return folder / "vgg16.safetensors", folder / "linear.safetensors"


def test_it_is_a_distance():
    network = Perceptual(TINY)
    a, b = pictures(0), pictures(1)
    np.testing.assert_array_equal(ops.convert_to_numpy(network(a, a)), [0, 0])
    there, back = (ops.convert_to_numpy(network(*pair)) for pair in ((a, b), (b, a)))
    np.testing.assert_allclose(there, back, rtol=1e-6)
    assert there.shape == (2,) and (there > 1e-3).all()
    assert not network.trainable_variables


def test_features_that_are_all_zero_have_a_finite_gradient():
    network = Perceptual(TINY)
    for variable in network.features.variables:
        variable.assign(ops.zeros(variable.shape))
    _, gradient = backend.value_and_gradient(
        lambda x: ops.sum(network(pictures(0), x)), ops.convert_to_tensor(pictures(1))
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(gradient), 0)


def test_the_public_weights_are_read(tmp_path):
    paths = files(tmp_path)
    network = Perceptual.from_checkpoints(*paths, TINY)
    values = {v.path: ops.convert_to_numpy(v) for v in network.variables}
    assert values["linear_1/kernel"].shape == (6, 1)
    assert values["conv_1_1/kernel"].shape == (3, 3, 6, 6)
    # The first convolution of a picture that is one standardized pixel.
    kernel = values["conv_0_0/kernel"]
    point = np.zeros((1, 3, 3, 3), "float32")
    point[0, 1, 1] = 1
    mean, deviation = np.float32([-0.030, -0.088, -0.188]), np.float32([0.458, 0.448, 0.450])
    outside = (0 - mean) / deviation
    found = ops.convert_to_numpy(network.features(point)[0])[0, 1, 1]
    inside = (1 - mean) / deviation
    expected = np.einsum("hwio,i->o", kernel, outside) + kernel[1, 1].T @ (inside - outside)
    np.testing.assert_allclose(found, expected + values["conv_0_0/bias"], rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"features.3.weight": None},
        {"features.7.weight": (6, 6, 3, 3)},
        {"features.5.bias": (7,)},
        {"lin1.model.1.weight": None},
        {"lin2.model.1.weight": (1, 6, 1, 1)},
        {"lin0.model.1.weight": (1, 5, 1, 1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_weights_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change)).replace(".", r"\.")):
        Perceptual.from_checkpoints(*files(tmp_path, **change), TINY)


def test_levels_need_both_numbers():
    with pytest.raises(ValueError, match="layers_per_level"):
        PerceptualArchitecture(channels=(4, 6), layers_per_level=(1,))
