"""The trainer of diffusion models: what it draws, what it drops, what it moves, what it writes."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion import (
    DiffusionModel,
    ImageDecoder,
    ImageEncoder,
    LatentDiffusion,
    PixelDiffusion,
    Schedule,
    SimpleTokenizer,
    StableDiffusion,
    TextEncoder,
)
from kdiffusion.models.architectures import (
    AutoencoderArchitecture,
    DiffusionArchitecture,
    TextEncoderArchitecture,
)
from kdiffusion.training import DiffusionTrainer, Objective
from kdiffusion.training import random as draws
from kdiffusion.training.loop import gradients
from kdiffusion.training.trainers.diffusion_objective import (
    loss_coefficients,
    noisy,
    squared_error,
    target,
    timesteps,
)
from kdiffusion.weights.variables import arrays_of

# As few layers as there are kinds of them: building and compiling is what takes time here.
NETWORK = DiffusionArchitecture(
    in_channels=3,
    out_channels=3,
    channels=(8,),
    layers_per_level=1,
    depths=(0,),
    num_heads=(2,),
    context_width=None,
    num_groups=4,
)
CODEC = AutoencoderArchitecture(
    channels=(8, 8), layers_per_level=1, num_groups=4, mid_attention=False
)
TEXT = TextEncoderArchitecture(
    vocabulary_size=514, max_length=77, width=8, depth=1, num_heads=2, mlp_width=16, end_id=513
)
SCHEDULE = Schedule(prediction="v")
BATCH = 4
EMPTY = np.array([512, 513, 513], "int32")


def network(**changes):
    return DiffusionModel(dataclasses.replace(NETWORK, **changes))


# For all tests that leave weights alone.
shared_network = functools.cache(network)
text_encoder = functools.cache(lambda: TextEncoder(TEXT))
image_encoder = functools.cache(lambda: ImageEncoder(CODEC))


def random(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype("float32")


def images(count=BATCH):
    return random(count, 8, 8, 3)


def tokens(count=BATCH):
    middle = np.random.default_rng(1).integers(0, 512, count)
    return np.stack([np.full(count, 512), middle, np.full(count, 513)], axis=1).astype("int32")


def losses(trainer, batch, key=0, step=0):
    found, figures = trainer.losses(batch, key, step)
    return (
        {name: ops.convert_to_numpy(loss) for name, loss in found.items()}["model"],
        {name: ops.convert_to_numpy(values) for name, values in figures.items()},
    )


def text_trainer(objective=Objective(), **settings):
    model = shared_network(context_width=8)
    return DiffusionTrainer(
        model, SCHEDULE, text_encoder=text_encoder(), objective=objective, **settings
    )


# ── the loss ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_the_loss_by_hand(prediction):
    schedule = Schedule(prediction=prediction)
    objective = Objective("min_snr", offset_noise=0.1, input_perturbation=0.2)
    trainer = DiffusionTrainer(shared_network(), schedule, objective=objective)
    z, index = images(), np.arange(BATCH, dtype="int32")
    share = ops.convert_to_numpy(draws.stratified(5, 3, index))
    timestep = np.floor(share * 1000).astype(int)
    of = loss_coefficients(schedule, objective)
    a, s = (x[timestep].astype("float32").reshape(-1, 1, 1, 1) for x in (of.a, of.s))
    noise = ops.convert_to_numpy(draws.normal(5, 3, index, (8, 8, 3), draws.NOISE))
    noise = noise + 0.1 * ops.convert_to_numpy(draws.normal(5, 3, index, (1, 1, 3), draws.OFFSET))
    further = ops.convert_to_numpy(draws.normal(5, 3, index, (8, 8, 3), draws.PERTURBATION))
    x = noisy(z, noise + 0.2 * further, a, s)
    output = trainer.diffusion_model({"latents": x, "timestep": timestep.astype("float32")})
    error = ops.convert_to_numpy(squared_error(output, target(prediction, z, noise, a, s)))
    found, figures = losses(trainer, {"images": z}, 5, 3)
    np.testing.assert_allclose(found, of.weight[timestep] * error, rtol=1e-4)
    np.testing.assert_allclose(
        figures["denoised_error"], of.to_denoised[timestep] * error, rtol=1e-4
    )
    np.testing.assert_allclose(figures["epsilon_error"], of.to_epsilon[timestep] * error, rtol=1e-4)


def test_a_sample_has_the_same_loss_wherever_the_batch_is_cut():
    trainer = text_trainer(Objective(caption_dropout=0.5), empty={"tokens": EMPTY})
    index = np.arange(BATCH, dtype="int32")
    batch = {"images": images(), "tokens": tokens(), "index": index}
    whole, _ = losses(trainer, batch)
    halves = [{name: x[part] for name, x in batch.items()} for part in (slice(2), slice(2, 4))]
    parts = np.concatenate([losses(trainer, half)[0] for half in halves])
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


@pytest.mark.parametrize("change", [{"key": 1}, {"step": 1}], ids=str)
def test_every_run_and_step_draws_anew(change):
    trainer = DiffusionTrainer(shared_network(), SCHEDULE)
    first, _ = losses(trainer, {"images": images()})
    assert np.abs(losses(trainer, {"images": images()}, **change)[0] - first).min() > 1e-6


@pytest.mark.parametrize("stratified, widest", [(True, 0.05), (False, 0.5)])
def test_timesteps_are_whole_and_uniform_and_spread_if_stratified(stratified, widest):
    index = np.arange(64, dtype="int32")
    drawn = np.stack(
        [
            ops.convert_to_numpy(timesteps(0, step, index, SCHEDULE.num_timesteps, stratified))
            for step in range(50)
        ]
    )
    assert drawn.dtype == np.int32
    assert drawn.min() < 10 and 990 < drawn.max() < 1000
    assert abs(drawn.mean() - 499.5) < 30
    gaps = np.diff(np.sort(drawn, axis=1), axis=1) / 1000
    assert gaps.max() < widest
    assert (gaps.max() > 0.05) != stratified


def test_losses_are_float32_under_mixed_precision():
    exact = DiffusionTrainer(shared_network(), SCHEDULE)
    mixed = DiffusionTrainer(DiffusionModel(NETWORK, dtype="mixed_bfloat16"), SCHEDULE)
    mixed.diffusion_model.set_weights(exact.diffusion_model.get_weights())
    found, figures = losses(mixed, {"images": images()})
    assert found.dtype == np.float32
    assert all(values.dtype == np.float32 for values in figures.values())
    wanted, _ = losses(exact, {"images": images()})
    assert 1e-6 < np.abs(found / wanted - 1).max() < 0.05


# ── latents ───────────────────────────────────────────────────────────────────────────────────


def latent_trainer(make_network):
    model = make_network(in_channels=4, out_channels=4)
    return DiffusionTrainer(model, SCHEDULE, image_encoder=image_encoder())


def test_cached_moments_give_the_loss_of_the_pictures():
    trainer = latent_trainer(shared_network)
    distribution = trainer.image_encoder(images())
    cached = {name: ops.convert_to_numpy(distribution[name]) for name in ("mean", "logvar")}
    wanted, _ = losses(trainer, {"images": images()})
    np.testing.assert_allclose(losses(trainer, cached)[0], wanted, rtol=1e-5)
    without = DiffusionTrainer(trainer.diffusion_model, SCHEDULE)
    np.testing.assert_allclose(losses(without, cached)[0], wanted, rtol=1e-5)


def test_latents_are_drawn_anew_at_each_step():
    trainer = DiffusionTrainer(shared_network(in_channels=4, out_channels=4), SCHEDULE)
    mean, logvar = random(1, 4, 4, 4), np.full((1, 4, 4, 4), -1.0, "float32")
    drawn = [
        ops.convert_to_numpy(
            trainer.latents(
                {"mean": mean, "logvar": logvar},
                lambda shape, purpose: draws.normal(0, step, np.zeros(1, "int32"), shape, purpose),
            )
        )
        for step in range(200)
    ]
    deviation = (np.array(drawn) - mean) / np.exp(-0.5)
    assert abs(deviation.mean()) < 0.05
    assert abs(deviation.std() - 1) < 0.05


# ── conditions ────────────────────────────────────────────────────────────────────────────────


def dropped(trainer, batch, count=400):
    """Return the network's inputs in place of its conditions, sample by sample."""
    index = np.arange(count, dtype="int32")

    def uniform(shape, purpose):
        return draws.uniform(0, 0, index, shape, purpose)

    conditions = trainer.conditions(batch, uniform)
    return {name: ops.convert_to_numpy(value) for name, value in conditions.items()}


