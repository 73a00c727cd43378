"""Single files judged by diffusers and PyTorch: `python tests/acceptance/compvis.py [--tiny]`.

For Stable Diffusion 1 and 2 in full size (`--tiny`: toys), with random weights in float16: a folder
is converted to a single file by the command line, the file is loaded by diffusers and compared
with the folder, converted back and compared again. Then `.ckpt` files that PyTorch wrote, with
optimizer states and a moving average, are read and compared. Counts what was compared and the
memory of the conversions; exits with 1 if anything differs.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from full_size import FULL, PARTS, TINY, write_folder  # noqa: E402

from weights_conversion import open_model, open_safetensors, open_single_file, rows  # noqa: E402
from weights_conversion.names.layouts import stored_shapes  # noqa: E402

COMPONENTS = sorted({part.folder for part in PARTS})
MOST_EXTRA_BYTES = 300_000_000


def main():
    parser = argparse.ArgumentParser(description="Single files, judged from outside.")
    parser.add_argument("--tiny", action="store_true", help="toys instead of full size")
    families = TINY if parser.parse_args().tiny else FULL
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failures = []
    for family, fields in families.items():
        with tempfile.TemporaryDirectory() as work:
            failures += round_trip(family, fields, Path(work))
    failures += pickles(families["sd1"])
    for failure in failures[:50]:
        print(f"FAILED {failure}")
    print(f"{len(failures)} failures")
    return 1 if failures else 0


def round_trip(family, fields, work):
    """Folder to single file, to diffusers, and back to a folder."""
    folder = write_folder(work / "folder", family, fields)
    file, back = work / "model.safetensors", work / "back"
    failures = converted(folder, file)
    failures += dropped_unlisted(folder, file)
    failures += loaded_by_diffusers(family, folder, file)
    failures += converted(file, back, "--tokenizer", folder / "tokenizer")
    count = 0
    for component in COMPONENTS:
        first = open_model(folder).folder.weights(component)
        second = open_model(back).folder.weights(component)
        failures += differences(f"{family}, back: {component}", first, second)
        count += len(first)
    size = file.stat().st_size / 1e9
    print(f"{family}: {count} tensors there and back, {size:.2f} GB", flush=True)
    return failures


def converted(source, destination, *options):
    """Runs the command line and looks at its memory."""
    began = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, "convert", source, destination, *options]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    if result.returncode:
        return [f"convert {source.name}: {result.stderr[-1000:]}"]
    extra = int(result.stdout.split()[-1])
    model = open_model(source)
    tensors = [model.tensors(part.name) for part in PARTS]
    largest = max(part.info(name).nbytes for part in tensors for name in part)
    print(
        f"converted {source.name} to {destination.name} in {time.perf_counter() - began:.0f} s, "
        f"{extra / 1e6:.0f} MB more than at the start; largest tensor {largest / 1e6:.0f} MB"
    )
    if extra > largest + MOST_EXTRA_BYTES:
        return [f"convert {source.name} took {extra / 1e6:.0f} MB"]
    return []


# Not ru_maxrss, which a process inherits from the one that started it.
MEASURED = """
import sys
from pathlib import Path
from weights_conversion.cli import main

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
code = main(sys.argv[1:])
print(peak() - before)
sys.exit(code)
"""


def dropped_unlisted(folder, file):
    """Names of a folder's tensors that are in no row of the single file."""
    kept = len(open_safetensors(file))
    model = open_model(folder)
    wanted = {row.compvis.name for part in PARTS for row in model.rows(part.name)}
    return [] if kept == len(wanted) else [f"{file.name} holds {kept} tensors, not {len(wanted)}"]


def loaded_by_diffusers(family, folder, file):
    pipeline = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), torch_dtype=torch.float16, local_files_only=True
    )
    failures = []
    for component in COMPONENTS:
        found = getattr(pipeline, component).state_dict()
        arrays = {name.removeprefix("text_model."): t.numpy() for name, t in found.items()}
        expected = open_model(folder).folder.weights(component)
        expected = expected.renamed({name.removeprefix("text_model."): name for name in expected})
        arrays = {name: array for name, array in arrays.items() if "position_ids" not in name}
        failures += differences(f"{family}, diffusers: {component}", expected, arrays)
    print(f"{family}: loaded by diffusers, peak {peak() / 1e9:.1f} GB", flush=True)
    return failures


def differences(title, first, second):
    if set(first) != set(second):
        return [f"{title}: names differ: {sorted(set(first) ^ set(second))[:10]}"]
    return [
        f"{title}: {name} differs"
        for name in first
        if not np.array_equal(first[name], np.asarray(second[name]).reshape(first.info(name).shape))
    ]


def pickles(fields):
    """`.ckpt` files of PyTorch with a moving average and optimizer states."""
    table = rows("diffusion_model", fields["unet"])
    raw = {
        row.compvis.name: torch.zeros(stored_shapes(row.compvis.layout, row.shape)[0]).half()
        for row in table
    }
    generator = torch.Generator().manual_seed(0)
    for tensor in raw.values():
        tensor.normal_(generator=generator)
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor / 2
        for name, tensor in raw.items()
    }
    state = {
        "state_dict": {**raw, **average},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(10_000_000)}}}],
        "global_step": 470_000,
    }
    failures = []
    for legacy in (False, True):
        with tempfile.TemporaryDirectory() as work:
            path = Path(work, "model.ckpt")
            torch.save(state, path, _use_new_zipfile_serialization=not legacy)
            for weights, names in (("raw", raw), ("ema", average)):
                model = open_single_file(path, weights=weights)
                found = model.tensors("diffusion_model")
                values = {name: t.numpy() for name, t in zip(raw, names.values())}
                title = f"{'legacy' if legacy else 'zip'}, {weights}"
                failures += differences(title, found, values)
                failures += differences_of_paths(title, table, model, values)
    print(f"PyTorch's files: {4 * len(raw)} tensors compared", flush=True)
    return failures


def differences_of_paths(title, table, model, values):
    found = dict(model.arrays("diffusion_model"))
    if found.keys() != {row.kdiffusion for row in table}:
        return [f"{title}: paths differ"]
    row = table[0]
    kernel = values[row.compvis.name].T
    return [] if np.array_equal(found[row.kdiffusion], kernel) else [f"{title}: {row.kdiffusion}"]


def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
