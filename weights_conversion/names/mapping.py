"""Reading a model's variables from a checkpoint, and writing them into one: strict both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from weights_conversion.files.checkpoint import Checkpoint
from weights_conversion.files.errors import (
    CheckpointMismatch,
    NonFiniteWeights,
    listed,
    printable,
)
from weights_conversion.names import layouts
from weights_conversion.names.table import DIALECTS, Row, Stored

# Names that tools gave the same tensors at other times, and today's name in the same dialect.
_DRIFT = {
    "diffusers": (
        # autoencoders, before diffusers 0.17
        (re.compile(r"(\.attentions\.\d+)\.query\."), r"\1.to_q."),
        (re.compile(r"(\.attentions\.\d+)\.key\."), r"\1.to_k."),
        (re.compile(r"(\.attentions\.\d+)\.value\."), r"\1.to_v."),
        (re.compile(r"(\.attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
        # CLIPTextModel, since transformers 5.6
        (re.compile(r"^(?=(embeddings|encoder\.layers|final_layer_norm)\.)"), "text_model."),
    ),
    "compvis": (
        # merges of NovelAI's time
        (
            re.compile(
                r"^(cond_stage_model\.transformer\.)(?=(embeddings|encoder|final_layer_norm)\.)"
            ),
            r"\1text_model.",
        ),
    ),
}
# Tensors that no computation needs: indices 0…76 (at times damaged by merging in half precision),
# a causal mask, CLIP's training temperature, and the autoencoder's training losses.
_HARMLESS = re.compile(r"(^|\.)(position_ids|attn_mask|logit_scale)$|^first_stage_model\.loss\.")


def read(
    rows: Iterable[Row],
    checkpoint: Checkpoint,
    dialect: str,
    *,
    beside: Iterable[Row] = (),
    allow_nonfinite: bool = False,
) -> Iterator[tuple[str, np.ndarray]]:
    """Read every variable of a model from a checkpoint.

    All names, shapes and dtypes are checked before this returns; the tensors are then read one by
    one. Old names, optional prefixes and either rank of a projection are accepted; position ids
    and other tensors that no computation needs are passed over. In a CompVis file, which holds
    more than models, only tensors under the rows' own first prefix are expected to be known.

    Args:
        rows: the model's name table.
        checkpoint: where to read.
        dialect: "compvis" or "diffusers".
        beside: name tables of further models that the same file holds, such as the decoder's
            beside the encoder's; rows of this model among them change nothing.
        allow_nonfinite: whether NaN and infinity may be in the weights.

    Returns:
        An iterator of (kdiffusion path, array). The array has the file's float dtype and the Keras
        layout; it may be a view that is not contiguous.

    Raises:
        CheckpointMismatch: tensors are missing, unexpected, or of a wrong shape or dtype.
        NonFiniteWeights: while iterating, at the first tensor that holds NaN or infinity.

    Example:

    >>> table = rows("image_encoder", fields)
    >>> others = rows("image_decoder", fields)
    >>> weights = dict(read(table, checkpoint, "diffusers", beside=others))
    """
    rows = tuple(rows)
    own = by_tensor(rows, dialect)
    others = [row for row in beside if stored(row, dialect).name not in own]
    checkpoint = without(checkpoint, others, dialect)
    places = locate(rows, checkpoint, dialect)
    return _arrays(places, checkpoint, allow_nonfinite)


def locate(rows: Iterable[Row], checkpoint: Checkpoint, dialect: str) -> dict[str, Stored]:
    """Find every variable of a model in a checkpoint, as `read` does, without reading any.

    Returns:
        The name in this very file, and the layout, by kdiffusion path.

    Raises:
        CheckpointMismatch: tensors are missing, unexpected, or of a wrong shape or dtype.
    """
    wanted = by_tensor(rows, dialect)
    found = todays_names(checkpoint, dialect)
    _check(wanted, found, checkpoint, dialect)
    return {
        row.kdiffusion: Stored(found[name], stored(row, dialect).layout)
        for name, group in wanted.items()
        for row in group
    }


def write(
    rows: Iterable[Row], weights: Mapping[str, np.ndarray], dialect: str
) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint that holds a model's variables.

    Args:
        rows: the model's name table.
        weights: arrays in Keras layout, by kdiffusion path; exactly the table's.
        dialect: "compvis" or "diffusers".

    Returns:
        Arrays by the dialect's names. They may be views of the weights, not contiguous.

    Raises:
        CheckpointMismatch: variables are missing, unexpected, or of a wrong shape.
    """
    groups = by_tensor(rows, dialect)
    shapes = {row.kdiffusion: row.shape for group in groups.values() for row in group}
    found = {path: tuple(array.shape) for path, array in weights.items()}
    _raise(
        "The variables to write are not those of the model's name table",
        [
            _problem("missing", shapes.keys() - found.keys()),
            _problem("unexpected", found.keys() - shapes.keys()),
            _problem(
                "of another shape",
                (
                    f"{path}: {found[path]} instead of {shapes[path]}"
                    for path in shapes.keys() & found.keys()
                    if found[path] != shapes[path]
                ),
            ),
        ],
    )
    return {name: _tensor(group, weights, dialect) for name, group in groups.items()}