def test_caption_dropout_puts_the_empty_caption_in():
    count = 400
    objective = Objective(caption_dropout=0.25)
    trainer = text_trainer(objective, empty={"tokens": EMPTY})
    context = dropped(trainer, {"tokens": tokens(count)})["context"]
    encoder = trainer.text_encoder
    given = ops.convert_to_numpy(encoder(tokens(count))["context"])
    empty = ops.convert_to_numpy(encoder(EMPTY[None])["context"])[0]
    is_empty = np.isclose(context, empty, atol=1e-5).all(axis=(1, 2))
    assert 0.15 < is_empty.mean() < 0.35
    np.testing.assert_allclose(context[~is_empty], given[~is_empty], atol=1e-5)
    # Cached contexts lose the same captions.
    cached = text_trainer(objective, empty={"context": empty})
    again = dropped(cached, {"context": given})["context"]
    np.testing.assert_allclose(again, context, atol=1e-5)


def test_classes_are_dropped_with_the_captions():
    objective = Objective(caption_dropout=0.25)
    model = shared_network(context_width=8, num_classes=5)
    context, empty = random(400, 3, 8), np.zeros((3, 8), "float32")
    trainer = DiffusionTrainer(model, SCHEDULE, objective=objective, empty={"context": empty})
    label = np.arange(400, dtype="int32") % 5
    given = dropped(trainer, {"context": context, "label": label})
    lost = given["label"] == 5
    assert 0.15 < lost.mean() < 0.35
    np.testing.assert_array_equal(given["label"][~lost], label[~lost])
    np.testing.assert_array_equal((given["context"] == 0).all(axis=(1, 2)), lost)


