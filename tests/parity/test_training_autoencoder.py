"""The autoencoder's losses and their gradients against PyTorch and diffusers, on random weights."""

import diffusers
import keras
import numpy as np
import pytest
import reference_autoencoder as reference
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from keras import ops

from kdiffusion import records
from kdiffusion.models import architectures
from kdiffusion.models.image_decoder import ImageDecoder
from kdiffusion.models.image_encoder import ImageEncoder
from kdiffusion.models.layers.codebook import Codebook
from kdiffusion.runtime import backend
from kdiffusion.training import random
from kdiffusion.training.loop import gradients
from kdiffusion.training.trainers.autoencoder import (
    AutoencoderObjective,
    AutoencoderTrainer,
)
from kdiffusion.training.trainers.discriminator import (
    Discriminator,
    DiscriminatorArchitecture,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)
from kdiffusion.training.trainers.perceptual import Perceptual, PerceptualArchitecture
from kdiffusion.training.trainers.quantizer import codebook_loss, straight_through
from kdiffusion.weights import variables
from weights_conversion import rows, write

pytestmark = pytest.mark.backend

BAR = 2e-5  # of the largest number that is compared
SMALL_VGG = PerceptualArchitecture(channels=(8, 12, 16), layers_per_level=(1, 2, 1))
SMALL_GAN = DiscriminatorArchitecture(channels=8, depth=2)
AUTOENCODER = architectures.AutoencoderArchitecture(
    channels=(8, 16), layers_per_level=1, num_groups=4, latent_channels=3, latent_scale=0.7
)
OBJECTIVE = AutoencoderObjective(
    kl_weight=0.1, codebook_weight=0.8, adversarial_weight=0.6, disc_start=0
)
SEED, STEP = 3, 5


def pictures(count=3, size=32, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, size, size, 3)).astype("float32")


def error(found, expected):
    found, expected = (
        x.detach().numpy() if isinstance(x, torch.Tensor) else ops.convert_to_numpy(x)
        for x in (found, expected)
    )
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def gradient_error(found, expected):
    """Of tensors by name, the largest error beside the largest gradient of its tensor."""
    assert found.keys() == expected.keys()
    largest = max(np.abs(x).max() for x in expected.values())
    return max(
        np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-3 * largest)
        for name, value in expected.items()
    )


def both_discriminators(architecture):
    # With this seed no activation is as near zero as rounding: there, leaky ReLU's gradient jumps.
    keras.utils.set_random_seed(5)
    ours, theirs = Discriminator(architecture), reference.patch_gan(architecture).train()
    arrays = {path: array + 0.01 for path, array in variables.arrays_of(ours).items()}
    variables.assign(ours, arrays.items())
    theirs.load_state_dict(to_torch(arrays, architecture.depth), strict=False)
    return ours, theirs


