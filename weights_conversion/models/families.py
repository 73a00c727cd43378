"""Which model is this? Told from names and shapes of a file's tensors, never guessed.

The first row that fits wins, as adapters contain names of the models they adapt. Sources: the
detection of diffusers, ComfyUI, AUTOMATIC1111 and stable-diffusion.cpp, which all agree on these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from weights_conversion.files.errors import listed

Shapes = Mapping[str, tuple[int, ...]]


class Family(NamedTuple):
    """A kind of model.

    Attributes:
        name: a short name, for programs.
        title: what it is, for people.
        use: what to do with it if it cannot be loaded as Stable Diffusion, else None.
    """

    name: str
    title: str
    use: str | None = None


class _Signs(NamedTuple):
    """Names that tell a family; any of them is enough.

    Attributes:
        leading: beginnings of names, once `model.diffusion_model.` is taken off.
        inside: parts of names.
    """

    leading: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()


_UNSUPPORTED = "This architecture is not supported; use a checkpoint of Stable Diffusion 1 or 2."
_BASE = "Load the base model that it belongs to; this file alone draws nothing."

_ADAPTERS_AND_STRANGERS = (
    (
        Family("flux", "Flux or another transformer of flows", _UNSUPPORTED),
        _Signs(("double_blocks.", "single_blocks.", "txt_in.", "transformer_blocks.", "net.")),
    ),
    (
        Family("sd3", "Stable Diffusion 3", _UNSUPPORTED),
        _Signs(("joint_blocks.", "x_embedder.")),
    ),
    (
        Family("video", "a video model, such as SVD or AnimateDiff", _UNSUPPORTED),
        _Signs(inside=("time_mixer.mix_factor", "motion_modules.", ".time_stack.")),
    ),
    (
        Family("controlnet", "a ControlNet", _BASE),
        _Signs(("control_model.", "controlnet_cond_embedding.", "input_hint_block.")),
    ),
    (
        Family("t2i-adapter", "a T2I-Adapter", _BASE),
        _Signs(("adapter.body.", "adapter.conv_in.", "body.0.block1.", "body.0.in_conv.")),
    ),
    (
        Family("ip-adapter", "an IP-Adapter", _BASE),
        _Signs(("ip_adapter.", "image_proj.")),
    ),
    (
        Family("lora", "a LoRA, LoHa or LoKr", _BASE),
        _Signs(("lora_",), (".lora_", ".lora.", "hada_w", "lokr_w", "_lora.")),
    ),
    (
        Family("textual-inversion", "a textual inversion embedding", _BASE),
        _Signs(("emb_params", "string_to_param.", "string_to_token.", "clip_g", "clip_l")),
    ),
    (
        Family("playground-v2.5", "Playground v2.5", _UNSUPPORTED),
        _Signs(("edm_mean", "edm_std")),
    ),
    (
        Family("sdxl", "Stable Diffusion XL", _UNSUPPORTED),
        _Signs(("conditioner.embedders.1.",)),
    ),
    (
        Family("sdxl-refiner", "the refiner of Stable Diffusion XL", _UNSUPPORTED),
        _Signs(("conditioner.embedders.0.",)),
    ),
    (
        Family("sd2-unclip", "Stable Diffusion 2.1 unCLIP", _UNSUPPORTED),
        _Signs(("embedder.model.", "noise_augmentor.")),
    ),
    (
        Family("diffusers-part", "one part of a folder in diffusers' layout", "Name the folder."),
        _Signs(("down_blocks.", "mid_block."), ("encoder.down_blocks.", "decoder.up_blocks.")),
    ),
)
_XL_UNET = Family("sdxl", "the U-Net of Stable Diffusion XL", _UNSUPPORTED)
_CLASSES = Family("class-conditional", "a U-Net of class or image embeddings", _UNSUPPORTED)
_UNCONDITIONAL = Family("ldm", "a latent diffusion model without text", _UNSUPPORTED)
_BY_CONTEXT = {
    768: Family("sd1", "Stable Diffusion 1"),
    1024: Family("sd2", "Stable Diffusion 2"),
    1280: Family("ldm-text", "the text model before Stable Diffusion", _UNSUPPORTED),
}
_BY_INPUTS = {
    5: Family("sd2-depth", "Stable Diffusion 2 with depth", _UNSUPPORTED),
    7: Family("x4-upscaler", "the x4 upscaler of Stable Diffusion", _UNSUPPORTED),
    8: Family("instruct-pix2pix", "InstructPix2Pix on Stable Diffusion 1"),
}
_INPAINTING = 9
_VAE = Family("vae", "an autoencoder alone", "Name a whole model, or the model's folder.")
_TEXT = Family("text-encoder", "a text encoder alone", "Name a whole model, or the model's folder.")
UNKNOWN = Family("unknown", "nothing that is known here", _UNSUPPORTED)


def identify(shapes: Shapes) -> Family:
    """Tells the family of a checkpoint from its tensors' names, in CompVis style, and shapes.

    Args:
        shapes: the shape of each tensor, by name (see `single_file.canonical_names`).

    Returns:
        The family; `UNKNOWN` if none fits.

    Example:

    >>> identify({"model.diffusion_model.double_blocks.0.img_mod.lin.weight": (9216, 3072)}).title
    'Flux or another transformer of flows'
    """
    bare = [name.removeprefix("model.diffusion_model.") for name in shapes]
    for family, signs in _ADAPTERS_AND_STRANGERS:
        if any(name.startswith(signs.leading) for name in bare):
            return family
        if any(part in name for part in signs.inside for name in shapes):
            return family
    if "model.diffusion_model.input_blocks.0.0.weight" in shapes:
        return _unet(shapes)
    if any(name.startswith("first_stage_model.") for name in shapes):
        return _VAE
    if any(name.startswith("cond_stage_model.") for name in shapes):
        return _TEXT
    return UNKNOWN


def _unet(shapes: Shapes) -> Family:
    prefix = "model.diffusion_model."
    inputs = (*shapes[f"{prefix}input_blocks.0.0.weight"], 0, 0)[1]
    context = next(
        (
            shape[1]
            for name, shape in shapes.items()
            if name.startswith(prefix) and name.endswith("attn2.to_k.weight") and len(shape) > 1
        ),
        None,
    )
    has_labels = any(name.startswith(f"{prefix}label_emb.") for name in shapes)
    if context is None:
        return _UNCONDITIONAL
    if inputs in _BY_INPUTS:
        return _BY_INPUTS[inputs]
    if has_labels:
        is_xl = f"{prefix}input_blocks.4.1.transformer_blocks.1.norm1.weight" in shapes
        return _XL_UNET if is_xl else _CLASSES
    family = _BY_CONTEXT.get(context)
    if family is None or inputs not in (4, _INPAINTING):
        return UNKNOWN
    if inputs == _INPAINTING and family.use is None:
        return Family(f"{family.name}-inpaint", f"{family.title} for inpainting")
    return family


def describe(family: Family, shapes: Shapes) -> str:
    """Returns what a file looks like and what to use, for the message of an error."""
    if family is UNKNOWN:
        return (
            f"looks like {family.title}: its tensors are {listed(sorted(shapes)) or 'none'}. "
            f"{family.use}"
        )
    return f"looks like {family.title}. {family.use or ''}".rstrip()
