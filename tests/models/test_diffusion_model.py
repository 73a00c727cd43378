"""The U-Net: its inputs, any size, and what is computed once for several of them."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
from keras import ops
from tiny_networks import OF_CLASSES, UNCONDITIONAL, UNET, call, label_inputs, unet_inputs

from kdiffusion.models import kernels
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.layers.attention import SpatialTransformer
from kdiffusion.models.layers.residual import ResnetBlock
from kdiffusion.runtime import backend


@functools.cache
def network(architecture):
    """Build a network that no test changes."""
    return DiffusionModel(architecture)


@pytest.mark.parametrize("height, width", [(8, 8), (7, 5), (1, 3)])
def test_the_unet_takes_any_height_and_width(height, width):
    model = network(UNET)
    assert call(model, unet_inputs(height, width)).shape == (2, height, width, 4)


@pytest.mark.parametrize(
    "architecture",
    [UNET, dataclasses.replace(UNET, depths=(0, 1)), OF_CLASSES],
    ids=["text first", "text below", "classes"],
)
def test_several_texts_denoise_the_same_latents(monkeypatch, architecture):
    model = network(architecture)
    inputs = label_inputs() if architecture.num_classes else unet_inputs()
    for name in {"context", "label"} & inputs.keys():
        value = inputs[name]
        inputs[name] = np.concatenate([value, value[::-1], value[1:], value[1:]])
    tripled = {name: np.concatenate([x, x, x]) if len(x) == 2 else x for name, x in inputs.items()}
    expected = call(model, tripled)
    batches, attend = [], kernels.attend

    def watched(query, *others):
        batches.append(query.shape[0])
        return attend(query, *others)

    monkeypatch.setattr(kernels, "attend", watched)
    np.testing.assert_allclose(call(model, inputs), expected, rtol=1e-4, atol=1e-5)
    # A label comes in before everything, a text after the first self-attention.
    assert batches[0] == (2 if "context" in inputs else 6)
    assert set(batches[1:]) == {6}


@pytest.mark.parametrize(
    "architecture, names",
    [
        (UNET, ("context",)),
        (OF_CLASSES, ("label",)),
        (UNCONDITIONAL, ()),
        (dataclasses.replace(UNET, num_classes=5), ("context", "label")),
    ],
    ids=["text", "classes", "unconditional", "both"],
)
def test_an_architecture_names_the_inputs_of_its_network(architecture, names):
    assert architecture.inputs == names
    assert sorted(network(architecture).input) == sorted([*names, "latents", "timestep"])


def test_an_inpainting_unet_has_more_inputs_than_outputs():
    architecture = dataclasses.replace(UNET, in_channels=9)
    assert (architecture.conditioning_channels, UNET.conditioning_channels) == (5, 0)
    model = network(architecture)
    assert call(model, unet_inputs(channels=9)).shape == (2, 6, 10, 4)


def test_the_unet_depends_on_each_of_its_inputs():
    model = network(UNET)
    inputs = unet_inputs()
    before = call(model, inputs)
    for name, value in inputs.items():
        after = call(model, {**inputs, name: value + 0.5})
        assert np.abs(after - before).max() > 1e-4, name


def test_an_unconditional_unet_is_given_latents_and_timestep_alone():
    model = network(UNCONDITIONAL)
    assert sorted(model.input) == ["latents", "timestep"]
    inputs = label_inputs()
    del inputs["label"]
    assert call(model, inputs).shape == (2, 6, 10, 4)


def test_every_label_gives_another_image():
    model = network(OF_CLASSES)
    inputs = {name: np.repeat(value[:1], 6, axis=0) for name, value in label_inputs().items()}
    inputs["label"] = np.arange(6, dtype="int32")
    outputs = call(model, inputs).reshape(6, -1)
    distances = np.abs(outputs[:, None] - outputs[None]).max(axis=-1)
    assert distances[~np.eye(6, dtype=bool)].min() > 1e-4
    # The label of a class is its row of the table, also when it travels as a float.
    alone = {name: value[2:3] for name, value in inputs.items()}
    as_float = call(model, {**alone, "label": alone["label"].astype("float32")})
    np.testing.assert_allclose(as_float, outputs[2].reshape(as_float.shape), atol=1e-5)


def test_labels_stay_apart_in_bfloat16():
    model = DiffusionModel(dataclasses.replace(OF_CLASSES, num_classes=1000), dtype="bfloat16")
    outputs = [call(model, label_inputs([label])) for label in (600, 601)]
    assert not np.array_equal(*outputs)


def test_timesteps_next_to_each_other_differ_in_bfloat16():
    model = DiffusionModel(UNET, dtype="bfloat16")
    inputs = unet_inputs(batch=1)
    outputs = [
        call(model, {**inputs, "timestep": np.array([t], "float32")}) for t in (980, 981, 981.5)
    ]
    assert not np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[1], outputs[2])


@pytest.mark.parametrize("architecture", [UNET, OF_CLASSES], ids=["text", "classes"])
def test_gradient_checkpointing_changes_no_number(architecture):
    inputs = label_inputs() if architecture.num_classes else unet_inputs()
    plain = network(architecture)
    checkpointed = DiffusionModel(architecture, gradient_checkpointing=True)
    checkpointed.set_weights(plain.get_weights())
    np.testing.assert_array_equal(call(checkpointed, inputs), call(plain, inputs))
    assert checkpointed.get_config()["architecture"] == plain.get_config()["architecture"]


def test_every_block_of_the_unet_is_checkpointed():
    kinds = (ResnetBlock, SpatialTransformer)
    blocks = {layer.name for layer in network(UNET).layers if isinstance(layer, kinds)}
    assert len(blocks) == 12
    assert blocks <= set(DiffusionModel.blocks(UNET))


def test_a_checkpointed_function_keeps_only_what_goes_in():
    if backend.name() != "jax":
        pytest.skip("TensorFlow does not say how much memory a program takes")
    import jax

    generator = np.random.default_rng(0)
    kernel = keras.Variable(generator.normal(size=(64, 64)).astype("float32") / 8)
    x = generator.normal(size=(1024, 64)).astype("float32")

    def block(x, scale):
        for _ in range(16):
            x = ops.tanh(scale * ops.matmul(x, kernel))
        return x

    def program(block):
        def total(value, x):
            with keras.StatelessScope(state_mapping=[(kernel, value)]):
                for _ in range(4):
                    x = block(x, scale=1.5)
            return ops.sum(ops.square(x))

        return jax.jit(jax.grad(total, (0, 1))).lower(kernel.value, x).compile()

    plain, checkpointed = program(block), program(backend.checkpoint(block, [kernel]))
    sizes = [p.memory_analysis().temp_size_in_bytes for p in (plain, checkpointed)]
    assert sizes[1] < 0.5 * sizes[0]
    for found, wanted in zip(checkpointed(kernel.value, x), plain(kernel.value, x)):
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
