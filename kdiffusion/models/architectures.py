"""Records of plain numbers: the architectures of the networks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TextEncoderArchitecture:
    """A CLIP text transformer (Radford et al. 2021; OpenCLIP has the same shape).

    Args:
        vocabulary_size: int, number of token embeddings.
        max_length: int, number of positions, in tokens.
        width: int, width of the token states.
        depth: int, number of transformer layers.
        num_heads: int, attention heads a layer.
        mlp_width: int, width of the hidden layer of each MLP.
        activation: `"quick_gelu"` (CLIP-L) or `"gelu"` (exact, OpenCLIP).
        epsilon: float, epsilon of every layer normalization.
        projection_width: int or `None`, width of the projected pooled vector.
        end_id: int, the token whose state is the pooled vector.
    """

    vocabulary_size: int = 49408
    max_length: int = 77
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    projection_width: int | None = None
    end_id: int = 49407

    def __post_init__(self):
        _check_divisible("width", self.width, "num_heads", self.num_heads)
        _check_activation(self.activation)


@dataclass(frozen=True)
class ImageTowerArchitecture:
    """CLIP's vision transformer (Radford et al. 2021, section 2.4).

    Args:
        image_size: int, height and width of an image, in pixels.
        patch_size: int, height and width of a patch, in pixels.
        image_channels: int, channels of an image.
        width: int, width of the token states.
        depth: int, number of transformer layers.
        num_heads: int, attention heads a layer.
        mlp_width: int, width of the hidden layer of each MLP.
        activation: `"quick_gelu"` (CLIP) or `"gelu"` (exact, OpenCLIP).
        epsilon: float, epsilon of every layer normalization.
        projection_width: int, width of the projected vector of an image.
        mean: tuple of float, subtracted from images in [0, 1], one for each channel. Default:
            CLIP's.
        std: tuple of float, the divisors that follow.
    """

    image_size: int = 224
    patch_size: int = 14
    image_channels: int = 3
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_width: int = 4096
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    projection_width: int = 768
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        _freeze_tuples(self, "mean", "std")
        _check_divisible("image_size", self.image_size, "patch_size", self.patch_size)
        _check_divisible("width", self.width, "num_heads", self.num_heads)
        _check_activation(self.activation)
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.image_channels:
                raise ValueError(
                    f"`{name}` needs one value for each of the {self.image_channels} channels of "
                    f"an image. Received: {name}={getattr(self, name)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"`std` must be positive. Received: std={self.std}")


@dataclass(frozen=True)
class AutoencoderArchitecture:
    """The autoencoder between images and latents (Rombach et al. 2022, section 3.1).

    Args:
        image_channels: int, channels of an image.
        latent_channels: int, channels of the latents.
        channels: tuple of int, width of each level, finest first.
        layers_per_level: int, residual blocks a level of the encoder (the decoder has one more).
        num_groups: int, groups of every group normalization.
        latent_scale: float, latents are the autoencoder's code times this; or a tuple of one for
            each of the code's channels.
        latent_shift: float or such a tuple, subtracted from the code before scaling.
        mid_attention: bool, whether the middle block attends.
        quant_conv: bool, whether a 1x1 convolution ends the encoder.
        post_quant_conv: bool, whether a 1x1 convolution starts the decoder.
        codebook_size: int, vectors of the codebook, of which the decoder looks up the nearest (van
            den Oord et al. 2017); `None` for an autoencoder with a KL penalty instead.
    """

    image_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_level: int = 2
    num_groups: int = 32
    latent_scale: float | tuple[float, ...] = 0.18215
    latent_shift: float | tuple[float, ...] = 0.0
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    codebook_size: int | None = None

    def __post_init__(self):
        _freeze_tuples(self, "channels")
        scales = _per_channel(self, "latent_scale", self.latent_channels)
        _per_channel(self, "latent_shift", self.latent_channels)
        if min(scales) <= 0:
            raise ValueError(
                f"`latent_scale` must be positive. Received: latent_scale={self.latent_scale}"
            )
        if self.codebook_size is not None and self.codebook_size < 1:
            raise ValueError(
                "`codebook_size` must be positive, or None. "
                f"Received: codebook_size={self.codebook_size}"
            )
        for width in self.channels:
            _check_divisible("channels", width, "num_groups", self.num_groups)

    @property
    def downsampling(self) -> int:
        """Return the number of pixels along one side of a latent cell."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class DiffusionArchitecture:
    """The denoising U-Net, with cross-attention or without (Rombach et al. 2022, section 3.3).

    Args:
        in_channels: int, channels of the input; what exceeds `out_channels` is conditioning
            (9 for inpainting: latents 4, mask 1, masked image 4).
        out_channels: int, channels of the prediction and of the latents.
        channels: tuple of int, width of each level, finest first.
        layers_per_level: int, residual blocks a level on the way down (one more on the way up).
        depths: tuple of int, transformer blocks at each level, 0 for none.
        mid_depth: int, transformer blocks in the middle.
        num_heads: tuple of int, attention heads at each level (a count, not a width).
        context_width: int, width of the text states; `None` if there is no text, and all attention
            is to the feature map itself.
        num_classes: int or `None`, number of classes that an image may be generated of; their
            embedding is added to that of the timestep, and one more stands for no class.
        linear_projection: bool, whether checkpoints store the transformers' projections as linear
            layers (SD 2.x) or as 1x1 convolutions (SD 1.x); the arithmetic is the same.
        num_groups: int, groups of every group normalization.
        epsilon: float, epsilon of the group normalizations outside the transformers.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_level: int = 2
    depths: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_width: int | None = 768
    num_classes: int | None = None
    linear_projection: bool = False
    num_groups: int = 32
    epsilon: float = 1e-5

    def __post_init__(self):
        _freeze_tuples(self, "channels", "depths", "num_heads")
        for name in ("depths", "num_heads"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(
                    f"`{name}` needs one value for each of the {len(self.channels)} levels of "
                    f"`channels`. Received: {name}={getattr(self, name)}"
                )
        for name in ("context_width", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive, or None. Received: {name}={value}")
        for width, heads in zip(self.channels, self.num_heads):
            _check_divisible("channels", width, "num_heads", heads)
            _check_divisible("channels", width, "num_groups", self.num_groups)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the network's inputs beside `latents` and `timestep`.

        Returns:
            Tuple with `"context"` for a network of texts and `"label"` for one of classes.
        """
        widths = {"context": self.context_width, "label": self.num_classes}
        return tuple(name for name, width in widths.items() if width is not None)

    @property
    def conditioning_channels(self) -> int:
        """Return the number of input channels behind the latents: 5 for inpainting, mostly 0."""
        return self.in_channels - self.out_channels


def _freeze_tuples(record, *names):
    """Accept lists (JSON has nothing else) where the record holds tuples."""
    for name in names:
        object.__setattr__(record, name, tuple(getattr(record, name)))


def _per_channel(record, name, channels) -> tuple[float, ...]:
    """Check a field that is a number or a tuple of one for each channel; return its values."""
    value = getattr(record, name)
    is_number = not isinstance(value, (list, tuple))
    values = tuple(float(number) for number in ((value,) * channels if is_number else value))
    if len(values) != channels or not all(math.isfinite(number) for number in values):
        raise ValueError(
            f"`{name}` must be a finite number, or a tuple of one for each of the {channels} "
            f"channels. Received: {name}={value}"
        )
    object.__setattr__(record, name, values[0] if is_number else values)
    return values


def _check_divisible(name, value, divisor_name, divisor):
    if divisor < 1 or value % divisor:
        raise ValueError(
            f"`{name}` must be a multiple of `{divisor_name}`. "
            f"Received: {name}={value}, {divisor_name}={divisor}"
        )


def _check_activation(activation):
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(
            f"`activation` must be 'quick_gelu' or 'gelu'. Received: activation={activation!r}"
        )
