"""Contrastive training: the loss by hand, duplicates, the temperature, learning, files."""

import dataclasses
import math

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion.evaluation.retrieval import retrieval
from kdiffusion.models.architectures import (
    ImageTowerArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.models.image_tower import ImageTower
from kdiffusion.models.text_encoder import TextEncoder
from kdiffusion.text.tokenizer import SimpleTokenizer
from kdiffusion.training.loop.loop import Loop
from kdiffusion.training.loop.settings import LoopSettings
from kdiffusion.training.trainers import clip
from kdiffusion.training.trainers.clip import (
    CLIPTrainer,
    contrastive_loss,
    exclude_from_decay,
    matches,
)
from kdiffusion.training.trainers.clip_initialization import (
    initialize,
    separate_embeddings,
)
from kdiffusion.weights import clip_folder, variables

TOWER = ImageTowerArchitecture(
    image_size=16,
    patch_size=8,
    width=32,
    depth=1,
    num_heads=2,
    mlp_width=64,
    projection_width=24,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
# An own vocabulary and context, nothing like CLIP's.
TEXT = TextEncoderArchitecture(
    vocabulary_size=40,
    max_length=8,
    width=32,
    depth=1,
    num_heads=2,
    mlp_width=64,
    projection_width=24,
    end_id=39,
)


def made(dtype="float32", **settings):
    image_tower = ImageTower(TOWER, initialize=False, dtype=dtype)
    text_encoder = TextEncoder(TEXT, initialize=False, dtype=dtype)
    initialize(image_tower, seed=1)
    initialize(text_encoder, seed=2)
    return CLIPTrainer(image_tower, text_encoder, **settings)


def batch_of(size, seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 37, (size, 8)).astype("int32")
    tokens[:, 0], tokens[:, -1] = 38, 39
    images = generator.uniform(-1, 1, (size, 16, 16, 3)).astype("float32")
    return {"images": images, "tokens": tokens}


def step(trainer, batch, optimizer):
    """Make one step of `fit`."""
    trainer.compile(optimizer, run_eagerly=keras.backend.backend() == "tensorflow")
    trainer.fit(batch, batch_size=len(batch["images"]), verbose=0)


def learn(trainer, batch, steps):
    trainer.compile(keras.optimizers.Adam(3e-3))
    size = len(batch["images"])
    trainer.fit(batch, batch_size=size, epochs=steps, shuffle=False, verbose=0)


def numpy(tree):
    return keras.tree.map_structure(ops.convert_to_numpy, tree)


# ── the loss ──────────────────────────────────────────────────────────────────────────────────


def test_loss_by_hand():
    logits = np.log([[3.0, 1.0], [1.0, 1.0]]).astype("float32")
    loss = numpy(contrastive_loss(logits, np.eye(2, dtype=bool)))
    # Softmax over rows: 3/4 and 1/2 on the diagonal; over columns the same.
    np.testing.assert_allclose(loss, [math.log(4 / 3), math.log(2)], rtol=1e-6)
    logits = np.log([[2.0, 1.0], [6.0, 1.0]]).astype("float32")
    loss = numpy(contrastive_loss(logits, np.eye(2, dtype=bool)))
    # Rows: 2/3 and 1/7; columns: 1/4 and 1/2.
    expected = [math.log(3 / 2) + math.log(4), math.log(7) + math.log(2)]
    np.testing.assert_allclose(loss, np.array(expected) / 2, rtol=1e-6)


def test_loss_of_several_right_answers_by_hand():
    logits = np.log([[3.0, 1.0], [1.0, 1.0]]).astype("float32")
    loss = numpy(contrastive_loss(logits, np.ones((2, 2), bool)))
    # Half of the target on each: (log 4/3 + log 4) / 2, in both directions.
    expected = [(math.log(4 / 3) + math.log(4)) / 2, math.log(2)]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_duplicates_cost_what_they_must_and_no_more():
    """Two pictures of one caption and a third of another, told apart perfectly."""
    same = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    logits = np.where(same, 50.0, 0.0).astype("float32")
    loss = numpy(contrastive_loss(logits, same))
    np.testing.assert_allclose(loss, [math.log(2), math.log(2), 0], atol=1e-6)
    apart = numpy(contrastive_loss(np.where(np.eye(3), 50.0, 0.0).astype("float32"), same))
    assert apart[0] > 10  # to push a caption from its own copy is punished


@pytest.mark.parametrize(
    "more, pairs",
    [
        ({}, {(0, 2)}),
        ({"label": [5, 6, 7, 6]}, {(0, 2), (1, 3)}),
        ({"label": [-1, -1, -1, -1]}, {(0, 2)}),
        ({"group": [0, 0, 1, 2]}, {(0, 2), (0, 1)}),
        ({"label": [1, 2, 3, 2], "group": [4, 4, 5, 6]}, {(0, 2), (1, 3), (0, 1)}),
    ],
)
def test_matches(more, pairs):
    tokens = np.array([[38, 1, 39], [38, 2, 39], [38, 1, 39], [38, 1, 38]], "int32")
    batch = {"tokens": tokens, **{key: np.array(value, "int32") for key, value in more.items()}}
    expected = np.eye(4, dtype=bool)
    for one, other in pairs:
        expected[one, other] = expected[other, one] = True
    np.testing.assert_array_equal(numpy(matches(batch)), expected)


def test_losses_use_the_networks_the_temperature_and_the_matches():
    trainer = made(logit_scale=1.5)
    batch = batch_of(4)
    batch["tokens"][3] = batch["tokens"][0]
    images = trainer.encode_images(batch["images"])
    texts = trainer.encode_text(batch["tokens"])
    logits = math.exp(1.5) * images @ texts.T
    expected = numpy(contrastive_loss(logits, numpy(matches(batch))))
    losses, logs = numpy(trainer.losses(batch))
    assert losses.keys() == trainer.groups.keys() == {"model"}
    np.testing.assert_allclose(losses["model"], expected, rtol=1e-5)
    np.testing.assert_allclose(logs["temperature"], math.exp(-1.5), rtol=1e-6)


def test_a_match_of_the_batch_is_found_by_any_of_its_copies():
    same = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    logits = np.array([[1, 3, 2], [5, 1, 2], [2, 1, 2]], "float32")
    np.testing.assert_array_equal(numpy(clip.finds_match(logits, same)), [1, 1, 0])
    np.testing.assert_array_equal(numpy(clip.finds_match(logits * np.nan, same)), [0, 0, 0])


def test_unit_vectors():
    vectors = np.array([[3, 4], [3e-3, -4e-3], [0, 0]], "float32")
    found = numpy(clip.unit_vectors(vectors))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.6, -0.8], [0, 0]], rtol=1e-6)


