"""Random weights in which mistakes show: each tensor's from its diffusers name and shape alone.

Networks with the usual initial weights are numb: many wrong constants change their output by less
than rounding does. Here
- the residual streams that group normalizations see have a deviation of about 0.05, so that their
  epsilons matter, 1e-6 or 1e-5;
- the inputs of GELUs are of order 1 to 3, where its approximations differ;
- the logits of attention are of order 1;
- scales, offsets and biases are no ones and zeros;
- prompts and timesteps move the output by a good part of its size.

Uniform numbers, because generators' normal ones may change between releases of NumPy.
"""

import math
import re
import zlib

import numpy as np

# The end of a module's name; deviation of its outputs for inputs of deviation 1, and of its biases.
_LAYERS = (
    (r"decoder\.conv_in", 0.01, 0.01),  # its inputs are latents / 0.18215
    # what is added to the residual streams that group normalizations see, or carries them on
    (r"conv_in|conv2|mid_block\.attentions\.0\.to_out\.0", 0.05, 0.01),
    (r"proj_out", 0.03, 0.01),
    (r"conv_shortcut|samplers\.0\.conv", 1.0, 0.01),
    (r"to_q|q_proj|to_out\.0|linear_2|ff\.net\.0\.proj|fc1", 1.5, 0.3),
    (r"to_v|time_emb_proj", 2.0, 0.3),
    (r"ff\.net\.2|fc2|\w+_embedding", 0.5, 0.1),
    (r".*", 1.0, 0.2),
)
_NORMS = 0.2  # deviation of norms' scales from 1 and of their offsets from 0


def random_weight(name, shape):
    """Returns a tensor of a diffusers or transformers text to image model.

    Args:
        name: str, the tensor's name in its state dict.
        shape: tuple of int.

    Returns:
        float32 array.
    """
    name = name.removeprefix("text_model.")  # which transformers leaves out since 5.6
    module, leaf = name.rsplit(".", 1)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.random(shape, np.float32)
    values -= np.float32(0.5)
    if "norm" in module.rsplit(".", 1)[-1]:
        deviation, mean = _NORMS, float(leaf == "weight")
    else:
        deviation, mean = _deviation(module, leaf, shape), 0.0
    values *= np.float32(math.sqrt(12.0) * deviation)
    values += np.float32(mean)
    return values


def _deviation(module, leaf, shape):
    gain, bias = next(layer[1:] for layer in _LAYERS if re.search(rf"(^|\.)({layer[0]})$", module))
    if leaf == "bias":
        return bias
    if module.endswith("_embedding"):
        return gain
    return gain / math.sqrt(math.prod(shape[1:]))
