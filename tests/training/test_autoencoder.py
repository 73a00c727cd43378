"""Training of autoencoders: what is learned, what switches on when, what is saved."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
from keras import ops

from kdiffusion.models import architectures
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.runtime import backend
from kdiffusion.training.loop.loop import Loop
from kdiffusion.training.loop.settings import LoopSettings
from kdiffusion.training.trainers import latent_scale
from kdiffusion.training.trainers.autoencoder import (
    AutoencoderObjective,
    AutoencoderTrainer,
)
from kdiffusion.training.trainers.discriminator import (
    BatchNorm,
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)
from kdiffusion.training.trainers.group_optimizer import GroupOptimizer
from kdiffusion.weights.sources import CheckpointSource
from kdiffusion.weights.variables import arrays_of

# Few layers, which are built and compiled quickly.
KL = architectures.AutoencoderArchitecture(
    channels=(8,),
    layers_per_level=1,
    num_groups=4,
    latent_channels=3,
    latent_scale=1.0,
    mid_attention=False,
)
VQ = dataclasses.replace(KL, codebook_size=32)
LEVELS = dataclasses.replace(KL, channels=(8, 16), mid_attention=True)
ADVERSARIAL = AutoencoderObjective(disc_start=2, disc_warmup=2)


def pictures(count=16, size=16):
    """Make smooth images, whose colour changes from corner to corner."""
    generator = np.random.default_rng(0)
    corners = generator.uniform(-1, 1, (count, 2, 2, 3))
    share = np.linspace(0, 1, size)
    rows = np.einsum("bijc,iy->byjc", corners, np.stack([1 - share, share]))
    return np.einsum("byjc,jx->byxc", rows, np.stack([1 - share, share])).astype("float32")


def squared(first, second):
    return ops.mean(ops.square(first - second), axis=(1, 2, 3))


def halves(architecture=KL):
    keras.utils.set_random_seed(0)
    return ImageEncoder(architecture), ImageDecoder(architecture)


def trainer(architecture=KL, **settings):
    return AutoencoderTrainer(*halves(architecture), **settings)


# For all tests that leave weights alone.
shared_halves = functools.cache(halves)


def shared(architecture=KL, **settings):
    return AutoencoderTrainer(*shared_halves(architecture), **settings)


@functools.cache
def adversarial():
    discriminator = Discriminator({"channels": 8, "depth": 1})
    settings = {"objective": ADVERSARIAL, "perceptual": squared}
    return AutoencoderTrainer(*shared_halves(KL), discriminator=discriminator, **settings)


def figures(model, step, images=None):
    """Return the means of the losses and of the other figures at a step."""
    batch = {"images": pictures(4) if images is None else images}
    losses, others = model.losses(batch, 0, step)
    assert not losses.keys() & others.keys()
    return {name: float(ops.mean(value)) for name, value in {**losses, **others}.items()}


class Pictures:
    def batch(self, step, size):
        return {"images": np.roll(pictures(), -step * size, axis=0)[:size]}


@pytest.mark.slow
def test_an_autoencoder_learns():
    model = trainer(VQ)
    before = figures(model, 0)
    model.compile(keras.optimizers.Adam(3e-3))
    model.fit({"images": pictures()}, batch_size=8, epochs=30, verbose=0)
    after = figures(model, 0)
    assert after["psnr"] > before["psnr"] + 6
    assert after["psnr"] > 15
    assert 3 < after["perplexity"] <= 32


def test_the_discriminator_and_its_opinion_start_when_they_are_to():
    model = adversarial()
    found = [figures(model, step) for step in range(6)]
    assert [step for step in range(6) if found[step]["discriminator"] > 0] == [2, 3, 4, 5]
    assert [step for step in range(6) if found[step]["adversarial_weight"] > 0] == [4, 5]
    plain = found[3]["pixel"] + found[3]["perceptual"]
    expected = plain * pictures()[0].size + 1e-6 * found[3]["kl"]
    assert found[3]["autoencoder"] == pytest.approx(expected, rel=1e-5)
    opinion = found[4]["adversarial_weight"] * found[4]["generator"]
    plain = found[4]["pixel"] + found[4]["perceptual"]
    expected = plain * pictures()[0].size + 1e-6 * found[4]["kl"] + opinion
    assert abs(opinion) > 0.1
    assert found[4]["autoencoder"] == pytest.approx(expected, rel=1e-5)


def test_a_codebooks_losses_are_means():
    objective = AutoencoderObjective(codebook_weight=0.5, pixel="l2")
    found = figures(shared(VQ, objective=objective), 0)
    assert found["autoencoder"] == pytest.approx(found["pixel"] + 0.5 * found["codebook"], rel=1e-5)


def test_no_loss_moves_the_other_groups_variables():
    model = adversarial()

    def gradient(loss, network, path):
        (place,) = (i for i, v in enumerate(network.variables) if v.path == path)
        values = [variable.value for variable in network.variables]

        def function(value):
            with backend.with_weights(network, [*values[:place], value, *values[place + 1 :]]):
                return ops.mean(model.losses({"images": pictures(2)}, 0, 9)[0][loss])

        _, found = backend.value_and_gradient(function, values[place])
        return 0.0 if found is None else float(ops.max(ops.abs(found)))

    networks = model.discriminator, model.image_decoder
    assert gradient("autoencoder", networks[0], "conv_1/kernel") == 0
    assert gradient("discriminator", networks[0], "conv_1/kernel") > 1e-4
    assert gradient("autoencoder", networks[1], "conv_in/kernel") > 1e-4
    assert gradient("discriminator", networks[1], "conv_in/kernel") == 0


def test_the_perceptual_network_is_not_trained():
    network = keras.Sequential([keras.layers.Conv2D(2, 3)])
    network.build((None, 16, 16, 3))

    def distance(first, second):
        return squared(network(first), network(second))

    model = trainer(perceptual=distance)
    model.network = network
    assert {id(v) for v in network.variables} <= {id(v) for v in model.non_trainable_variables}


def test_a_dictionary_of_optimizers_is_one_by_group():
    model = adversarial()
    optimizers = {"autoencoder": keras.optimizers.SGD(), "discriminator": keras.optimizers.Adam()}
    model.compile(optimizers)
    assert isinstance(model.optimizer, GroupOptimizer)
    assert model.optimizer.optimizers == optimizers


def test_optimizers_of_groups_are_those_of_each_alone():
    start, gradients = np.float32([1, 2]), np.float32([[0.5, -1], [3, 2], [1, 1], [0, -4]])
    variables, alone = ([keras.Variable(start) for _ in range(4)] for _ in range(2))
    places = {"outer": [0, 3], "inner": [1, 2]}
    make = {"outer": lambda: keras.optimizers.Adam(0.1), "inner": lambda: keras.optimizers.SGD(0.5)}
    groups = {name: [variables[place] for place in own] for name, own in places.items()}
    both = GroupOptimizer({name: make[name]() for name in groups}, groups)
    both.build(variables)
    for name, own in places.items():
        optimizer = make[name]()
        for _ in range(3):
            optimizer.apply(list(gradients[own]), [alone[place] for place in own])
    for _ in range(3):
        both.apply(list(gradients), variables)
    for found, expected in zip(variables, alone):
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert int(both.iterations) == 3
    assert [int(one.iterations) for one in both.optimizers.values()] == [3, 3]
    with pytest.raises(AttributeError, match="Each group"):
        both.learning_rate


def test_optimizers_that_fit_refuses():
    model = adversarial()
    with pytest.raises(ValueError, match=r"\['autoencoder', 'discriminator'\].*\['model'\]"):
        model.compile({"model": "adam"})
    averaging = keras.optimizers.Adam(use_ema=True)
    with pytest.raises(ValueError, match="use_ema"):
        model.compile({"autoencoder": averaging, "discriminator": "adam"})


def test_a_discriminator_sees_the_batch_as_a_whole(tmp_path):
    assert shared().separable
    settings = LoopSettings(batch_size=4, accumulation=2, verbose=0)
    with pytest.raises(ValueError, match="accumulation=2"):
        Loop(adversarial(), keras.optimizers.Adam(), Pictures(), tmp_path, settings)


def test_hinge_losses_by_hand():
    real, fake = (np.float32(x).reshape(2, 1, 2, 1) for x in ([[2, 0], [-1, 1]], [[-3, 1], [0, 0]]))
    np.testing.assert_allclose(ops.convert_to_numpy(hinge_loss(real, fake)), [0.75, 1.0])
    np.testing.assert_allclose(ops.convert_to_numpy(generator_loss(fake)), [1.0, 0.0])


def test_the_adaptive_weight_is_bounded():
    kernel = ops.convert_to_tensor(np.float32([3, 4]))
    weight = functools.partial(adaptive_weight, kernel=kernel)

    def length(kernel):
        return ops.sqrt(ops.sum(ops.square(kernel)))

    assert float(weight(lambda x: 2 * length(x), length)) == pytest.approx(2 / 1.0001)
    assert float(weight(lambda x: 2 * length(x), lambda x: 0 * length(x))) == 1e4


def test_batch_normalization_by_hand():
    layer = BatchNorm()
    layer.build((None, 1, 2, 1))
    layer.gamma.assign([2.0])
    layer.beta.assign([1.0])
    found = ops.convert_to_numpy(layer(np.float32([0, 0, 4, 4]).reshape(2, 1, 2, 1)))
    np.testing.assert_allclose(found.ravel(), [-1, -1, 3, 3], atol=1e-5)
    assert len(layer.variables) == 2


@pytest.mark.parametrize(
    "scale, shift", [(1.0, 0.0), (0.3, 0.5), ((1.0, 2.0, 3.0), (0.0, 1.0, 2.0))]
)
def test_latents_have_unit_variance_once_they_are_scaled(scale, shift):
    architecture = dataclasses.replace(KL, latent_scale=scale, latent_shift=shift)
    model = trainer(architecture, latent_scale="channel")
    model.prepare(pictures())
    encoder, decoder = model.scaled()
    latents = {k: ops.convert_to_numpy(v) for k, v in encoder(pictures()).items()}
    variance = latents["mean"].var((0, 1, 2)) + np.exp(latents["logvar"]).mean((0, 1, 2))
    np.testing.assert_allclose(variance, 1, rtol=1e-4)
    np.testing.assert_allclose(latents["mean"].mean((0, 1, 2)), 0, atol=1e-4)
    before = model.image_decoder(model.image_encoder(pictures(2))["mean"])
    after = decoder(encoder(pictures(2))["mean"])
    np.testing.assert_allclose(ops.convert_to_numpy(after), ops.convert_to_numpy(before), atol=2e-5)


def test_the_global_scale_has_no_shift():
    encoder = shared().image_encoder
    scale, shift = latent_scale.measure(encoder, pictures(), batch_size=3)
    latents = {k: ops.convert_to_numpy(v) for k, v in encoder(pictures()).items()}
    variance = latents["mean"].var() + np.exp(latents["logvar"]).mean()
    assert (scale, shift) == (pytest.approx(variance**-0.5, rel=1e-5), 0.0)
    assert scale == float(f"{scale:.6g}")


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_latents_that_have_no_scale(value):
    encoder = trainer(VQ).image_encoder
    encoder.set_weights([np.full_like(x, value) for x in encoder.get_weights()])
    with pytest.raises(ValueError, match="deviation"):
        latent_scale.measure(encoder, pictures(2))


@pytest.mark.parametrize(
    "architecture, kind", [(LEVELS, "global"), (KL, "channel"), (VQ, "global"), (KL, "keep")]
)
def test_what_is_saved_is_the_scaled_autoencoder(tmp_path, architecture, kind):
    model = shared(architecture, latent_scale=kind)
    model.prepare(Pictures(), count=8)
    model.save(tmp_path / "saved")
    source = CheckpointSource(tmp_path / "saved")
    for name, expected in zip(("image_encoder", "image_decoder"), model.scaled()):
        found = source.model(name, "float32")
        assert (
            dataclasses.replace(
                found.architecture,
                latent_scale=expected.architecture.latent_scale,
                latent_shift=expected.architecture.latent_shift,
            )
            == expected.architecture
        )
        np.testing.assert_allclose(
            found.architecture.latent_scale, expected.architecture.latent_scale, rtol=1e-14
        )
        np.testing.assert_allclose(
            found.architecture.latent_shift, expected.architecture.latent_shift, rtol=1e-14
        )
        arrays = arrays_of(expected)
        for path, array in arrays_of(found).items():
            np.testing.assert_array_equal(array, arrays[path])


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="prepare"):
        shared().save(tmp_path / "saved")
    model = shared(dataclasses.replace(VQ, quant_conv=False))
    model.prepare(pictures())
    with pytest.raises(ValueError, match="quant_conv"):
        model.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_samples_are_pictures_beside_their_reconstructions():
    model = shared()
    assert model.samples(4) is None
    model.prepare(Pictures(), count=8)
    shown = model.samples(5)
    assert (shown.shape, shown.dtype) == ((5, 16, 16, 3), np.uint8)
    np.testing.assert_allclose(shown[::2] / 127.5 - 1, pictures(3), atol=0.005)
    assert np.abs(shown[1] - shown[0].astype(float)).max() > 5
    with pytest.raises(ValueError, match="none"):
        model.prepare(pictures()[:0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixel": "l3"}, "l3"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"disc_start": -1}, "disc_start"),
        ({"commitment": np.nan}, "commitment"),
    ],
)
def test_objectives_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderObjective(**change)


def test_parts_that_do_not_belong_together():
    with pytest.raises(ValueError, match="same architecture"):
        AutoencoderTrainer(shared_halves(KL)[0], shared_halves(VQ)[1])
    with pytest.raises(ValueError, match="global, channel, keep"):
        shared(latent_scale=0.5)
    with pytest.raises(ValueError, match="by one number.*codebook_size=32"):
        shared(VQ, latent_scale="channel")
    with pytest.raises(ValueError, match="images"):
        shared().losses({"label": np.zeros(2)}, 0, 0)