def test_nothing_is_dropped_unless_asked_for():
    model = shared_network(num_classes=5)
    trainer = DiffusionTrainer(model, SCHEDULE)
    label = np.arange(400, dtype="int32") % 5
    np.testing.assert_array_equal(dropped(trainer, {"label": label})["label"], label)


# ── what learns ───────────────────────────────────────────────────────────────────────────────


def gradients_of(trainer, batch):
    """Compute gradients by path, as `Loop` does."""
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(trainer.groups["model"])
    programs = gradients.programs(trainer, {"model": optimizer}, (), jit_compile=False)
    batch = {**batch, "index": np.arange(len(next(iter(batch.values()))), dtype="int32")}
    found = programs.gradients(None, batch, 0, 0)
    paths = [variable.path for variable in trainer.groups["model"]]
    arrays = [ops.convert_to_numpy(gradient) for gradient in found.sums["model"]]
    return dict(zip(paths, arrays)), ops.convert_to_numpy(found.losses["model"])


@pytest.mark.parametrize("trained", [False, True])
def test_the_text_encoder_learns_only_when_told(trained):
    trainer = text_trainer(train_text_encoder=trained)
    found, _ = gradients_of(trainer, {"images": images(), "tokens": tokens()})
    of_text = [path for path in found if path.startswith(("embedding/", "layer_0/", "final_norm/"))]
    assert bool(of_text) == trained
    assert len(found) - len(of_text) == len(trainer.diffusion_model.trainable_variables)
    assert all(np.abs(found[path]).max() > 0 for path in of_text)
    assert [v.path for v in trainer.trainable_variables] == list(found)
    # The encoders are not marked: others may train them.
    assert trainer.text_encoder.trainable


def test_a_projection_that_is_not_used_is_not_trained():
    encoder = TextEncoder(dataclasses.replace(TEXT, projection_width=6))
    trainer = DiffusionTrainer(
        shared_network(context_width=8), SCHEDULE, text_encoder=encoder, train_text_encoder=True
    )
    assert not [v for v in trainer.groups["model"] if v.path.startswith("projection")]


