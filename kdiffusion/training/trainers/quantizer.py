"""The training of a codebook, and of the encoder through it (van den Oord et al. 2017)."""

from __future__ import annotations

from typing import Any

from keras import ops


def straight_through(codes: Any, vectors: Any) -> Any:
    """Return the codebook's vectors with a gradient that passes to the codes unchanged.

    Args:
        codes: (batch, height, width, channels), the encoder's output.
        vectors: tensor like `codes`, the nearest vectors of the codebook.

    Returns:
        Tensor like `codes`.
    """
    return codes + ops.stop_gradient(vectors - codes)


def codebook_loss(codes: Any, vectors: Any, commitment: float = 0.25, legacy: bool = True) -> Any:
    """Compute the loss that pulls vectors and codes together (eq. 3 there).

    Args:
        codes: (batch, height, width, channels) float32, the encoder's output.
        vectors: tensor like `codes`, the nearest vectors, with a gradient to the codebook.
        commitment: float, the paper's beta.
        legacy: bool. `True` weights the term that moves the vectors by `commitment`, as the
            original latent diffusion code does by mistake and all its models were trained;
            `False` weights the one that moves the codes, as in the paper.

    Returns:
        (batch,) float32.
    """
    to_vectors = _mean_square(ops.stop_gradient(vectors) - codes)
    to_codes = _mean_square(vectors - ops.stop_gradient(codes))
    if legacy:
        return to_vectors + commitment * to_codes
    return commitment * to_vectors + to_codes


def perplexity(indices: Any, size: int) -> Any:
    """Compute how many vectors of a codebook are in use: the exponential of the choices' entropy.

    Args:
        indices: tensor of int32, the indices of the chosen vectors.
        size: int, vectors of the codebook.

    Returns:
        Scalar float32, from 1, where all choices are equal, to `size`.
    """
    indices = ops.reshape(indices, (-1,))
    counts = ops.segment_sum(ops.ones_like(indices, "float32"), indices, size)
    share = counts / ops.sum(counts)
    return ops.exp(-ops.sum(share * ops.log(share + 1e-10)))


def _mean_square(difference):
    return ops.mean(ops.square(difference), axis=(1, 2, 3))
