"""The four networks: shapes, configurations, files, dtypes. Their numbers are checked elsewhere."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion.models import architectures
from kdiffusion.models.diffusion_model import DiffusionModel
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.layers import attention
from kdiffusion.models.layers.attention import SpatialTransformer
from kdiffusion.models.layers.base import ResnetBlock
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.runtime import backend, processor

UNET = architectures.DiffusionArchitecture(
    channels=(8, 16),
    layers_per_level=1,
    depths=(1, 0),
    num_heads=(2, 4),
    context_width=12,
    num_groups=4,
)
UNCONDITIONAL = dataclasses.replace(UNET, context_width=None)
OF_CLASSES = dataclasses.replace(UNCONDITIONAL, num_classes=5)
AUTOENCODER = architectures.AutoencoderArchitecture(
    channels=(8, 16), layers_per_level=1, num_groups=4
)
TEXT = architectures.TextEncoderArchitecture(
    vocabulary_size=40, width=12, depth=3, num_heads=2, mlp_width=24, end_id=39
)

TOWER = architectures.ImageTowerArchitecture(
    image_size=6, patch_size=3, width=12, depth=2, num_heads=2, mlp_width=24, projection_width=5
)


def unet_inputs(height=6, width=10, batch=2, channels=4):
    generator = np.random.default_rng(0)
    return {
        "latents": generator.normal(size=(batch, height, width, channels)).astype("float32"),
        "timestep": np.linspace(981, 1, batch).astype("float32"),
        "context": generator.normal(size=(batch, 7, 12)).astype("float32"),
    }


def label_inputs(labels=(0, 5)):
    inputs = unet_inputs(batch=len(labels))
    del inputs["context"]
    return {**inputs, "label": np.array(labels, "int32")}


def call(model, inputs):
    return keras.tree.map_structure(ops.convert_to_numpy, model(inputs))


@pytest.fixture(
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
    keras.utils.set_random_seed(7)
    cls, architecture, inputs = request.param
    return cls(architecture), inputs


@pytest.mark.parametrize("height, width", [(8, 8), (7, 5), (1, 3)])
def test_the_unet_takes_any_height_and_width(height, width):
    model = DiffusionModel(UNET)
    assert call(model, unet_inputs(height, width)).shape == (2, height, width, 4)


@pytest.mark.parametrize(
    "architecture",
    [UNET, dataclasses.replace(UNET, depths=(0, 1)), OF_CLASSES],
    ids=["text first", "text below", "classes"],
)
def test_several_texts_denoise_the_same_latents(monkeypatch, architecture):
    model = DiffusionModel(architecture)
    inputs = label_inputs() if architecture.num_classes else unet_inputs()
    for name in {"context", "label"} & inputs.keys():
        value = inputs[name]
        inputs[name] = np.concatenate([value, value[::-1], value[1:], value[1:]])
    tripled = {name: np.concatenate([x, x, x]) if len(x) == 2 else x for name, x in inputs.items()}
    expected = call(model, tripled)
    batches, attend = [], attention.attend

    def watched(query, *others):
        batches.append(query.shape[0])
        return attend(query, *others)

    monkeypatch.setattr(attention, "attend", watched)
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
    assert sorted(DiffusionModel(architecture).input) == sorted([*names, "latents", "timestep"])


def test_an_inpainting_unet_has_more_inputs_than_outputs():
    architecture = dataclasses.replace(UNET, in_channels=9)
    assert (architecture.conditioning_channels, UNET.conditioning_channels) == (5, 0)
    model = DiffusionModel(architecture)
    assert call(model, unet_inputs(channels=9)).shape == (2, 6, 10, 4)


def test_the_unet_depends_on_each_of_its_inputs():
    model = DiffusionModel(UNET)
    inputs = unet_inputs()
    before = call(model, inputs)
    for name, value in inputs.items():
        after = call(model, {**inputs, name: value + 0.5})
        assert np.abs(after - before).max() > 1e-4, name


def test_an_unconditional_unet_is_given_latents_and_timestep_alone():
    model = DiffusionModel(UNCONDITIONAL)
    assert sorted(model.input) == ["latents", "timestep"]
    inputs = label_inputs()
    del inputs["label"]
    assert call(model, inputs).shape == (2, 6, 10, 4)


def test_every_label_gives_another_picture():
    model = DiffusionModel(OF_CLASSES)
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


@pytest.mark.parametrize("architecture", [UNET, OF_CLASSES], ids=["text", "classes"])
def test_gradient_checkpointing_changes_no_number(architecture):
    inputs = label_inputs() if architecture.num_classes else unet_inputs()
    plain = DiffusionModel(architecture)
    checkpointed = DiffusionModel(architecture, gradient_checkpointing=True)
    checkpointed.set_weights(plain.get_weights())
    np.testing.assert_array_equal(call(checkpointed, inputs), call(plain, inputs))
    assert checkpointed.get_config()["architecture"] == plain.get_config()["architecture"]


def test_every_block_of_the_unet_is_checkpointed():
    kinds = (ResnetBlock, SpatialTransformer)
    blocks = {layer.name for layer in DiffusionModel(UNET).layers if isinstance(layer, kinds)}
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


def test_autoencoder_shapes_follow_the_downsampling_factor():
    assert AUTOENCODER.downsampling == 2
    encoded = call(ImageEncoder(AUTOENCODER), np.zeros((1, 8, 12, 3), "float32"))
    assert encoded["mean"].shape == encoded["logvar"].shape == (1, 4, 6, 4)
    assert call(ImageDecoder(AUTOENCODER), encoded["mean"]).shape == (1, 8, 12, 3)


def test_the_latent_scale_is_inside_the_autoencoder():
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype("float32")
    plain = ImageEncoder(dataclasses.replace(AUTOENCODER, latent_scale=1.0))
    scaled = ImageEncoder(dataclasses.replace(AUTOENCODER, latent_scale=0.5, latent_shift=0.25))
    scaled.set_weights(plain.get_weights())
    before, after = call(plain, picture), call(scaled, picture)
    np.testing.assert_allclose(after["mean"], (before["mean"] - 0.25) * 0.5, atol=1e-6)
    np.testing.assert_allclose(np.exp(after["logvar"]), np.exp(before["logvar"]) * 0.25, rtol=1e-5)
    decoder = ImageDecoder(dataclasses.replace(AUTOENCODER, latent_scale=1.0))
    unscaled = ImageDecoder(dataclasses.replace(AUTOENCODER, latent_scale=0.5, latent_shift=0.25))
    unscaled.set_weights(decoder.get_weights())
    np.testing.assert_allclose(
        call(unscaled, after["mean"]), call(decoder, before["mean"]), atol=1e-5
    )


def test_logvar_is_clipped_as_in_the_original():
    encoder = ImageEncoder(dataclasses.replace(AUTOENCODER, latent_scale=1.0))
    bias = [v for v in encoder.variables if v.path == "quant_conv/bias"][0]
    bias.assign(np.array([0, 0, 0, 0, 99, -99, 0, 0], "float32"))
    logvar = call(encoder, np.zeros((1, 4, 4, 3), "float32"))["logvar"]
    assert logvar[..., 0].max() == 20.0
    assert logvar[..., 1].min() == -30.0


def test_the_image_tower_normalizes_pictures():
    plain, own = (
        ImageTower(dataclasses.replace(TOWER, mean=(mean,) * 3, std=(std,) * 3))
        for mean, std in ((0.5, 0.5), (0.25, 2.0))
    )
    own.set_weights(plain.get_weights())
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 6, 6, 3)).astype("float32")
    by_hand = ((picture + 1) / 2 - 0.25) / 2
    np.testing.assert_allclose(
        call(own, picture)["pooled"], call(plain, by_hand)["pooled"], atol=1e-5
    )


def test_the_image_tower_sees_every_patch_and_where_it_is():
    tower = ImageTower(TOWER)
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 6, 6, 3)).astype("float32")
    before = call(tower, picture)
    assert before["states"].shape == (1, 5, 12) and before["pooled"].shape == (1, 5)
    # Left and right patches exchanged; the last row blackened.
    for changed in (np.roll(picture, 3, axis=2), picture * (np.arange(6) < 5)[:, None, None]):
        assert np.abs(call(tower, changed)["pooled"] - before["pooled"]).max() > 1e-4
    first = tower.get_layer("post_norm")(before["states"][:, 0])
    pooled = ops.convert_to_numpy(tower.get_layer("projection")(first))
    np.testing.assert_allclose(pooled, before["pooled"], atol=1e-6)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"patch_size": 4}, "image_size=6, patch_size=4"),
        ({"num_heads": 5}, "width=12, num_heads=5"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"mean": (0.5,)}, "each of the 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, "must be positive"),
    ],
)
def test_image_towers_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TOWER, **wrong)


def test_pooled_is_the_state_of_the_first_end_token():
    outputs = call(TextEncoder(TEXT), np.array([[38, 5, 39, 39], [38, 39, 5, 39]], "int32"))
    np.testing.assert_array_equal(outputs["pooled"][0], outputs["context"][0, 2])
    np.testing.assert_array_equal(outputs["pooled"][1], outputs["context"][1, 1])


def test_a_token_does_not_see_those_after_it():
    encoder = TextEncoder(TEXT)
    first = call(encoder, np.array([[38, 5, 6, 39]], "int32"))["context"]
    second = call(encoder, np.array([[38, 5, 7, 9]], "int32"))["context"]
    np.testing.assert_allclose(first[:, :2], second[:, :2], atol=1e-6)
    assert np.abs(first[:, 2:] - second[:, 2:]).min(axis=-1).max() > 1e-4


def test_skipping_layers_equals_a_shallower_encoder():
    encoder = TextEncoder(TEXT)
    shallow = TextEncoder(dataclasses.replace(TEXT, depth=2))
    values = {v.path: v for v in encoder.variables}
    for variable in shallow.variables:
        variable.assign(values[variable.path])
    tokens = np.array([[38, 1, 2, 39]], "int32")
    skipped = ops.convert_to_numpy(encoder(tokens, skip_layers=1)["context"])
    np.testing.assert_allclose(skipped, call(shallow, tokens)["context"], atol=1e-6)
    with pytest.raises(ValueError, match="skip_layers=3"):
        encoder(tokens, skip_layers=3)


@pytest.mark.parametrize("limit", [1, 500, 4000])
def test_attention_in_chunks_of_queries_gives_the_same_numbers(monkeypatch, limit):
    generator = np.random.default_rng(0)
    query = generator.normal(size=(2, 15, 8)).astype("float32")
    key, value = generator.normal(size=(2, 2, 9, 8)).astype("float32")
    whole = ops.convert_to_numpy(attention.attend(query, key, value, 2))
    calls = []
    original = attention._attend
    monkeypatch.setattr(attention, "_MAX_LOGITS", limit)
    monkeypatch.setattr(
        attention, "_attend", lambda *args: calls.append(args[0].shape) or original(*args)
    )
    chunked = ops.convert_to_numpy(attention.attend(query, key, value, 2))
    np.testing.assert_allclose(chunked, whole, atol=1e-6)
    assert calls[0][2] == {1: 1, 500: 3, 4000: 15}[limit]


@pytest.mark.skipif(backend.name() != "tensorflow", reason="XLA casts by itself")
def test_attention_is_in_float32_where_a_processor_has_no_bfloat16(monkeypatch):
    generator = np.random.default_rng(0)
    halves = ops.cast(generator.normal(size=(3, 1, 16, 8)), "bfloat16")
    exact = attention.attend(*ops.cast(halves, "float32"), 2)
    monkeypatch.setattr(processor, "has_bfloat16", lambda: False)
    result = attention.attend(*halves, 2)
    assert result.dtype == "bfloat16"
    both = (ops.cast(x, "float32") for x in (result, ops.cast(exact, "bfloat16")))
    np.testing.assert_array_equal(*map(ops.convert_to_numpy, both))


def test_projection_width_adds_a_projection():
    encoder = TextEncoder(dataclasses.replace(TEXT, projection_width=5))
    assert call(encoder, np.array([[38, 39]], "int32"))["pooled"].shape == (1, 5)


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


def test_timesteps_next_to_each_other_differ_in_bfloat16():
    model = DiffusionModel(UNET, dtype="bfloat16")
    inputs = unet_inputs(batch=1)
    outputs = [
        call(model, {**inputs, "timestep": np.array([t], "float32")}) for t in (980, 981, 981.5)
    ]
    assert not np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[1], outputs[2])


@pytest.mark.parametrize(
    "record, changes, message",
    [
        (UNET, {"num_heads": (3, 4)}, "num_heads"),
        (UNET, {"depths": (1,)}, "depths"),
        (UNET, {"num_groups": 5}, "num_groups"),
        (UNET, {"num_classes": 0}, "num_classes=0"),
        (UNET, {"context_width": 0}, "context_width=0"),
        (AUTOENCODER, {"num_groups": 3}, "num_groups"),
        (TEXT, {"num_heads": 5}, "num_heads"),
        (TEXT, {"activation": "relu"}, "relu"),
    ],
)
def test_records_refuse_what_cannot_be_built(record, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(record, **changes)


def test_a_record_of_another_model_is_refused():
    with pytest.raises(ValueError, match="DiffusionArchitecture"):
        DiffusionModel(AUTOENCODER)