def test_a_network_that_says_nothing_has_finite_gradients():
    trainer = made()
    trainer.text_encoder.get_layer("projection").kernel.assign(np.zeros((32, 24), "float32"))
    step(trainer, batch_of(4), keras.optimizers.SGD(1e-9))
    assert all(np.isfinite(numpy(variable.value)).all() for variable in trainer.variables)


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"images": np.zeros((2, 16, 16, 3))}, r"without \['tokens'\]"),
        ({"tokens": np.zeros((2, 8), "int32")}, r"without \['images'\]"),
        (batch_of(1), "a batch of one"),
    ],
)
def test_batches_that_cannot_be_compared(batch, message):
    with pytest.raises(ValueError, match=message):
        made().losses(batch)


def test_the_loop_does_not_accumulate(tmp_path):
    settings = LoopSettings(batch_size=4, accumulation=2, jit_compile=False, verbose=False)
    with pytest.raises(ValueError, match="accumulation=2"):
        Loop(made(), keras.optimizers.SGD(), None, tmp_path, settings)


# ── the temperature and what is decayed ───────────────────────────────────────────────────────


def test_the_temperature_starts_at_the_papers_value():
    assert float(made().logit_scale.value) == pytest.approx(2.6593, abs=1e-4)
    assert float(numpy(made().losses(batch_of(2))[1]["temperature"])) == pytest.approx(0.07)