def test_gradient_checkpointing_gives_the_same_gradients():
    plain = DiffusionTrainer(shared_network(num_classes=5), SCHEDULE)
    checkpointed = DiffusionTrainer(
        DiffusionModel(plain.diffusion_model.architecture, gradient_checkpointing=True), SCHEDULE
    )
    checkpointed.diffusion_model.set_weights(plain.diffusion_model.get_weights())
    batch = {"images": images(), "label": np.arange(BATCH, dtype="int32")}
    wanted, loss = gradients_of(plain, batch)
    found, same = gradients_of(checkpointed, batch)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    for path, gradient in wanted.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[path], gradient, atol=1e-4 * scale, err_msg=path)


@pytest.mark.slow
def test_fit_lowers_the_loss():
    keras.utils.set_random_seed(3)
    model = DiffusionModel(dataclasses.replace(NETWORK, num_classes=5))
    trainer = DiffusionTrainer(model, SCHEDULE, objective=Objective(caption_dropout=0.1))
    trainer.compile(keras.optimizers.Adam(3e-3), jit_compile=False)
    batch = {"images": images(8), "label": np.arange(8, dtype="int32") % 5}
    history = trainer.fit(batch, batch_size=8, epochs=30, verbose=0).history["loss"]
    assert np.mean(history[-5:]) < 0.8 * np.mean(history[:5])


def test_encoders_are_among_the_variables_that_fit_leaves_alone():
    trainer = latent_trainer(shared_network)
    fixed = {id(v) for v in trainer.non_trainable_variables}
    assert {id(v) for v in trainer.image_encoder.variables} <= fixed
    trained = [id(v) for v in trainer.trainable_variables]
    assert trained == [id(v) for v in trainer.diffusion_model.trainable_variables]


# ── whole models ──────────────────────────────────────────────────────────────────────────────


def stable_diffusion():
    parts = {
        "diffusion_model": network(in_channels=4, out_channels=4, context_width=8),
        "text_encoder": text_encoder(),
        "image_encoder": image_encoder(),
        "image_decoder": ImageDecoder(CODEC),
    }
    tokenizer = SimpleTokenizer.byte_level()
    return StableDiffusion.from_parts(
        parts, SCHEDULE, (16, 16), tokenizer=tokenizer, jit_compile=False
    )


def test_a_trainer_of_a_model_trains_and_saves_it(tmp_path):
    model = stable_diffusion()
    trainer = DiffusionTrainer.from_model(
        model, objective=Objective(caption_dropout=0.1), gradient_checkpointing=True
    )
    assert model.diffusion_model.gradient_checkpointing
    assert trainer.diffusion_model is model.diffusion_model
    batch = {"images": random(4, 16, 16, 3), "tokens": model.tokenizer.rows(["a", "b", "c", ""])}
    assert losses(trainer, batch)[0].shape == (4,)
    for variable in trainer.trainable_variables:  # as if they were trained
        variable.assign(variable + 0.25)
    trainer.save(tmp_path / "model")
    loaded = StableDiffusion.from_preset(tmp_path / "model", jit_compile=False)
    for part in loaded.components():
        expected = arrays_of(model.components()[part].load(model))
        for path, array in arrays_of(loaded.components()[part].load(loaded)).items():
            np.testing.assert_array_equal(array, expected[path], err_msg=path)
    assert loaded.tokenizer.vocab == model.tokenizer.vocab
    assert (loaded.schedule, loaded.img_height) == (model.schedule, 16)


def test_what_is_cached_is_not_loaded():
    model = stable_diffusion()
    trainer = DiffusionTrainer.from_model(model, cached=("latents", "context"))
    assert (trainer.image_encoder, trainer.text_encoder) == (None, None)
    parts = model.components()
    assert [parts[name].loaded(model) for name in ("image_encoder", "text_encoder")] == [None] * 2
    batch = {"context": random(2, 5, 8), "mean": random(2, 8, 8, 4), "logvar": random(2, 8, 8, 4)}
    assert losses(trainer, batch)[0].shape == (2,)
    with pytest.raises(ValueError, match="'latents' and 'context'.*'text'"):
        DiffusionTrainer.from_model(model, cached=("text",))


