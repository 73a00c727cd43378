"""All networks: configurations, files, dtypes. Their numbers are checked elsewhere."""

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from tiny_networks import (
    AUTOENCODER,
    OF_CLASSES,
    TEXT,
    TOWER,
    UNET,
    call,
    label_inputs,
    unet_inputs,
)

from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.layers.base import Conv2D, Dense
from kdiffusion.models.text_encoder import TextEncoder


@pytest.fixture(
    scope="module",
    params=[
        (DiffusionModel, UNET, unet_inputs()),
        (DiffusionModel, OF_CLASSES, label_inputs()),
        (ImageEncoder, AUTOENCODER, np.linspace(-1, 1, 2 * 4 * 6 * 3).reshape(2, 4, 6, 3)),
        (ImageDecoder, AUTOENCODER, np.linspace(-1, 1, 2 * 3 * 5 * 4).reshape(2, 3, 5, 4)),
        (ImageTower, TOWER, np.linspace(-1, 1, 2 * 6 * 6 * 3).reshape(2, 6, 6, 3)),
        (TextEncoder, TEXT, np.array([[38, 1, 2, 39, 39], [38, 5, 6, 7, 39]], "int32")),
    ],
    ids=lambda case: case[0].__name__,
)
def case(request):
    """Return a network, which no test changes, and inputs for it."""
    keras.utils.set_random_seed(7)
    cls, architecture, inputs = request.param
    return cls(architecture), inputs


def test_configuration_round_trip(case):
    model, _ = case
    copy = type(model).from_config(model.get_config())
    assert copy.architecture == model.architecture
    assert [(v.path, v.shape) for v in copy.variables] == [
        (v.path, v.shape) for v in model.variables
    ]


def test_keras_file_round_trip(case, tmp_path):
    model, inputs = case
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert type(copy) is type(model)
    keras.tree.map_structure(np.testing.assert_array_equal, call(copy, inputs), call(model, inputs))


def test_weights_file_round_trip(case, tmp_path):
    model, inputs = case
    model.save_weights(tmp_path / "model.weights.h5")
    copy = type(model)(model.architecture)
    copy.load_weights(tmp_path / "model.weights.h5")
    keras.tree.map_structure(np.testing.assert_array_equal, call(copy, inputs), call(model, inputs))


def test_weight_files_name_the_layers_as_ever(case, tmp_path):
    """Keep the names of the classes when the first files were written."""
    model, _ = case
    model.save_weights(tmp_path / "model.weights.h5")
    names = set()

    def note(path, item):
        if isinstance(item, h5py.Dataset):
            names.add(path.split("/")[0].rstrip("_0123456789"))

    with h5py.File(tmp_path / "model.weights.h5") as file:
        file["layers"].visititems(note)
    autoencoder = {"convolution", "group_norm", "resnet_block", "spatial_attention"}
    unet = {"convolution", "group_norm", "resnet_block", "time_embedding", "downsample", "upsample"}
    expected = {
        DiffusionModel: unet | {"spatial_transformer"},
        ImageEncoder: autoencoder | {"downsample"},
        ImageDecoder: autoencoder | {"upsample"},
        ImageTower: {"patch_embedding", "encoder_layer", "layer_normalization", "dense"},
        TextEncoder: {"token_embedding", "encoder_layer", "layer_norm"},
    }
    assert names - {"label_embedding"} == expected[type(model)]


@pytest.mark.parametrize("name, cls", [("Linear", Dense), ("Convolution", Conv2D)])
def test_layers_are_found_by_the_names_that_they_had(name, cls):
    made = cls(3, kernel_size=2) if cls is Conv2D else cls(3)
    stored = {
        "module": "kdiffusion.models.layers",
        "class_name": name,
        "registered_name": f"kdiffusion>{name}",
        "config": made.get_config(),
    }
    found = keras.saving.deserialize_keras_object(stored)
    assert type(found) is cls and found.get_config() == made.get_config()


def test_summary_lists_the_named_layers(case):
    model, _ = case
    lines = []
    model.summary(print_fn=lines.append)
    assert any("conv_in" in line or "layer_0" in line for line in "\n".join(lines).split("\n"))


def test_layers_have_configurations(case):
    model, _ = case
    for layer in model.layers:
        copy = type(layer).from_config(layer.get_config())
        assert copy.get_config() == layer.get_config()


def test_variables_have_the_same_paths_in_every_instance(case):
    model, _ = case
    again = type(model)(model.architecture, name="another_name")
    assert [v.path for v in again.variables] == [v.path for v in model.variables]


def test_a_model_has_proper_random_initial_kernels(case):
    model, _ = case
    kernels = [v for v in model.variables if v.path.endswith(("kernel", "embedding"))]
    for kernel in kernels:
        values = ops.convert_to_numpy(kernel.value)
        assert 1e-3 < values.std() < 1.0, kernel.path
    assert len({ops.convert_to_numpy(k.value).tobytes() for k in kernels}) == len(kernels)


@pytest.mark.parametrize(
    "policy, tolerance",
    [("bfloat16", 3e-2), ("mixed_bfloat16", 3e-2), ("float16", 5e-3), ("mixed_float16", 5e-3)],
)
def test_half_precision_stays_close(case, policy, tolerance):
    if "bfloat16" not in policy and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float16 kernels on the CPU")
    model, inputs = case
    half = type(model)(model.architecture, dtype=policy)
    half.set_weights(model.get_weights())
    assert half.variables[0].dtype == ("float32" if policy.startswith("mixed") else policy)
    for exact, rounded in zip(
        keras.tree.flatten(call(model, inputs)), keras.tree.flatten(call(half, inputs))
    ):
        error = np.linalg.norm(rounded.astype("float32") - exact) / np.linalg.norm(exact)
        assert 1e-6 < error < tolerance