@pytest.mark.parametrize("rate, bound", [(1e4, 0.0), (-1e4, math.log(100))])
def test_the_temperature_is_clamped_after_each_step(rate, bound):
    # Equal pictures of different captions want the highest temperature; uphill it is the lowest.
    trainer, batch = made(), batch_of(4)
    batch["images"][:] = batch["images"][:1]
    trainer.image_tower.trainable = trainer.text_encoder.trainable = False
    step(trainer, batch, keras.optimizers.SGD(rate))
    assert float(trainer.logit_scale.value) == pytest.approx(bound)


@pytest.mark.parametrize("logit_scale", [-0.1, 4.7, math.nan])
def test_temperatures_out_of_bounds(logit_scale):
    with pytest.raises(ValueError, match="the logarithm of 100"):
        made(logit_scale=logit_scale)


def test_only_matrices_are_decayed():
    trainer = made()
    optimizer = exclude_from_decay(keras.optimizers.AdamW(0.1, weight_decay=0.5), trainer)
    before = {id(variable): numpy(variable.value) for variable in trainer.trainable_variables}
    gradients = [ops.zeros(variable.shape) for variable in trainer.trainable_variables]
    optimizer.apply(gradients, trainer.trainable_variables)
    decayed = set()
    for variable in trainer.trainable_variables:
        if np.any(numpy(variable.value) != before[id(variable)]):
            decayed.add(variable.path.split("/")[-1])
    assert decayed == {"kernel", "token_embedding", "position_embedding"}


def test_a_loss_scale_is_looked_through():
    inner = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    wrapped = keras.optimizers.LossScaleOptimizer(inner)
    trainer = made()
    assert exclude_from_decay(wrapped, trainer) is wrapped
    inner.apply([ops.zeros(())], [trainer.logit_scale])
    assert float(trainer.logit_scale.value) == pytest.approx(clip.INITIAL_LOGIT_SCALE)


# ── learning ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_it_learns_to_match_pictures_and_captions_of_which_some_are_equal():
    trainer, batch = made(), batch_of(32)
    batch["tokens"][24:] = batch["tokens"][:8]
    vectors = trainer.encode_images(batch["images"]), trainer.encode_text(batch["tokens"])
    assert retrieval(*vectors, batch["tokens"])["image_to_text@1"] < 0.2
    learn(trainer, batch, 40)
    vectors = trainer.encode_images(batch["images"]), trainer.encode_text(batch["tokens"])
    found = retrieval(*vectors, batch["tokens"], ks=(1,))
    assert found == {"image_to_text@1": 1.0, "text_to_image@1": 1.0}
    losses, logs = numpy(trainer.losses(batch))
    assert logs["image_to_text@1"].mean() == logs["text_to_image@1"].mean() == 1.0
    # Half of them have two right answers, so their loss cannot fall below log 2, and comes near it.
    least = np.where(np.arange(32) % 24 < 8, math.log(2), 0.0)
    assert np.all(losses["model"] >= least - 1e-6)
    assert losses["model"].mean() < least.mean() + 0.1


def test_a_frozen_tower_stays():
    trainer, batch = made(), batch_of(4)
    trainer.image_tower.trainable = False
    before = [variable.numpy().copy() for variable in trainer.image_tower.variables]
    step(trainer, batch, keras.optimizers.Adam(1e-3))
    for variable, value in zip(trainer.image_tower.variables, before):
        np.testing.assert_array_equal(numpy(variable.value), value)
    own = {id(variable) for variable in trainer.groups["model"]}
    assert own == {id(v) for v in (*trainer.text_encoder.variables, trainer.logit_scale)}