@pytest.mark.parametrize("num_classes", [None, 5])
def test_models_without_a_text_are_trained_and_saved(num_classes, tmp_path):
    model = PixelDiffusion.from_parts(
        {"diffusion_model": shared_network(num_classes=num_classes)}, SCHEDULE, (8, 8)
    )
    trainer = DiffusionTrainer.from_model(model)
    assert trainer.empty == {}
    trainer.save(tmp_path / "model")
    assert PixelDiffusion.from_preset(tmp_path / "model").schedule == SCHEDULE
    latents = LatentDiffusion.from_parts(
        {
            "diffusion_model": shared_network(in_channels=4, out_channels=4),
            "image_encoder": image_encoder(),
        },
        SCHEDULE,
        (8, 8),
    )
    assert DiffusionTrainer.from_model(latents).image_encoder is latents.image_encoder


def test_without_a_model_what_was_trained_is_saved(tmp_path):
    text_trainer().save(tmp_path / "unet")
    assert sorted(part.name for part in (tmp_path / "unet").iterdir()) == ["scheduler", "unet"]
    text_trainer(train_text_encoder=True).save(tmp_path / "both")
    parts = sorted(part.name for part in (tmp_path / "both").iterdir())
    assert parts == ["scheduler", "text_encoder", "unet"]
    with pytest.raises(ValueError, match="exists"):
        text_trainer().save(tmp_path / "unet")


def test_samples_are_what_draw_draws():
    trainer = DiffusionTrainer(shared_network(), SCHEDULE)
    assert trainer.samples(4) is None
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    trainer = DiffusionTrainer(shared_network(), SCHEDULE, draw=lambda count: pictures[:count])
    assert trainer.samples(3).shape == (3, 8, 8, 3)


def test_a_run_is_told_apart_by_all_that_its_losses_depend_on():
    configurations = [
        text_trainer().configuration,
        text_trainer(Objective("min_snr")).configuration,
        text_trainer(train_text_encoder=True).configuration,
        text_trainer(empty={"tokens": EMPTY}).configuration,
        text_trainer(empty={"tokens": EMPTY + 1}).configuration,
        DiffusionTrainer(shared_network(), SCHEDULE).configuration,
        DiffusionTrainer(shared_network(), Schedule()).configuration,
    ]
    assert len({str(configuration) for configuration in configurations}) == len(configurations)


# ── what does not fit ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes, settings, message",
    [
        ({"in_channels": 9}, {}, "in_channels=9"),
        ({}, {"image_encoder": image_encoder}, "latent_channels=4"),
        ({"context_width": 12}, {"text_encoder": text_encoder}, "width=8, context_width=12"),
        ({}, {"text_encoder": text_encoder}, "context_width=None"),
        ({"context_width": 8}, {"train_text_encoder": True}, "needs a `text_encoder`"),
        ({}, {"objective": Objective(caption_dropout=0.1)}, "caption_dropout=0.1"),
    ],
)
def test_parts_that_do_not_fit(changes, settings, message):
    parts = {name: part() if callable(part) else part for name, part in settings.items()}
    with pytest.raises(ValueError, match=message):
        DiffusionTrainer(shared_network(**changes), SCHEDULE, **parts)


@pytest.mark.parametrize(
    "missing, message",
    [("images", "need `images`"), ("label", "need `label`"), ("context", "`text_encoder`")],
)
def test_batches_that_lack_something(missing, message):
    trainer = DiffusionTrainer(shared_network(context_width=8, num_classes=5), SCHEDULE)
    label = np.zeros(4, "int32")
    batch = {"images": images(), "label": label, "context": random(4, 3, 8)}
    del batch[missing]
    with pytest.raises(ValueError, match=message):
        trainer.losses(batch, 0, 0)


@pytest.mark.parametrize("empty", [None, {"tokens": EMPTY[:2]}, {"context": random(3, 8)}])
def test_caption_dropout_needs_an_empty_caption_of_the_right_length(empty):
    trainer = text_trainer(Objective(caption_dropout=0.1), empty=empty)
    with pytest.raises(ValueError, match="needs `empty` with the tokens"):
        trainer.losses({"images": images(), "tokens": tokens()}, 0, 0)
