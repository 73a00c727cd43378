"""The families of models: one row says all that differs between them.

A model is recognised, never guessed: a single file by its signs, a folder and models in memory by
their parts and the inputs of the diffusion model. The first row that fits wins, as adapters contain
names of the models they adapt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from weights_conversion.files.errors import CheckpointError, listed
from weights_conversion.models.family import NETWORK, Family, Part
from weights_conversion.models.kinds import Fields
from weights_conversion.models.signs import (
    Shapes,
    begins,
    contains,
    either,
    unet,
    without_unet,
)
from weights_conversion.names import autoencoder, diffusion_model, image_tower, text_encoder

# By K. Turner and torridgristle for Stable Diffusion 1.5, also used by InvokeAI:
# https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204
_PREVIEW = (
    (0.3444, 0.1385, 0.0670),
    (0.1247, 0.4027, 0.1494),
    (-0.3192, 0.2513, 0.2103),
    (-0.1307, -0.1874, -0.7445),
)


_TEXT_ENCODER = Part(
    "text_encoder", "text_encoder", "text_encoder", text_encoder.PREFIX, "tokenizer"
)
_AUTOENCODER = (
    Part("image_encoder", "image_encoder", "vae", autoencoder.PREFIX),
    Part("image_decoder", "image_decoder", "vae", autoencoder.PREFIX),
)
_DIFFUSION_MODEL = Part(NETWORK, "diffusion_model", "unet", diffusion_model.PREFIX)
_IMAGE_TOWER = Part("image_tower", "image_tower", "image_encoder", image_tower.PREFIX)

_WIDE = 1024  # width of the text states of Stable Diffusion 2

_UNSUPPORTED = "This architecture is not supported; use a checkpoint of Stable Diffusion 1 or 2."
_BASE = "Load the base model that it belongs to; this file alone draws nothing."
_WHOLE = "Name a whole model, or the model's folder."


def _prompted(extra: Callable[[int], int], is_wide: bool = False) -> Callable[[Fields], bool]:
    """Return the test for diffusion models of texts.

    Args:
        extra: tells how many channels the network is given beside the latents, whose number of
            channels it is given.
        is_wide: whether the text states are as wide as those of Stable Diffusion 2.
    """

    def takes(fields: Fields) -> bool:
        width, latents = fields["context_width"], fields["out_channels"]
        is_prompted = width is not None and fields["num_classes"] is None
        fits = fields["in_channels"] == latents + extra(latents)
        return is_prompted and fits and (width == _WIDE) == is_wide

    return takes


def _is_unprompted(fields: Fields) -> bool:
    is_conditioned = fields["in_channels"] != fields["out_channels"]
    return fields["context_width"] is None and not is_conditioned


def _nothing(latents: int) -> int:
    return 0


def _masked_image(latents: int) -> int:
    return latents + 1


def _whole_image(latents: int) -> int:
    return latents


_STABLE_DIFFUSION = Family(
    "sd1",
    "Stable Diffusion 1",
    unet(lambda net: net.context == 768 and net.inputs == 4),
    (_TEXT_ENCODER, *_AUTOENCODER, _DIFFUSION_MODEL),
    _prompted(_nothing),
    pipeline="StableDiffusion",
    index="StableDiffusionPipeline",
    preview=_PREVIEW,
    prediction="epsilon",
)

_ROWS = (
    Family(
        "flux",
        "Flux or another transformer of flows",
        begins("double_blocks.", "single_blocks.", "txt_in.", "transformer_blocks.", "net."),
        use=_UNSUPPORTED,
    ),
    Family("sd3", "Stable Diffusion 3", begins("joint_blocks.", "x_embedder."), use=_UNSUPPORTED),
    Family(
        "video",
        "a video model, such as SVD or AnimateDiff",
        contains("time_mixer.mix_factor", "motion_modules.", ".time_stack."),
        use=_UNSUPPORTED,
    ),
    Family(
        "controlnet",
        "a ControlNet",
        begins("control_model.", "controlnet_cond_embedding.", "input_hint_block."),
        use=_BASE,
    ),
    Family(
        "t2i-adapter",
        "a T2I-Adapter",
        begins("adapter.body.", "adapter.conv_in.", "body.0.block1.", "body.0.in_conv."),
        use=_BASE,
    ),
    Family("ip-adapter", "an IP-Adapter", begins("ip_adapter.", "image_proj."), use=_BASE),
    Family(
        "lora",
        "a LoRA, LoHa or LoKr",
        either(begins("lora_"), contains(".lora_", ".lora.", "hada_w", "lokr_w", "_lora.")),
        use=_BASE,
    ),
    Family(
        "textual-inversion",
        "a textual inversion embedding",
        begins("emb_params", "string_to_param.", "string_to_token.", "clip_g", "clip_l"),
        use=_BASE,
    ),
    Family("playground-v2.5", "Playground v2.5", begins("edm_mean", "edm_std"), use=_UNSUPPORTED),
    Family("sdxl", "Stable Diffusion XL", begins("conditioner.embedders.1."), use=_UNSUPPORTED),
    Family(
        "sdxl-refiner",
        "the refiner of Stable Diffusion XL",
        begins("conditioner.embedders.0."),
        use=_UNSUPPORTED,
    ),
    Family(
        "sd2-unclip",
        "Stable Diffusion 2.1 unCLIP",
        begins("embedder.model.", "noise_augmentor."),
        use=_UNSUPPORTED,
    ),
    Family(
        "diffusers-part",
        "one part of a folder in diffusers' layout",
        either(
            begins("down_blocks.", "mid_block."),
            contains("encoder.down_blocks.", "decoder.up_blocks."),
        ),
        use="Name the folder.",
    ),
    Family(
        "ldm",
        "a latent diffusion model without text",
        unet(lambda net: net.context is None),
        use=_UNSUPPORTED,
    ),
    Family(
        "sd2-depth",
        "Stable Diffusion 2 with depth",
        unet(lambda net: net.inputs == 5),
        use=_UNSUPPORTED,
    ),
    Family(
        "x4-upscaler",
        "the x4 upscaler of Stable Diffusion",
        unet(lambda net: net.inputs == 7),
        use=_UNSUPPORTED,
    ),
    Family(
        "sdxl-unet",
        "the U-Net of Stable Diffusion XL",
        unet(lambda net: net.has_labels and net.is_deep),
        use=_UNSUPPORTED,
    ),
    Family(
        "class-conditional",
        "a U-Net of class or image embeddings",
        unet(lambda net: net.has_labels),
        use=_UNSUPPORTED,
    ),
    _STABLE_DIFFUSION,
    replace(
        _STABLE_DIFFUSION,
        name="sd1-inpaint",
        title="Stable Diffusion 1 for inpainting",
        signs=unet(lambda net: net.context == 768 and net.inputs == 9),
        takes=_prompted(_masked_image),
        index="StableDiffusionInpaintPipeline",
    ),
    replace(
        _STABLE_DIFFUSION,
        name="sd2",
        title="Stable Diffusion 2",
        signs=unet(lambda net: net.context == _WIDE and net.inputs == 4),
        takes=_prompted(_nothing, is_wide=True),
        prediction=None,
        sample_size=(64, 96),
    ),
    replace(
        _STABLE_DIFFUSION,
        name="sd2-inpaint",
        title="Stable Diffusion 2 for inpainting",
        signs=unet(lambda net: net.context == _WIDE and net.inputs == 9),
        takes=_prompted(_masked_image, is_wide=True),
        index="StableDiffusionInpaintPipeline",
    ),
    replace(
        _STABLE_DIFFUSION,
        name="instruct-pix2pix",
        title="InstructPix2Pix on Stable Diffusion 1",
        signs=unet(lambda net: net.inputs == 8),
        takes=_prompted(_whole_image),
        index="StableDiffusionInstructPix2PixPipeline",
    ),
    Family(
        "ldm-text",
        "the text model before Stable Diffusion",
        unet(lambda net: net.context == 1280 and net.inputs in (4, 9)),
        use=_UNSUPPORTED,
    ),
    Family(
        "latent-diffusion",
        "a latent diffusion model of classes or without conditions",
        parts=(*_AUTOENCODER, _DIFFUSION_MODEL),
        takes=_is_unprompted,
        pipeline="LatentDiffusion",
        index="LatentDiffusion",
    ),
    Family(
        "pixel-diffusion",
        "a diffusion model of pixels",
        parts=(_DIFFUSION_MODEL,),
        takes=_is_unprompted,
        pipeline="PixelDiffusion",
        index="PixelDiffusion",
    ),
    Family("clip", "a CLIP", parts=(_TEXT_ENCODER, _IMAGE_TOWER), use=_WHOLE),
    Family(
        "vae",
        "an autoencoder alone",
        without_unet("first_stage_model."),
        _AUTOENCODER,
        use=_WHOLE,
    ),
    Family(
        "text-encoder",
        "a text encoder alone",
        without_unet("cond_stage_model."),
        (_TEXT_ENCODER,),
        use=_WHOLE,
    ),
)
FAMILIES = {family.name: family for family in _ROWS}
UNKNOWN = Family("unknown", "nothing that is known here", use=_UNSUPPORTED)


def identify(shapes: Shapes) -> Family:
    """Return the family of a single file, told from its tensors' names and shapes.

    Args:
        shapes: the shape of each tensor, by name (see `single_file.canonical_names`).

    Returns:
        The family; `UNKNOWN` if none fits.

    Example:

    >>> identify({"model.diffusion_model.double_blocks.0.img_mod.lin.weight": (9216, 3072)}).title
    'Flux or another transformer of flows'
    """
    rows = (family for family in FAMILIES.values() if family.signs and family.signs(shapes))
    return next(rows, UNKNOWN)


def family_of(
    has: Callable[[Part], bool], fields: Callable[[Part], Fields] | None = None
) -> Family:
    """Return the family of a folder or of models in memory, told from their parts.

    Of the families whose diffusion model has such fields, the one is taken that has the most parts,
    and of these the one that lacks the fewest. If the fields fit none, the result is the nearest
    family, whose pipeline refuses the network with a better message.

    Args:
        has: tells if a part is there.
        fields: returns the fields of the diffusion model as such a part; None if they are unknown.

    Returns:
        The family; `UNKNOWN` if there is no part of any.

    Example:

    >>> models = {"diffusion_model": {"context_width": None, "in_channels": 3, "out_channels": 3}}
    >>> family_of(lambda part: part.name in models, lambda part: models[part.name]).pipeline
    'PixelDiffusion'
    """

    def takes(family: Family, there: list[Part]) -> bool:
        network = next((part for part in there if part.name == NETWORK), None)
        try:
            return network is not None and (fields is None or family.takes(fields(network)))
        except CheckpointError:  # a network of another kind
            return False

    def fit(family: Family) -> tuple[bool, int, int]:
        there = [part for part in family.parts if has(part)]
        return takes(family, there), len(there), -len(family.parts)

    best = max(FAMILIES.values(), key=fit)
    return best if any(map(has, best.parts)) else UNKNOWN


def describe(family: Family, shapes: Shapes) -> str:
    """Return what a file looks like and what to use, for the message of an error."""
    if family is UNKNOWN:
        return (
            f"looks like {family.title}: its tensors are {listed(sorted(shapes)) or 'none'}. "
            f"{family.use}"
        )
    return f"looks like {family.title}. {family.use or ''}".rstrip()
