"""A full-size Stable Diffusion 1 is loaded in seconds, and never twice in memory.

    python tests/acceptance/loading.py [--folder FOLDER] [--cache FOLDER]

Single files of random numbers in float32, `.safetensors` and PyTorch's `.ckpt` in CompVis names,
are loaded with all four networks and the tokenizer, each in processes of its own that have
imported everything and find the file in the page cache. Half types, and a folder in diffusers'
layout if one is given, are measured too, and reported only. Wants 9 GB of disk and 6 GB of memory.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from full_size import FULL, random_tensors, tables

from weights_conversion import open_safetensors
from weights_conversion.files.safetensors_writer import write_safetensors

MOST_SECONDS = 15.0
MOST_MEMORY = 1.4  # of the weights
MOST_CONTAINER = 1.3  # of safetensors' seconds
CHECKED = 12  # variables of each network that are compared with the file
ROUNDS = 2  # of the judged files; the quicker one counts
PARTS = ("tokenizer", "text_encoder", "image_encoder", "diffusion_model", "decoder")


def main():
    parser = argparse.ArgumentParser(description="Seconds and memory of loading.")
    parser.add_argument("--cache", type=Path, help="where the files are kept for another time")
    parser.add_argument("--folder", type=Path, help="in diffusers' layout, to report as well")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    with tempfile.TemporaryDirectory() as work:
        place = arguments.cache or Path(work)
        return judge(write_files(place), arguments.folder)


def judge(files, folder):
    halves = ["bfloat16"] if os.environ.get("KERAS_BACKEND") == "jax" else ["bfloat16", "float16"]
    judged = [measure(path, "float32") for _ in range(ROUNDS) for path in files]
    for path, dtype in [(files[0], half) for half in halves]:
        measure(path, dtype)
    if folder:
        measure(folder, "float32")
    safetensors, container = (
        min(result["seconds"] for result in judged[start :: len(files)]) for start in (0, 1)
    )
    memory = max(result["extra"] / result["weights"] for result in judged)
    print(
        f"{safetensors:.1f} s (bar {MOST_SECONDS}), memory {memory:.2f} of the weights (bar "
        f"{MOST_MEMORY}), container {container / safetensors:.2f} of safetensors' seconds (bar "
        f"{MOST_CONTAINER})"
    )
    failures = []
    if safetensors > MOST_SECONDS:
        failures.append(f"loading took {safetensors:.1f} s")
    if memory > MOST_MEMORY:
        failures.append(f"loading took {memory:.2f} times the weights' memory")
    if container > MOST_CONTAINER * safetensors:
        failures.append(f"the container took {container:.1f} s")
    failures += [problem for result in judged for problem in result["wrong"]]
    for failure in failures:
        print(f"FAILED: {failure}")
    return bool(failures)


def write_files(place):
    """The two single files; those that are there already are taken."""
    safetensors, container = place / "sd1.safetensors", place / "sd1.ckpt"
    if not safetensors.exists():
        partial = place / "partial"
        table = tables(FULL["sd1"], "unet", "vae", "text_encoder")
        write_safetensors(partial, random_tensors(table, "compvis", "float32"))
        partial.replace(safetensors)
    if not container.exists():
        import torch

        checkpoint = open_safetensors(safetensors)
        tensors = {name: torch.from_numpy(checkpoint[name]) for name in checkpoint}
        torch.save({"state_dict": tensors, "global_step": 840_000}, place / "partial")
        (place / "partial").replace(container)
    return safetensors, container


def measure(path, dtype):
    """Loads a file in a fresh process, once it is in the page cache."""
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        with open(file, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    command = [sys.executable, __file__, "--child", str(path), dtype]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"FAILED: {path.name} in {dtype}: {result.stderr[-2000:]}")
    found = json.loads(result.stdout.splitlines()[-1])
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["parts"].items())
    print(
        f"{path.name} in {dtype}: {found['seconds']:.1f} s ({found['processor']:.1f} s of the "
        f"processor; {parts}), {found['extra'] / 1e9:.2f} GB for "
        f"{found['weights'] / 1e9:.2f} GB of weights",
        flush=True,
    )
    return found


def child(path, dtype):
    """Import, load, and look at the result, in a fresh process."""
    import keras
    import numpy as np

    from kdiffusion import StableDiffusion

    keras.ops.convert_to_numpy(keras.ops.ones(1))  # the backend's own start-up
    before = memory("VmRSS")
    began, worked = time.perf_counter(), time.process_time()
    model = StableDiffusion.from_preset(path, dtype=dtype)
    parts = {}
    for name in PARTS:
        start = time.perf_counter()
        getattr(model, name)
        parts[name] = time.perf_counter() - start
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    extra = memory("VmHWM") - before
    size, wrong = 0, []
    for network in map(model.__getattribute__, PARTS[1:]):
        itemsize = 4 if dtype == "float32" else 2
        size += sum(itemsize * math.prod(variable.shape) for variable in network.variables)
        values = {variable.path: variable for variable in network.variables}
        expected = model.source.checkpoint
        for name, array in itertools.islice(expected.arrays(network.name), CHECKED):
            value = keras.ops.convert_to_numpy(values[name])
            if not np.array_equal(value, array.astype(value.dtype)):
                wrong.append(f"{network.name}'s {name} is not the file's")
    found = {"seconds": seconds, "processor": processor, "extra": extra, "weights": size}
    print(json.dumps(found | {"parts": parts, "wrong": wrong}))


def memory(name):
    """Bytes: VmRSS is what the process has now, VmHWM the most it ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
