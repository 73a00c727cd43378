"""The files of a folder in diffusers' layout that make a model, told from their names alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from weights_conversion.files.errors import CheckpointMismatch, listed
from weights_conversion.models.families import family_of

INDEX = "model_index.json"
SCHEDULER, SCHEDULER_CONFIG = "scheduler", "scheduler_config.json"
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "tokenizer.json",
)
# Names of weights, of diffusers' components and of transformers', the better format first.
STEMS = {
    ".safetensors": ("diffusion_pytorch_model", "model"),
    ".bin": ("diffusion_pytorch_model", "pytorch_model"),
}
_VARIANT = re.compile(
    r"(?:diffusion_pytorch_|pytorch_)?model\.(?P<variant>[\w-]+?)"
    r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
_TERMS = re.compile(r"(readme|licen[cs]e|notice)(\.(md|txt))?", re.IGNORECASE)


class Selection(NamedTuple):
    """The files of a folder that a model needs.

    Attributes:
        names: their names.
        variant: that of the weights, such as "fp16"; None for those without one.
    """

    names: list[str]
    variant: str | None


def select(names: Iterable[str], index: Mapping[str, Any] | None = None) -> Selection:
    """Choose the files that a model needs: of each component one config and one set of weights.

    Weights without a variant are taken before any variant, safetensors files before `.bin` files.

    Args:
        names: of all files, with "/" between the folder and the name.
        index: the content of model_index.json, if it is there, which lists further components.

    Raises:
        CheckpointMismatch: something is missing; the message names the files.
    """
    names = set(names)
    there = {name.partition("/")[0] for name in names if "/" in name}
    there |= {name for name, classes in (index or {}).items() if classes != [None, None]}
    family = family_of(lambda part: part.folder in there)
    components = family.folders
    inside = {component: _inside(names, component) for component in components}
    found = {
        match["variant"]
        for part in inside.values()
        for match in map(_VARIANT.fullmatch, part)
        if match
    }
    variants = [None, *sorted(found, key=lambda variant: (variant != "fp16", variant))]
    choices = {
        variant: {part: weights_files(inside[part], variant) for part in components}
        for variant in variants
    }
    variant = next((v for v, chosen in choices.items() if all(chosen.values())), None)
    needed = [INDEX, f"{SCHEDULER}/{SCHEDULER_CONFIG}"]
    for component, chosen in choices[variant].items():
        needed.append(f"{component}/config.json")
        needed += [f"{component}/{name}" for name in chosen or ["model weights"]]
        needed += [f"{component}/{name}" for name in _absent_shards(chosen)]
    if missing := [name for name in needed if name not in names]:
        raise CheckpointMismatch(f"missing files: {listed(missing)}")
    tokenizer = [f"{folder}/{name}" for folder in family.tokenizers for name in TOKENIZER_FILES]
    return Selection(needed + [name for name in tokenizer if name in names], variant)


def weights_files(names: Collection[str], variant: str | None = None) -> list[str]:
    """Return the files that hold a component's weights: one, or an index and then its shards.

    Args:
        names: of the files in the component's folder.
        variant: the part of the file name before the suffix, such as "fp16" or "non_ema".
    """
    dotted = f".{variant}" if variant else ""
    for suffix, stems in STEMS.items():
        for stem in stems:
            if (single := f"{stem}{dotted}{suffix}") in names:
                return [single]
            # today's order of index and variant, and that of diffusers before 0.27
            for index in (
                f"{stem}{suffix}.index{dotted}.json",
                f"{stem}{dotted}{suffix}.index.json",
            ):
                if index in names:
                    start, end = map(re.escape, (stem, suffix))
                    own = re.escape(dotted)
                    shard = re.compile(rf"{start}({own}-\d+-of-\d+|-\d+-of-\d+{own}){end}")
                    return [index, *sorted(filter(shard.fullmatch, names))]
    return []


def terms(names: Iterable[str]) -> list[str]:
    """Return the names of a folder's own README and licence."""
    return sorted(filter(_TERMS.fullmatch, names))


def _inside(names: Iterable[str], folder: str) -> set[str]:
    places = (name.partition("/") for name in names)
    return {rest for first, _, rest in places if first == folder and "/" not in rest}


def _absent_shards(chosen: list[str]) -> list[str]:
    """Name the shards that the others count and that are not there."""
    shards = chosen[1:]
    if not shards:
        return ["shards of its weights"] if ".index" in "".join(chosen) else []
    place = re.compile(r"-(\d+)-of-(\d+)")
    there = {int(place.search(name)[1]) for name in shards}  # type: ignore[index]
    count = int(place.search(shards[0])[2])  # type: ignore[index]
    example = shards[0]
    return [
        place.sub(f"-{number:05d}-of-{count:05d}", example)
        for number in range(1, count + 1)
        if number not in there
    ]
