"""Two backends draw the same picture, and nothing but the shapes makes a new program.

    python tests/acceptance/programs.py

One object draws with every sampler, 5, 20 and 50 steps, several prompts, seeds, guidance scales,
strengths and mixed batches, in a child process for each backend. Compilations are counted where
they happen: graphs traced by TensorFlow, modules that XLA compiled (from its dump), JAX's
`backend_compile` events.
Then the weights change in three ways: the picture has to change, the counts must not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CHILDREN = {
    "tensorflow, XLA": ("tensorflow", True),
    "tensorflow, graph": ("tensorflow", False),
    "jax": ("jax", True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=CHILDREN)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        draw(CHILDREN[arguments.child][1], arguments.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: run_child(name, Path(folder)) for name in CHILDREN}
        failures = [f for name, report in reports.items() for f in check_counts(name, report)]
        failures += check_pictures(Path(folder))
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


def run_child(name, folder):
    backend, jit_compile = CHILDREN[name]
    output = folder / f"{name}.npz"
    dump = folder / f"{name} dump"
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if backend == "tensorflow":
        flags = f'--xla_dump_to="{dump}" --xla_dump_hlo_as_text'
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    command = [sys.executable, __file__, "--child", name, "--output", str(output)]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def check_counts(name, report):
    print(f"{name}:")
    for stage, counts in report["counts"].items():
        print(f"  {stage:52s}", ", ".join(f"{kind} {count}" for kind, count in counts.items()))
    first, second = (report["counts"][f"first {kind} picture"] for kind in ("guided", "unguided"))
    known = first
    for stage, counts in report["counts"].items():
        if stage.startswith("first"):
            known = counts
        elif counts != known:
            yield f"{name}: {stage} made new programs: {counts} instead of {known}"
    for kind in first:
        new = second[kind] - first[kind]
        expected = 1 if report["counted"][kind] else 0
        if new != expected:
            yield f"{name}: guided and unguided must differ by one program; {kind} made {new}"
        if report["counted"][kind] and not first[kind]:
            yield f"{name}: nothing was counted as {kind}"
    for change, moved in report["moved"].items():
        print(f"  the picture after {change:32s} moved by {moved:.1f}/255 on average")
        if moved < 1.0:
            yield f"{name}: {change} did not change the picture"


def check_pictures(folder):
    files = {name: np.load(folder / f"{name}.npz") for name in CHILDREN}
    reference = files["tensorflow, XLA"]
    for name, pictures in files.items():
        for key in reference:
            difference = np.abs(pictures[key].astype(int) - reference[key].astype(int))
            equal = np.mean(difference == 0)
            if name != "tensorflow, XLA":
                largest = f"largest difference {difference.max()}/255"
                print(f"{name}, {key}: {largest}, {equal:.4%} equal")
            if difference.max() > 1 or equal < 0.999:
                yield f"{name} draws another picture of {key} than TensorFlow with XLA"
        alone = pictures["mixed batch, one by one"].astype(int)
        largest = np.abs(pictures["mixed batch"] - alone).max()
        print(f"{name}: a mixed batch against its images alone: {largest}/255, bar 1/255")
        if largest > 1:
            yield f"{name}: an image of a mixed batch is not the one it is alone"


def draw(jit_compile, output):
    from kdiffusion import StableDiffusion
    from kdiffusion.sampling.samplers import SAMPLERS

    counters = start_counters(jit_compile)
    model = StableDiffusion.from_preset("random-tiny", jit_compile=jit_compile)
    counts, pictures, moved = {}, {}, {}
    # Loading the parts runs small operations, which JAX compiles too.
    for part in ("text_encoder", "image_encoder", "diffusion_model", "decoder"):
        getattr(model, part)
    start = {kind: counter(model) for kind, counter in counters.items()}

    def picture(**settings):
        settings = {"prompt": "a red circle", "seed": 42, "num_steps": 5, **settings}
        return model.text_to_image(verbose=0, **settings)

    def count(stage):
        counts[stage] = {kind: counter(model) - start[kind] for kind, counter in counters.items()}

    def redraw(stage, change):
        """The picture before and after a change whose own compilations do not count."""
        before = picture().astype(float)
        changing = {kind: counter(model) for kind, counter in counters.items()}
        change()
        for kind, counter in counters.items():
            start[kind] += counter(model) - changing[kind]
        moved[stage] = float(np.abs(picture() - before).mean())
        count(stage)

    pictures["guided"] = picture()
    count("first guided picture")
    pictures["unguided"] = picture(unconditional_guidance_scale=1.0)
    count("first unguided picture")
    picture(prompt="two words and a whole lot more of them", negative_prompt="ugly", seed=7)
    picture(unconditional_guidance_scale=12.5)
    picture(unconditional_guidance_scale=0.0)
    count("other prompts, seeds and scales")
    for sampler in SAMPLERS:
        for steps in (5, 20, 50):
            pictures[f"{sampler}, {steps} steps"] = picture(sampler=sampler, num_steps=steps)
        count(f"sampler {sampler}, 5, 20 and 50 steps")
    picture_of_strengths(model, picture, count)
    batches(model, picture, count, pictures)
    path = output.with_suffix(".weights.h5")
    redraw("an in-place assign", lambda: assign(model))
    redraw("load_weights", lambda: load_weights(model, path))
    redraw("replacing a component", lambda: replace(model))
    np.savez(output, **pictures)
    counted = {kind: kind != "XLA modules" or jit_compile for kind in counters}
    print(json.dumps({"counts": counts, "moved": moved, "counted": counted}))


def picture_of_strengths(model, picture, count):
    image = picture()[0]

    def from_picture(**settings):
        settings = {"seed": 1, "num_steps": 10, "verbose": 0, **settings}
        return model.image_to_image(image, "a red circle", **settings)

    from_picture()
    count("first image_to_image")
    for strength in (0.1, 0.3, 0.8, 1.0):
        for sampler in ("ddim", "euler_a", "heun", "unipc"):
            from_picture(strength=strength, sampler=sampler)
    count("image_to_image, strengths 0.1 to 1.0")


def batches(model, picture, count, pictures):
    """A batch whose images differ in everything, against each image alone."""
    each = {
        "seed": [42, 7, 42, 3],
        "num_steps": [5, 20, 7, 50],
        "sampler": ["ddim", "heun", "dpmpp_sde", "unipc"],
        "unconditional_guidance_scale": [7.5, 1.0, 3.0, 12.0],
    }
    prompts = ["a red circle", "a blue square", "", "many words in a row"]
    picture(prompt=prompts, seed=1)
    count("first batch of four")
    mixed = picture(prompt=prompts, **each)
    count("a batch of four mixed in everything")
    alone = [
        picture(prompt=prompt, **{name: values[i] for name, values in each.items()})[0]
        for i, prompt in enumerate(prompts)
    ]
    pictures["mixed batch"], pictures["mixed batch, one by one"] = mixed, np.stack(alone)


def start_counters(jit_compile):
    """Functions of the model that count compilations so far."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        events = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, *_, **__: events.append(event) if "backend_compile" in event else None
        )
        return {"backend_compile events": lambda model: len(events)}

    from kdiffusion.runtime.plain_graph import PlainGraph

    def graphs(model):
        programs = [value for name, value in vars(model).items() if name.endswith("_program")]
        return sum(
            # One of ours, or one of TensorFlow's where XLA compiles all of it.
            (
                len(function)
                if isinstance(function, PlainGraph)
                else function.experimental_get_tracing_count()
            )
            for program in programs
            for function in program._compiled.values()
        )

    def modules(model):
        flag = [f for f in os.environ["XLA_FLAGS"].split("--") if f.startswith("xla_dump_to=")]
        folder = Path(flag[0].removeprefix("xla_dump_to=").strip().strip('"'))
        return len({path.name.split(".")[0] for path in folder.glob("module_*")})

    return {"graphs traced": graphs, "XLA modules": modules}


def assign(model):
    variables = model.diffusion_model.variables
    kernel = next(v for v in variables if v.path == "conv_out/kernel")
    kernel.assign(-kernel)


def load_weights(model, path):
    other = type(model.decoder)(model.decoder.architecture)
    other.save_weights(path)
    model.decoder.load_weights(path)


def replace(model):
    model.text_encoder = type(model.text_encoder)(model.text_encoder.architecture)
    model.diffusion_model = type(model.diffusion_model)(model.diffusion_model.architecture)


if __name__ == "__main__":
    main()
