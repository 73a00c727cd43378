"""Half precision: timesteps stay apart, components stay close, pictures stay alike, none is black.

    python tests/acceptance/dtypes.py [--preset PRESET] [--size PIXELS]

Every dtype policy on the backend in use, against float32 with the same weights.
"""

import argparse
import sys
import warnings

import keras
import numpy as np
from keras import ops

from kdiffusion import StableDiffusion

COMPONENT_BARS = {"bfloat16": 3e-2, "float16": 5e-3}
PICTURE_BAR = 25.0  # dB
PROMPT = "a red circle on a blue background"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="random-tiny")
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    # What is slow on this processor is no failure.
    warnings.filterwarnings("default", module=r"kdiffusion\.processor")
    failures = []
    exact = measure(arguments, "float32", failures)
    for policy in ("mixed_bfloat16", "bfloat16", "mixed_float16", "float16"):
        if "bfloat16" not in policy and keras.backend.backend() == "jax":
            check_refused(arguments, policy, failures)
        else:
            compare(exact, measure(arguments, policy, failures), policy, failures)
    check_never_black(arguments, failures)
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


def measure(arguments, policy, failures):
    """Outputs of all components for fixed inputs, and a picture of 20 guided steps."""
    model = StableDiffusion(arguments.size, arguments.size, preset=arguments.preset, dtype=policy)
    generator = np.random.default_rng(0)
    codec = model.decoder.architecture
    side = arguments.size // codec.downsampling
    latents = generator.normal(size=(1, side, side, codec.latent_channels)).astype("float32")
    image = generator.uniform(-1, 1, (1, arguments.size, arguments.size, 3)).astype("float32")
    context = np.asarray(StableDiffusion(preset=arguments.preset).encode_text(PROMPT))
    unet = model.diffusion_model
    latents_in = latents
    if unet.architecture.in_channels > latents.shape[-1]:
        extra = unet.architecture.in_channels - latents.shape[-1]
        latents_in = np.concatenate([latents, np.zeros((1, side, side, extra), "float32")], -1)
    outputs = {"text encoder": model.encode_text(PROMPT)}
    for timestep in (980.0, 981.0, 981.5):
        inputs = {
            "latents": latents_in,
            "timestep": np.array([timestep], "float32"),
            "context": context,
        }
        outputs[f"U-Net at {timestep:g}"] = as_float32(unet(inputs))
    outputs["image encoder"] = as_float32(model.image_encoder(image)["mean"])
    outputs["image decoder"] = as_float32(model.decoder(latents))
    outputs["picture"] = model.text_to_image(PROMPT, num_steps=20, seed=1, verbose=0)
    at = [outputs[f"U-Net at {t}"] for t in ("980", "981", "981.5")]
    steps = [relative(at[0], at[1]), relative(at[2], at[1])]
    print(f"{policy:15s} timesteps 980 | 981 | 981.5 are {steps[0]:.1e} and {steps[1]:.1e} apart")
    if not min(steps) > 0:
        failures.append(f"{policy}: two of the timesteps 980, 981, 981.5 give one output")
    if not all(np.isfinite(value).all() for value in outputs.values()):
        failures.append(f"{policy}: a component is not finite")
    return outputs


def compare(exact, rounded, policy, failures):
    bar = COMPONENT_BARS[policy.removeprefix("mixed_")]
    for name in exact:
        if name == "picture":
            error = np.mean((rounded[name].astype(float) - exact[name].astype(float)) ** 2)
            decibels = 10 * np.log10(255.0**2 / max(error, 1e-9))
            print(f"{policy:15s} {name:16s} {decibels:9.1f} dB, bar {PICTURE_BAR} dB")
            if decibels < PICTURE_BAR:
                failures.append(f"{policy}: the picture is {decibels:.1f} dB from float32's")
        else:
            error = relative(rounded[name], exact[name])
            print(f"{policy:15s} {name:16s} {error:9.1e}, bar {bar:.0e}")
            if not 0 < error <= bar:
                failures.append(f"{policy}: {name} is {error:.1e} from float32's")


def check_refused(arguments, policy, failures):
    try:
        StableDiffusion(preset=arguments.preset, dtype=policy)
    except ValueError as error:
        print(f"{policy:15s} refused: {error}")
        if "float16" not in str(error):
            failures.append(f"{policy}: the refusal does not name float16")
    else:
        failures.append(f"{policy}: JAX on a CPU has no float16, but nothing was raised")


def check_never_black(arguments, failures):
    """Overflow in each network: the U-Net's raises, a half decoder's is decoded in float32."""
    model = StableDiffusion(arguments.size, arguments.size, preset=arguments.preset)
    scale_kernel(model.diffusion_model, np.inf)
    try:
        model.text_to_image(PROMPT, num_steps=2, seed=1, verbose=0)
        failures.append("a U-Net that overflows drew a picture")
    except ValueError as error:
        print("overflow in the U-Net:", error)
    model = StableDiffusion(arguments.size, arguments.size, preset=arguments.preset)
    scale_kernel(model.decoder, np.nan)
    try:
        model.text_to_image(PROMPT, num_steps=2, seed=1, verbose=0)
        failures.append("a decoder that overflows in float32 drew a picture")
    except ValueError as error:
        print("overflow in the decoder:", error)
    if keras.backend.backend() == "tensorflow":
        check_retry(arguments, failures)


def check_retry(arguments, failures):
    exact = StableDiffusion(arguments.size, arguments.size, preset=arguments.preset)
    half = StableDiffusion(
        arguments.size, arguments.size, preset=arguments.preset, dtype="mixed_float16"
    )
    for model in (exact, half):
        # The middle's output grows beyond 65504, float16's largest number; a group norm divides
        # it down again.
        scale_kernel(model.decoder, 3e5, "conv_in/kernel")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = half.text_to_image(PROMPT, num_steps=2, seed=1, verbose=0)
    messages = [str(w.message) for w in caught if "float32" in str(w.message)]
    difference = np.abs(
        picture.astype(int) - exact.text_to_image(PROMPT, num_steps=2, seed=1, verbose=0)
    ).mean()
    print(f"overflow in a float16 decoder: {messages}; {difference:.2f}/255 from float32's")
    if not messages:
        failures.append("a half-precision decoder that overflows did not say so")
    if difference > 5:
        failures.append("the picture decoded again in float32 is another one")


def scale_kernel(model, factor, path="conv_out/kernel"):
    kernel = next(v for v in model.variables if v.path == path)
    kernel.assign(kernel * factor)


def as_float32(value):
    return ops.convert_to_numpy(ops.cast(value, "float32"))


def relative(value, reference):
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


if __name__ == "__main__":
    main()