def to_torch(arrays, depth):
    names = reference.patch_gan_names(depth)
    return {
        names[path]: torch.tensor(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
        for path, array in arrays.items()
    }


def both_perceptuals(folder, architecture):
    """The converter is part of what is compared."""
    states = reference.vgg16_state(architecture), reference.linear_state(architecture)
    for name, state in zip(("vgg16.pth", "vgg.pth"), states):
        torch.save(state, folder / name)
    ours = Perceptual.from_checkpoints(folder / "vgg16.pth", folder / "vgg.pth", architecture)
    return ours, reference.Lpips(architecture, *states)


@pytest.mark.parametrize("architecture", [SMALL_GAN, DiscriminatorArchitecture()], ids=str)
def test_patch_gan(architecture, record_figure):
    ours, theirs = both_discriminators(architecture)
    real, fake = pictures(size=64), pictures(size=64, seed=1)
    found = [ops.convert_to_numpy(ours(x)) for x in (real, fake)]
    expected = [theirs(reference.channels_first(x)) for x in (real, fake)]
    worst = max(error(a, reference.channels_last(b)) for a, b in zip(found, expected))
    record_figure("logits", worst, BAR)
    losses = np.mean(hinge_loss(*found)), np.mean(generator_loss(found[1]))
    worst = max(error(np.array(a), b) for a, b in zip(losses, reference.hinge_losses(*expected)))
    record_figure("hinge losses", worst, BAR)
    reference.hinge_losses(*expected)[0].backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    found = to_torch(gradients_of_hinge_loss(ours, real, fake), architecture.depth)
    worst = gradient_error({name: x.numpy() for name, x in found.items()}, expected)
    record_figure("gradients of the discriminator's loss", worst, 10 * BAR)


def gradients_of_hinge_loss(model, real, fake):
    values = [variable.value for variable in model.variables]
    found = {}
    for place, variable in enumerate(model.variables):

        def loss(value):
            with backend.with_weights(model, [*values[:place], value, *values[place + 1 :]]):
                return ops.mean(hinge_loss(model(real), model(fake)))

        gradient = backend.value_and_gradient(loss, values[place])[1]
        found[variable.path] = ops.convert_to_numpy(gradient)
    return found


@pytest.mark.parametrize("legacy", [True, False])
def test_codebook(legacy, record_figure):
    """Choice, losses, gradients and straight-through gradient of diffusers' quantizer."""
    generator = np.random.default_rng(0)
    codes = generator.normal(size=(2, 5, 6, 3)).astype("float32")
    vectors = generator.normal(size=(16, 3)).astype("float32")
    after = generator.normal(size=codes.shape).astype("float32")
    theirs = VectorQuantizer(16, 3, beta=0.25, legacy=legacy)
    theirs.embedding.weight.data = torch.tensor(vectors)
    z = reference.channels_first(codes).requires_grad_()
    chosen, loss, (_, _, places) = theirs(z)
    (loss + (chosen * reference.channels_first(after)).sum()).backward()
    layer = Codebook(16)
    layer.build(codes.shape)
    layer.embedding.assign(vectors)

    def total(codes, vectors):
        with backend.with_weights(layer, [vectors]):
            found = layer.vectors(layer.nearest(codes))
        loss = ops.mean(codebook_loss(codes, found, 0.25, legacy))
        return loss + ops.sum(straight_through(codes, found) * after)

    codes, vectors = ops.convert_to_tensor(codes), ops.convert_to_tensor(vectors)
    found = ops.convert_to_numpy(layer.nearest(codes)).ravel()
    np.testing.assert_array_equal(found, places.numpy().ravel())
    record_figure("vectors", error(layer(codes), reference.channels_last(chosen)), BAR)
    own = ops.mean(codebook_loss(codes, layer(codes), 0.25, legacy))
    record_figure("loss", error(own, loss), BAR)
    to_codes = backend.value_and_gradient(lambda x: total(x, vectors), codes)[1]
    record_figure("gradient of codes", error(to_codes, reference.channels_last(z.grad)), BAR)
    to_vectors = backend.value_and_gradient(lambda x: total(codes, x), vectors)[1]
    to_vectors = ops.convert_to_tensor(to_vectors)
    expected = theirs.embedding.weight.grad
    record_figure("gradient of vectors", error(to_vectors, expected), BAR)


@pytest.mark.parametrize("architecture", [SMALL_VGG, PerceptualArchitecture()], ids=str)
def test_perceptual(architecture, tmp_path, record_figure):
    ours, theirs = both_perceptuals(tmp_path, architecture)
    first, second = pictures(2, 48), pictures(2, 48, seed=1)
    expected_at = reference.channels_first(second).requires_grad_()
    expected = theirs(reference.channels_first(first), expected_at)
    expected.sum().backward()
    record_figure("distances", error(ours(first, second), expected), BAR)
    _, found = backend.value_and_gradient(
        lambda x: ops.sum(ours(first, x)), ops.convert_to_tensor(second)
    )
    worst = error(found, reference.channels_last(expected_at.grad))
    record_figure("gradient of a picture", worst, 10 * BAR)


def test_adaptive_weight(tmp_path, record_figure):
    """The last layer alone, of random features."""
    (perceptual, lpips), (gan, patch_gan) = (
        both_perceptuals(tmp_path, SMALL_VGG),
        both_discriminators(SMALL_GAN),
    )
    generator = np.random.default_rng(0)
    features = generator.normal(size=(3, 32, 32, 8)).astype("float32")
    kernel = 0.1 * generator.normal(size=(3, 3, 8, 3)).astype("float32")
    real = pictures()

    def picture(kernel):
        return ops.conv(features, kernel, padding="same")

    def reconstruction(kernel):
        distance = ops.mean(ops.abs(real - picture(kernel))) + ops.mean(
            perceptual(real, picture(kernel))
        )
        return distance * real[0].size

    found = adaptive_weight(
        reconstruction,
        lambda kernel: ops.mean(generator_loss(gan(picture(kernel)))),
        ops.convert_to_tensor(kernel),
    )
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1).copy()).requires_grad_()
    theirs = torch.nn.functional.conv2d(reference.channels_first(features), weight, padding=1)
    expected = reference.adaptive_weight(
        reference.picture_loss(reference.channels_first(real), theirs, lpips, summed=True),
        reference.hinge_losses(theirs, patch_gan(theirs))[1],
        weight,
    )
    assert 1 < expected < 1e4
    record_figure("weight", error(found, expected), 10 * BAR)