def test_checkpointed_layers_learn_the_same():
    plain, checkpointed = made(), made()
    checkpointed = CLIPTrainer(
        variables.rebuilt(checkpointed.image_tower, gradient_checkpointing=True),
        variables.rebuilt(checkpointed.text_encoder, gradient_checkpointing=True),
    )
    for trainer in (plain, checkpointed):
        step(trainer, batch_of(4), keras.optimizers.SGD(0.1))
    moved = made()
    for one, other, start in zip(plain.variables, checkpointed.variables, moved.variables):
        # Sums of gradients come in another order, on some processors.
        np.testing.assert_allclose(numpy(one.value), numpy(other.value), atol=5e-6)
    assert np.any(numpy(plain.image_tower.variables[0].value) != moved.image_tower.get_weights()[0])


def test_the_loss_is_float32_whatever_the_networks_compute_in():
    batch = batch_of(8)
    exact = numpy(made().losses(batch)[0]["model"])
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        trainer = made(dtype="mixed_bfloat16")
        losses, logs = numpy(trainer(batch))  # as `fit` calls it
    finally:
        keras.config.set_dtype_policy("float32")
    assert losses["model"].dtype == logs["temperature"].dtype == np.float32
    assert trainer.logit_scale.dtype == "float32"
    np.testing.assert_allclose(logs["temperature"], 0.07, rtol=1e-6)  # bfloat16 has no 2.6593
    np.testing.assert_allclose(losses["model"], exact, atol=0.1)


# ── vectors ───────────────────────────────────────────────────────────────────────────────────


def test_vectors_do_not_depend_on_how_many_are_computed_at_a_time():
    trainer, batch = made(), batch_of(5)
    for encode, inputs in (
        (trainer.encode_images, batch["images"]),
        (trainer.encode_text, batch["tokens"]),
    ):
        whole = encode(inputs)
        assert whole.shape == (5, 24) and whole.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(encode(inputs, batch_size=2), whole, atol=1e-6)
        assert encode(inputs[:0]).shape == (0, 24)


def test_vectors_follow_the_weights():
    trainer, batch = made(), batch_of(3)
    before = trainer.encode_text(batch["tokens"])
    initialize(trainer.text_encoder, seed=3)
    assert np.abs(trainer.encode_text(batch["tokens"]) - before).max() > 0.1


# ── where weights come from and go to ─────────────────────────────────────────────────────────