def _tensor(group: list[Row], weights: Mapping[str, np.ndarray], dialect: str) -> np.ndarray:
    parts = [
        layouts.to_torch(stored(row, dialect).layout, weights[row.kdiffusion]) for row in group
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def stored(row: Row, dialect: str) -> Stored:
    """Return where a dialect stores a variable."""
    if dialect not in DIALECTS:
        raise ValueError(f"Unknown dialect {dialect!r}. Known dialects: {', '.join(DIALECTS)}.")
    return getattr(row, dialect)


def by_tensor(rows: Iterable[Row], dialect: str) -> dict[str, list[Row]]:
    """Group rows by the tensor that stores them: one each, or the three of a stack."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(stored(row, dialect).name, []).append(row)
    return groups


def without(checkpoint: Checkpoint, rows: Iterable[Row], dialect: str) -> Checkpoint:
    """Return the tensors of a checkpoint but those of other models, given their name tables."""
    others = by_tensor(rows, dialect)
    if not others:
        return checkpoint
    found = todays_names(checkpoint, dialect)
    return checkpoint.renamed({own: own for today, own in found.items() if today not in others})


def todays_names(
    checkpoint: Checkpoint, dialect: str, full: Callable[[str], str] = str
) -> dict[str, str]:
    """Return the names in a checkpoint by the name that each tensor has today.

    Args:
        checkpoint: the tensors.
        dialect: "compvis" or "diffusers".
        full: makes a name whole that lacks its beginning.

    Raises:
        CheckpointMismatch: two names stand for the same tensor.
    """
    found: dict[str, str] = {}
    for name in checkpoint:
        today = full(name)
        for pattern, replacement in _DRIFT[dialect]:
            today = pattern.sub(replacement, today)
        if today in found:
            raise CheckpointMismatch(
                f"{checkpoint.path} holds the same tensor under two names: "
                f"{listed((found[today], name))}. Remove one of them."
            )
        found[today] = name
    return found


def _check(wanted, found, checkpoint: Checkpoint, dialect: str) -> None:
    shapes, dtypes = [], []
    for name in wanted.keys() & found.keys():
        info = checkpoint.info(found[name])
        row = wanted[name][0]
        expected = layouts.stored_shapes(stored(row, dialect).layout, row.shape)
        if info.shape not in expected:
            shapes.append(f"{found[name]}: {info.shape} instead of {expected[0]}")
        if not _is_float(info.dtype):
            dtypes.append(f"{found[name]}: {info.dtype}")
    scopes = {name.split(".")[0] for name in wanted} if dialect == "compvis" else None
    unexpected = [
        found[name]
        for name in found.keys() - wanted.keys()
        if not _HARMLESS.search(name) and (scopes is None or name.split(".")[0] in scopes)
    ]
    _raise(
        f"{checkpoint.path} does not hold this model in {dialect} names",
        [
            _problem("missing", wanted.keys() - found.keys()),
            _problem("unexpected", unexpected),
            _problem("of another shape", shapes),
            _problem("not of a float dtype", dtypes),
        ],
    )


def _problem(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{len(names)} {what}: {listed(names)}" if names else ""


def _raise(title: str, problems: list[str]) -> None:
    problems = [problem for problem in problems if problem]
    if problems:
        raise CheckpointMismatch(
            f"{title}: {'; '.join(problems)}. "
            "Use the config.json files that belong to these weights."
        )


def _is_float(dtype: np.dtype) -> bool:
    # NumPy takes some of ml_dtypes' types for void, kind "V".
    return dtype.kind == "f" or "float" in dtype.name


def _arrays(
    places: Mapping[str, Stored], checkpoint: Checkpoint, allow_nonfinite: bool
) -> Iterator[tuple[str, np.ndarray]]:
    name, tensor = None, np.empty(0)
    for path, place in places.items():
        if place.name != name:  # the three of a stack follow one another
            name, tensor = place.name, checkpoint[place.name]
            if not allow_nonfinite:
                check_finite(tensor, name, checkpoint.path)
        yield path, layouts.to_keras(place.layout, tensor)


def check_finite(tensor: np.ndarray, name: str, path: object) -> None:
    """Raise NonFiniteWeights, naming tensor and count, if a number is NaN or infinite."""
    if not _is_finite(tensor):
        raise NonFiniteWeights(
            f"{path}: tensor {printable(name)} holds "
            f"{np.count_nonzero(~np.isfinite(tensor)):,} values that are NaN or infinite. "
            "Download the file again or take another one; allow_nonfinite=True reads it as it is."
        )


def _is_finite(tensor: np.ndarray) -> bool:
    if tensor.dtype.itemsize != 2:
        return bool(np.isfinite(tensor).all())
    # NumPy converts half types one by one; their bits without the sign are ordered like their
    # magnitudes, infinity and NaN last, which is ten times faster to see.
    infinity = np.array(np.inf, tensor.dtype).view(np.uint16)
    return bool((tensor.view(np.uint16) & 0x7FFF).max(initial=0) < infinity)