@pytest.mark.parametrize("codebook_size", [None, 16])
def test_whole_losses(codebook_size, tmp_path, record_figure):
    """Both losses, and the gradient of each variable, from the pictures to the last layer."""
    perceptual, lpips = both_perceptuals(tmp_path, SMALL_VGG)
    discriminator, patch_gan = both_discriminators(SMALL_GAN)
    architecture = architectures.AutoencoderArchitecture(
        **records.fields(AUTOENCODER) | {"codebook_size": codebook_size}
    )
    trainer = AutoencoderTrainer(
        ImageEncoder(architecture),
        ImageDecoder(architecture),
        perceptual=perceptual,
        discriminator=discriminator,
        objective=OBJECTIVE,
        latent_scale="keep",
    )
    if codebook_size:  # as wide as the codes, so that several vectors are chosen
        vectors = np.random.default_rng(0).normal(size=(codebook_size, 3)).astype("float32")
        trainer.image_decoder.get_layer("codebook").embedding.assign(vectors)
    trainer.save(tmp_path / "saved")
    found = programs(trainer).gradients(None, {"images": pictures()}, SEED, STEP)
    kind = diffusers.VQModel if codebook_size else diffusers.AutoencoderKL
    theirs = kind.from_pretrained(tmp_path / "saved", subfolder="vae")
    expected = expected_losses(theirs, lpips, patch_gan)
    for name in ("autoencoder", "discriminator"):
        own = np.mean(ops.convert_to_numpy(found.losses[name]))
        record_figure(f"{name}'s loss", error(own, expected[name]), BAR)
    expected["autoencoder"].backward(retain_graph=True)
    names = parameter_gradients(trainer, found.sums["autoencoder"])
    record_figure(
        "autoencoder's gradients",
        gradient_error(names, {n: p.grad.numpy() for n, p in theirs.named_parameters()}),
        20 * BAR,
    )
    patch_gan.zero_grad()
    expected["discriminator"].backward()
    arrays = dict(zip(paths(discriminator), map(ops.convert_to_numpy, found.sums["discriminator"])))
    own = {name: x.numpy() for name, x in to_torch(arrays, SMALL_GAN.depth).items()}
    worst = gradient_error(own, {n: p.grad.numpy() for n, p in patch_gan.named_parameters()})
    record_figure("discriminator's gradients", worst, 20 * BAR)


def programs(trainer):
    optimizers = {name: keras.optimizers.SGD() for name in trainer.groups}
    for name, optimizer in optimizers.items():
        optimizer.build(trainer.groups[name])
    return gradients.programs(trainer, optimizers, [], jit_compile=False)


def paths(model):
    return [variable.path for variable in model.variables]


def parameter_gradients(trainer, sums):
    """The gradients of both halves under diffusers' names."""
    arrays, named = iter(map(ops.convert_to_numpy, sums)), {}
    for kind in ("image_encoder", "image_decoder"):
        model = getattr(trainer, kind)
        own = {path: next(arrays) for path in paths(model)}
        named |= write(rows(kind, records.fields(model.architecture)), own, "diffusers")
    return named


def expected_losses(model, lpips, patch_gan):
    real = reference.channels_first(pictures())
    if isinstance(model, diffusers.VQModel):
        codes = model.encode(real).latents
        codes, penalty, _ = model.quantize(codes)
        penalty = OBJECTIVE.codebook_weight * penalty
        features = model.post_quant_conv(codes)
        fake = model.decoder(features)
    else:
        posterior = model.encode(real).latent_dist
        shape = np.moveaxis(np.empty(posterior.mean.shape[1:]), 0, -1).shape
        noise = random.normal(SEED, STEP, np.arange(3), shape, random.POSTERIOR)
        noise = reference.channels_first(ops.convert_to_numpy(noise))
        fake = model.decode(posterior.mean + posterior.std * noise).sample
        penalty = OBJECTIVE.kl_weight * posterior.kl().mean()
    summed = not isinstance(model, diffusers.VQModel)
    difference = reference.picture_loss(real, fake, lpips, summed)
    generator = reference.hinge_losses(fake, patch_gan(fake))[1]
    weight = reference.adaptive_weight(difference, generator, model.decoder.conv_out.weight)
    discriminator, _ = reference.hinge_losses(patch_gan(real), patch_gan(fake.detach()))
    weight = OBJECTIVE.adversarial_weight * weight
    return {
        "autoencoder": difference + penalty + weight * generator,
        "discriminator": discriminator,
    }


@pytest.fixture
def record_figure(record_property, request):
    """Assert that an error is below its bar, and note it for the acceptance command."""

    def record(name, figure, bar):
        record_property(f"{request.node.name}: {name}", f"{figure:.1e} < {bar:.0e}")
        assert figure < bar, f"{name}: {figure:.2e}"

    return record
