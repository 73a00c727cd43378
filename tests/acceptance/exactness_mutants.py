"""Mistakes to inject into kdiffusion's networks: `exactness.py` has to see each of them.

A mutant is a context manager around computations with a `StableDiffusion`.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

from keras import ops

from kdiffusion.models import kernels
from kdiffusion.models.layers.attention import SpatialTransformer
from kdiffusion.models.layers.clip import EncoderLayer
from kdiffusion.models.layers.norms import GroupNorm
from kdiffusion.models.layers.residual import Downsample, TimeEmbedding


@contextmanager
def attributes(objects, name, change):
    """Gives an attribute of all objects another value, made of its own."""
    with ExitStack() as stack:
        for thing in objects:
            value = change(getattr(thing, name))
            stack.enter_context(mock.patch.object(thing, name, value))
        yield


def epsilon(network, in_transformers, value):
    """Another epsilon in the group normalizations inside or outside the transformers."""

    def mutant(pipeline):
        layers = getattr(pipeline, network).layers
        layers = [x for x in layers if isinstance(x, SpatialTransformer) == in_transformers]
        parts = [part for layer in layers for part in (layer, *vars(layer).values())]
        norms = [part for part in parts if isinstance(part, GroupNorm)]
        return attributes(norms, "epsilon", lambda _: value)

    return mutant


def other_activation(pipeline):
    """GELU for quick GELU and the other way round."""
    layers = [x for x in pipeline.text_encoder.layers if isinstance(x, EncoderLayer)]
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}
    return attributes(layers, "activation", other.get)


def tanh_gelu(pipeline):
    """GELU's approximation by a tanh."""
    exact = ops.gelu
    return mock.patch.object(ops, "gelu", lambda x, approximate: exact(x, approximate=True))


def other_pad_id(pipeline):
    """Rows padded with the other family's id."""
    end, other = pipeline.tokenizer.end_of_text, 0
    return attributes(
        [pipeline.tokenizer], "pad_id", lambda pad_id: other if pad_id == end else end
    )


def symmetric_padding(pipeline):
    """Padding on all sides in the image encoder."""
    layers = [x for x in pipeline.image_encoder.layers if isinstance(x, Downsample)]
    return attributes(layers, "symmetric", lambda _: True)


def shifted_timestep(shift):
    """Another timestep."""

    def mutant(pipeline):
        call = TimeEmbedding.call
        return mock.patch.object(TimeEmbedding, "call", lambda self, t: call(self, t + shift))

    return mutant


@contextmanager
def sines_first(pipeline):
    """Sines before cosines."""
    with mock.patch.multiple(ops, cos=ops.sin, sin=ops.cos):
        yield


def attention_scale(factor):
    """Logits of attention that are too large or small."""

    def mutant(pipeline):
        attend = kernels.attend

        def scaled(query, *arguments, **options):
            return attend(query * factor, *arguments, **options)

        return mock.patch.object(kernels, "attend", scaled)

    return mutant


def mutants(pipeline, kind):
    """The mistakes to make in a network, by what they are."""
    scale = {"attention scale 1 % too large": attention_scale(1.01)}
    if kind == "text_encoder":
        tanh = {"erf -> tanh GELU": tanh_gelu}
        return scale | {
            "quick GELU <-> GELU": other_activation,
            "pad id 49407 <-> 0": other_pad_id,
            **(tanh if pipeline.text_encoder.architecture.activation == "gelu" else {}),
        }
    if kind == "image_encoder":
        return scale | {
            "epsilon 1e-6 -> 1e-5": epsilon("image_encoder", False, 1e-5),
            "symmetric padding": symmetric_padding,
        }
    if kind == "image_decoder":
        return scale | {"epsilon 1e-6 -> 1e-5": epsilon("decoder", False, 1e-5)}
    return scale | {
        "epsilon 1e-6 -> 1e-5 in transformers": epsilon("diffusion_model", True, 1e-5),
        "epsilon 1e-5 -> 1e-6 outside": epsilon("diffusion_model", False, 1e-6),
        "erf -> tanh GELU": tanh_gelu,
        "timestep + 1": shifted_timestep(1.0),
        "timestep - 1": shifted_timestep(-1.0),
        "sine before cosine": sines_first,
    }
