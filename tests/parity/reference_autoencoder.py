"""The losses of autoencoders in PyTorch, written from the papers' formulas.

Weights come from the Keras models: a convolution's (height, width, in, out) kernel is PyTorch's
(out, in, height, width).
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def channels_first(pictures):
    return torch.tensor(np.moveaxis(np.asarray(pictures), -1, 1).copy())


def channels_last(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def patch_gan(architecture):
    """Isola et al. 2017, appendix 6.1.2, with the channels and depth of the record."""
    layers = [
        nn.Conv2d(architecture.image_channels, architecture.channels, 4, 2, 1),
        nn.LeakyReLU(0.2),
    ]
    inputs = architecture.channels
    for level in range(1, architecture.depth + 1):
        outputs = architecture.channels * min(2**level, 8)
        stride = 2 if level < architecture.depth else 1
        layers += [
            nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.2),
        ]
        inputs = outputs
    return nn.Sequential(*layers, nn.Conv2d(inputs, 1, 4, 1, 1))


def patch_gan_names(depth):
    """The path of each Keras variable and the name of its PyTorch parameter."""
    names = {"conv_in/kernel": "0.weight", "conv_in/bias": "0.bias"}
    for level in range(1, depth + 1):
        names |= {
            f"conv_{level}/kernel": f"{3 * level - 1}.weight",
            f"norm_{level}/gamma": f"{3 * level}.weight",
            f"norm_{level}/beta": f"{3 * level}.bias",
        }
    last = 3 * depth + 2
    return names | {"conv_out/kernel": f"{last}.weight", "conv_out/bias": f"{last}.bias"}


def vgg16_state(architecture, seed=0):
    """Random weights under the names of torchvision's vgg16."""
    generator = torch.Generator().manual_seed(seed)
    state, inputs, place = {}, architecture.image_channels, 0
    for width, count in zip(architecture.channels, architecture.layers_per_level):
        for _ in range(count):
            # The size of each layer's activations stays about the same.
            deviation = (2 / (9 * inputs)) ** 0.5
            weight = torch.randn(width, inputs, 3, 3, generator=generator)
            state[f"features.{place}.weight"] = weight * deviation
            state[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
            inputs, place = width, place + 2
        place += 1
    for place in (0, 3, 6):  # their shapes are nobody's business
        state[f"classifier.{place}.weight"] = torch.zeros(2, 2)
        state[f"classifier.{place}.bias"] = torch.zeros(2)
    return state


def linear_state(architecture, seed=1):
    """Random weights under the names of LPIPS's linear layers, which have no negative ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"lin{level}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for level, width in enumerate(architecture.channels)
    }


class Lpips:
    """Zhang et al. 2018, eq. 1, over the last activation of each level of VGG16."""

    def __init__(self, architecture, vgg16, linear):
        self.layers_per_level, self.vgg16, self.linear = (
            architecture.layers_per_level,
            vgg16,
            linear,
        )

    def features(self, pictures):
        shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        x, place = (pictures - shift) / scale, 0
        for level, count in enumerate(self.layers_per_level):
            if level:
                x = functional.max_pool2d(x, 2)
            for _ in range(count):
                weight, bias = (self.vgg16[f"features.{place}.{n}"] for n in ("weight", "bias"))
                x, place = functional.relu(functional.conv2d(x, weight, bias, padding=1)), place + 2
            place += 1
            yield x

    def __call__(self, first, second):
        distance = 0
        for level, (a, b) in enumerate(zip(self.features(first), self.features(second))):
            a, b = (x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10) for x in (a, b))
            weight = self.linear[f"lin{level}.model.1.weight"]
            distance = distance + functional.conv2d((a - b) ** 2, weight).mean((1, 2, 3))
        return distance


def hinge_losses(real, fake):
    """Lim & Ye 2017: the discriminator's loss and the generator's."""
    discriminator = 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())
    return discriminator, -fake.mean()


def adaptive_weight(reconstruction, generator, last_layer):
    """Esser et al. 2021, eq. 7, with the original code's small number and bound."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction, generator)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


def picture_loss(pictures, reconstruction, lpips, summed):
    """L1 and LPIPS at equal weights: a sum over each picture's numbers, or their mean."""
    loss = (pictures - reconstruction).abs() + lpips(pictures, reconstruction)[:, None, None, None]
    return loss.sum() / len(pictures) if summed else loss.mean()