def test_initialization_is_the_seeds_alone():
    first, again, other = (ImageTower(TOWER) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        initialize(model, seed)
    for one, same, different in zip(first.variables, again.variables, other.variables):
        np.testing.assert_array_equal(numpy(one.value), numpy(same.value))
        is_random = one.path.split("/")[-1] not in ("bias", "beta", "gamma")
        assert np.any(numpy(one.value) != numpy(different.value)) == is_random


def test_initial_deviations_are_those_of_openai():
    record = dataclasses.replace(TEXT, width=128, mlp_width=512, depth=2)
    model = TextEncoder(record)
    initialize(model, 0)
    found = {variable.path: numpy(variable.value).std() for variable in model.variables}
    for path, deviation in {
        "embedding/token_embedding": 0.02,
        "embedding/position_embedding": 0.01,
        "layer_1/attention/key/kernel": 128**-0.5,
        "layer_1/attention/out/kernel": 128**-0.5 / 2,
        "layer_1/fc1/kernel": 256**-0.5,
        "layer_1/fc2/kernel": 128**-0.5 / 2,
        "projection/kernel": 128**-0.5,
        "layer_0/fc1/bias": 0,
    }.items():
        assert found[path] == pytest.approx(deviation, rel=0.1), path


def test_words_and_places_start_apart():
    tower, encoder = ImageTower(TOWER), TextEncoder(TEXT)
    for model in (tower, encoder):
        initialize(model, 1)
    before = [numpy(model.get_layer("embedding").variables) for model in (tower, encoder)]
    separate_embeddings(tower, encoder)
    after = [numpy(model.get_layer("embedding").variables) for model in (tower, encoder)]
    for old, new in zip(before[1], after[1]):
        np.testing.assert_allclose(new, 25 * old, rtol=1e-6)
    (old,), (new,) = (
        [value for value in values[0] if value.shape == (5, 32)] for values in (before, after)
    )
    np.testing.assert_array_equal(new[0], old[0])
    # Row by row; a quarter each: sine and cosine of the column, then of the row.
    columns, rows = np.split(new[1:].reshape(2, 2, 32), 2, axis=-1)
    np.testing.assert_array_equal(rows, columns.swapaxes(0, 1))
    np.testing.assert_array_equal(columns[0], columns[1])
    start, next_one = columns[0]
    np.testing.assert_array_equal(start, np.repeat([0.0, 1.0], 8))
    expected = [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    np.testing.assert_allclose(next_one[[0, 7, 8, 15]], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype, error", [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_saved_and_loaded(tmp_path, dtype, error):
    trainer = made(logit_scale=3.25)
    trainer.save(tmp_path / "clip", dtype=dtype)
    loaded = CLIPTrainer.from_folder(tmp_path / "clip", dtype="float32")
    assert loaded.image_tower.architecture == TOWER
    assert loaded.text_encoder.architecture == TEXT
    assert float(loaded.logit_scale.value) == 3.25
    assert loaded.tokenizer is None
    for one, other in zip(trainer.variables, loaded.variables):
        value = numpy(one.value)
        difference = np.abs(numpy(other.value) - value)
        assert np.all(difference <= error * np.maximum(np.abs(value), 2**-14))


def test_stable_diffusions_text_encoder_has_no_projection():
    trainer, tokens = made(), batch_of(2)["tokens"]
    plain = variables.without_projection(trainer.text_encoder)
    assert plain.architecture == dataclasses.replace(TEXT, projection_width=None)
    found, projected = numpy(plain(tokens)), numpy(trainer.text_encoder(tokens))
    np.testing.assert_array_equal(found["context"], projected["context"])
    np.testing.assert_array_equal(found["pooled"], found["context"][:, -1])


def test_the_tokenizer_goes_with_it(tmp_path):
    tokenizer = SimpleTokenizer.byte_level(max_length=8)
    record = dataclasses.replace(TEXT, vocabulary_size=514, end_id=513)
    trainer = CLIPTrainer(ImageTower(TOWER), TextEncoder(record), tokenizer=tokenizer)
    trainer.save(tmp_path / "clip")
    loaded = CLIPTrainer.from_folder(tmp_path / "clip").tokenizer
    np.testing.assert_array_equal(loaded.rows(["a dog"]), tokenizer.rows(["a dog"]))


def test_a_weight_that_half_cannot_hold_is_refused(tmp_path):
    trainer = made()
    trainer.text_encoder.get_layer("projection").kernel.assign(np.full((32, 24), 1e6, "float32"))
    with pytest.raises(ValueError, match="text_projection.weight"):
        trainer.save(tmp_path / "clip", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(tmp_path):
    made().save(tmp_path / "clip")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="exists already"):
        made().save(tmp_path / "clip")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_dtypes_that_weights_are_not_saved_in(tmp_path):
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        made().save(tmp_path / "clip", dtype="int8")


def test_a_folder_that_lacks_its_temperature(tmp_path):
    made().save(tmp_path / "clip")
    (tmp_path / "clip" / "logit_scale.safetensors").unlink()
    with pytest.raises(ValueError, match="logit_scale"):
        clip_folder.load(tmp_path / "clip")


def test_towers_must_meet():
    narrow = dataclasses.replace(TOWER, projection_width=12)
    with pytest.raises(ValueError, match="projection_width=12 and 24"):
        CLIPTrainer(ImageTower(narrow), TextEncoder(TEXT))
    bare = dataclasses.replace(TEXT, projection_width=None)
    with pytest.raises(ValueError, match="projection_width=24 and None"):
        CLIPTrainer(ImageTower(TOWER), TextEncoder(bare))


def test_the_tokenizer_must_be_the_text_encoders():
    with pytest.raises(ValueError, match="a tokenizer of 514 tokens"):
        made(tokenizer=SimpleTokenizer.byte_level())
