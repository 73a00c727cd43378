"""Measures of CLIP: retrieval and zero-shot classification, in NumPy.

Vectors are those of `CLIPTrainer.encode_images` and `CLIPTrainer.encode_text`: of unit length, so
their products are cosines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def recall_at(k: int, scores: np.ndarray, relevant: np.ndarray) -> float:
    """Compute the share of queries with a relevant candidate among their k best.

    A tie counts against the query, and so does a score that is not a number. A model that gives
    equal scores to all candidates finds nothing.

    Args:
        k: int, from 1.
        scores: (queries, candidates), higher is better.
        relevant: (queries, candidates) bool, at least one in each row.

    Returns:
        float in [0, 1].

    Raises:
        ValueError: If a query has no relevant candidate, or the shapes differ.
    """
    scores, relevant = np.asarray(scores), np.asarray(relevant, bool)
    if scores.shape != relevant.shape or scores.ndim != 2 or not scores.size:
        raise ValueError(
            "`scores` and `relevant` must both be (queries, candidates). "
            f"Received: shapes {scores.shape} and {relevant.shape}"
        )
    if not relevant.any(axis=1).all():
        raise ValueError(
            "Every query needs a relevant candidate. Received: none for query "
            f"{int(np.argmin(relevant.any(axis=1)))}"
        )
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    ahead = (~relevant & ~(scores < best)).sum(axis=1)
    return float((ahead < k).mean())


def retrieval(
    image_vectors: np.ndarray,
    text_vectors: np.ndarray,
    captions: Sequence | np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Compute recall at k from images to captions and back (Radford et al. 2021, table 13).

    Images may share a caption: each caption is one candidate and one query, and every image that
    has it is relevant to it.

    Args:
        image_vectors: (images, width).
        text_vectors: (images, width), of each image's caption.
        captions: each image's caption, to tell captions apart: texts, numbers or rows of tokens.
        ks: sequence of int.

    Returns:
        Dictionary of `"image_to_text@k"` and `"text_to_image@k"`, each in [0, 1], for each k.

    Raises:
        ValueError: If the three do not have one row for each image.

    Example:

    ```python
    tokens = tokenizer.rows(captions)
    retrieval(trainer.encode_images(images), trainer.encode_text(tokens), tokens)
    ```
    """
    captions = np.asarray(captions)
    if not len(image_vectors) == len(text_vectors) == len(captions):
        raise ValueError(
            "Every image needs a vector, its caption's vector and its caption. Received: "
            f"{len(image_vectors)}, {len(text_vectors)} and {len(captions)}"
        )
    _, firsts, numbers = np.unique(captions, axis=0, return_index=True, return_inverse=True)
    relevant = numbers.reshape(-1, 1) == np.arange(len(firsts))
    scores = image_vectors @ text_vectors[firsts].T
    return {
        f"{name}@{k}": recall_at(k, *pair)
        for name, pair in {
            "image_to_text": (scores, relevant),
            "text_to_image": (scores.T, relevant.T),
        }.items()
        for k in ks
    }


def class_vectors(
    encode: Callable[[list[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Compute the mean vector of each class's prompts (Radford et al. 2021, section 3.1.4).

    Args:
        encode: function from a list of texts to their unit vectors, (texts, width).
        names: sequence of str, the classes.
        templates: sequence of str with `{}` where the name stands.

    Returns:
        (classes, width) float32 unit vectors.

    Raises:
        ValueError: If a template has no place for the name, or there are none.

    Example:

    ```python
    encode = lambda texts: trainer.encode_text(tokenizer.rows(texts))
    class_vectors(encode, ["cat", "dog"], ["a photo of a {}", "a drawing of a {}"]).shape
    # (2, 512)
    ```
    """
    if isinstance(templates, str) or not templates or not all("{}" in t for t in templates):
        raise ValueError(
            "`templates` must be a list of texts with {} where the name of a class stands. "
            f"Received: {templates!r}"
        )
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors = np.asarray(encode(prompts), np.float32)
    mean = vectors.reshape(len(names), len(templates), -1).mean(axis=1)
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)


def zero_shot(
    image_vectors: np.ndarray,
    vectors: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    ks: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Compute the accuracy of classification by the nearest class vector.

    Args:
        image_vectors: (images, width).
        vectors: (classes, width), see `class_vectors`.
        labels: (images,) int, each image's class.
        ks: sequence of int.

    Returns:
        Dictionary of `"top-k"`, in [0, 1], for each k: the share of images whose class is among
        the k nearest.

    Raises:
        ValueError: If a label is no class.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(image_vectors),) or not np.isin(labels, np.arange(len(vectors))).all():
        raise ValueError(
            f"`labels` must be one number from 0 to {len(vectors) - 1} for each of the "
            f"{len(image_vectors)} images. Received: {labels!r}"
        )
    relevant = labels[:, None] == np.arange(len(vectors))
    return {f"top-{k}": recall_at(k, image_vectors @ vectors.T, relevant) for k in ks}
