"""The implementations that are measured: one module for each, all with the same `Peer`.

`Peer(folder, dtype)` imports and reads nothing yet but its framework; it has

- `load()`: reads or makes all that a picture needs;
- `network(side)`, `guided(side)`, `decode(side)`, `picture(side, num_steps)`: each returns a
  function without arguments that computes one network call of one latent, one guided step, one
  decoded picture, or a whole picture from a prompt. It returns a NumPy array, so it has ended when
  it returns; `side` is the picture's, in pixels. Those that have an attention of their own have
  `attention(side)` too.

A method that a peer cannot offer raises `Unavailable` with the reason, which the table then names.
"""

from __future__ import annotations

from typing import NamedTuple


class Unavailable(Exception):
    """Why something is not measured."""


class Row(NamedTuple):
    """A column of the table.

    Args:
        module: str, a module of this package.
        frameworks: those of `FRAMEWORKS` that it is made with; the others are hidden from it.
        environment: dictionary of environment variables.
        is_eager: bool, whether its first run, which compiles nothing, takes as long as any other.
        checkout: str, the environment variable that names the checkout it is of; empty for this
            one.
    """

    module: str
    frameworks: tuple[str, ...]
    environment: dict[str, str] = {}
    is_eager: bool = False
    checkout: str = ""


# What takes time and memory wherever it is installed: TensorFlow imports JAX, Keras matplotlib, and
# others look for all of them. Each peer is measured as if it were alone in its environment.
FRAMEWORKS = ("tensorflow", "jax", "torch", "openvino", "matplotlib")

# oneDNN's kernels, which kdiffusion asks for itself where it is imported first, for all.
_TENSORFLOW = {"KERAS_BACKEND": "tensorflow", "TF_ENABLE_ONEDNN_OPTS": "1"}

# The checkout that `--before` names.
BEFORE = "KDIFFUSION_BENCHMARK_BEFORE"

PEERS = {
    "kdiffusion": Row("kdiffusion", ("tensorflow",), _TENSORFLOW),
    "kdiffusion-jax": Row("kdiffusion", ("tensorflow", "jax"), {"KERAS_BACKEND": "jax"}),
    "before": Row("kdiffusion", ("tensorflow",), _TENSORFLOW, checkout=BEFORE),
    "diffusers": Row("diffusers", ("torch",), is_eager=True),
    "diffusers-compiled": Row("diffusers", ("torch",), {"BENCHMARK_COMPILE": "1"}),
    "kerascv": Row("kerascv", ("tensorflow",), _TENSORFLOW),
    "zeromodels": Row("zeromodels", FRAMEWORKS, _TENSORFLOW),
    "openvino": Row("openvino", FRAMEWORKS),
}
