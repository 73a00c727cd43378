"""Full-size SD 1.5 and SD 2.1-768-v with random weights against diffusers, and proof that it sees.

    python tests/acceptance/exactness.py [--components] [--family sd15|sd21] [--cache FOLDER]

Every error is the relative L2 distance of kdiffusion's float32 result from the reference's float64
result; the floor is the reference's own float32 result's distance from it, on the same weights and
inputs. A component may be off by 3 floors, final latents of 20 guided steps by 5. Each mistake of
`exactness_mutants.py`, injected into kdiffusion, has to miss the bar that kdiffusion itself keeps.
The weights have to be fit for that: the network's output of deviation 0.3 to 3, and moved by 10 %
or more by another prompt and by 200 timesteps.

`--components` leaves out the runs of 20 steps. `--cache` keeps the checkpoints (4 and 5 GB) and
the reference's results; empty it after changes to `exactness_reference.py` or the weights.
Needs the extra `parity`, `KDIFFUSION_CLIP_VOCAB` and 12 GB of memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

FAMILIES = ("sd15", "sd21")
COMPONENT_BAR, LATENTS_BAR = 3.0, 5.0  # floors
# A reference this far from itself is none.
HIGHEST_FLOOR = 1e-5
DEVIATION, MOVED = (0.3, 3.0), 0.1
# The small case of each network is computed eagerly, without and with mutants, the other compiled.
SMALL = ("text_encoder 77", "image_encoder 40x56", "image_decoder 7x5", "diffusion_model 7x5")


def main():
    parser = argparse.ArgumentParser(description="Compare full-size models with diffusers.")
    parser.add_argument("--components", action="store_true", help="no runs of 20 steps")
    parser.add_argument("--family", choices=FAMILIES, help="only one of them")
    parser.add_argument("--cache", type=Path, help="folder to keep checkpoints and results in")
    arguments = parser.parse_args()
    if arguments.family is None:
        # A process for each, which gives all memory back.
        command = [sys.executable, __file__, *sys.argv[1:], "--family"]
        sys.exit(max([subprocess.run([*command, family]).returncode for family in FAMILIES]))
    start = time.monotonic()
    table = Table()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.cache or Path(temporary)) / arguments.family
        names = ["components"] if arguments.components else ["components", "latents"]
        check(table, folder, reference(folder, arguments.family, names))
    title = f"{arguments.family} on {os.environ.get('KERAS_BACKEND', 'tensorflow')}"
    print(f"\n## {title}, {time.monotonic() - start:.0f} s\n\n{table}\n")
    print(f"{len(table.rows) - table.failures} passed, {table.failures} failed", flush=True)
    sys.exit(bool(table.failures))


class Table:
    """Rows of figures with a verdict each."""

    def __init__(self):
        self.rows = []
        self.failures = 0

    def add(self, name, figures, passed, verdicts=("ok", "FAILED")):
        self.rows.append((name, *figures, verdicts[not passed]))
        self.failures += not passed
        log("  " + " | ".join(self.rows[-1]))

    def compare(self, name, floor, error, bar, is_mutant=False):
        """One row of a result, or of a mutant that has to miss the bar."""
        verdicts = ("seen", "NOT SEEN") if is_mutant else ("ok", "FAILED")
        figures = (f"{floor:.2e}", f"{error:.2e}", f"{error / floor:.2f}", f"{bar:.0f}")
        passed = (error <= bar * floor) != is_mutant and 0.0 < floor <= HIGHEST_FLOOR
        self.add(name, figures, passed, verdicts)

    def require(self, name, value, low, high):
        """One row of a figure between two limits."""
        self.add(name, ("", f"{value:.3f}", "", f"{low} to {high}"), low <= value <= high)

    def __str__(self):
        header = ("what", "floor", "error", "error / floor", "bar", "verdict")
        rows = [header, ("---",) * len(header), *self.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def reference(folder, family, names):
    """diffusers' inputs and outputs: name of the file, group, case, name of the array."""
    files = {name: folder / f"{name}.npz" for name in names}
    missing = [name for name in names if not files[name].exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("exactness_reference.py")
        subprocess.run([sys.executable, script, family, folder, *missing], check=True)
    results = {name: {"inputs": {}, "float32": {}, "float64": {}} for name in names}
    for name, file in files.items():
        for key, array in np.load(file).items():
            group, case, array_name = key.split("|")
            results[name][group].setdefault(case, {})[array_name] = array
    return results


def check(table, folder, results):
    components = results["components"]
    pipeline = make_pipeline(folder / "checkpoint")
    check_weights(table, components["float64"])
    check_compiled(table, pipeline, components)
    check_mutants(table, pipeline, components)
    if "latents" in results:
        check_latents(table, pipeline, results["latents"])


def check_weights(table, exact):
    """The conditions under which mistakes show, on the rows of `DIFFUSION_ROWS`."""
    prediction = exact["diffusion_model 16x16"]["prediction"]
    table.require("deviation of the network's output", prediction.std(), *DEVIATION)
    for name, row in (("200 timesteps", 3), ("another prompt", 4)):
        moved = distance(prediction[row], prediction[0])
        table.require(f"moved by {name}", moved, MOVED, 1.0)


def check_compiled(table, pipeline, results):
    """The networks as pipelines run them."""
    from kdiffusion.runtime.programs import Program

    program = Program(call, pipeline.jit_compile)
    for case in results["inputs"]:
        if case in SMALL and not case.startswith("text_encoder"):
            continue
        outputs = compute(pipeline, case, results["inputs"][case], program)
        for name, output in outputs.items():
            floats, exact = (results[group][case][name] for group in ("float32", "float64"))
            parts = {f"{case} {name}": slice(None)}
            if "timestep" in results["inputs"][case]:
                timesteps = results["inputs"][case]["timestep"]
                parts = {f"{case} row {i}, t = {t:g}": i for i, t in enumerate(timesteps)}
            for title, part in parts.items():
                errors = distance(floats[part], exact[part]), distance(output[part], exact[part])
                table.compare(title, *errors, COMPONENT_BAR)


def check_mutants(table, pipeline, results):
    """The networks eagerly, first as they are, then with each mistake."""
    from exactness_mutants import mutants

    for case in SMALL:
        choices = {"as it is": nullcontext, **mutants(pipeline, case.split()[0])}
        for name, mutant in choices.items():
            copy = eager_copy(pipeline)
            with mutant(copy):
                outputs = compute(copy, case, results["inputs"][case], call)
            floats, exact = results["float32"][case], results["float64"][case]
            errors = [
                (distance(floats[output], exact[output]), distance(outputs[output], exact[output]))
                for output in exact
            ]
            floor, error = max(errors, key=lambda pair: pair[1] / pair[0])
            title = f"{case} eagerly, {name}"
            table.compare(title, floor, error, COMPONENT_BAR, is_mutant=mutant is not nullcontext)


def check_latents(table, pipeline, results):
    """Final latents of whole runs."""
    for case, settings in results["inputs"].items():
        settings = {name: value.item() for name, value in settings.items()}
        latents = pipeline.text_to_image(**settings, verbose=0)
        floats, exact = (results[group][case]["latents"] for group in ("float32", "float64"))
        errors = distance(floats, exact), distance(latents, exact)
        table.compare(f"{case}, {settings['num_steps']} steps", *errors, LATENTS_BAR)


def make_pipeline(preset, **options):
    """A pipeline whose pictures are the final latents."""
    from kdiffusion.pipelines.stable_diffusion import StableDiffusion

    class LatentsPipeline(StableDiffusion):
        def decode(self, latents):
            return latents

    return LatentsPipeline(preset=preset, **options)


def eager_copy(pipeline):
    """A pipeline of the same parts that has compiled nothing and does not."""
    copy = make_pipeline(pipeline.preset, jit_compile=False)
    for part in ("tokenizer", "text_encoder", "image_encoder", "diffusion_model", "decoder"):
        setattr(copy, part, getattr(pipeline, part))
    return copy


def compute(pipeline, case, inputs, run):
    """The outputs of a case as arrays, by their names in the reference's results."""
    kind = case.split()[0]
    if kind == "text_encoder":
        return {"context": pipeline.encode_text([str(prompt) for prompt in inputs["prompts"]])}
    if kind == "image_encoder":
        outputs = run(pipeline.image_encoder, inputs["images"])
    elif kind == "image_decoder":
        outputs = {"images": run(pipeline.decoder, inputs["latents"])}
    else:
        outputs = {"prediction": run(pipeline.diffusion_model, inputs)}
    return {name: np.asarray(output) for name, output in outputs.items()}


def call(network, inputs):
    return network(inputs)


def distance(result, exact):
    """Relative L2 distance."""
    return np.linalg.norm(np.ravel(result - exact)) / np.linalg.norm(np.ravel(exact))


def log(message):
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
