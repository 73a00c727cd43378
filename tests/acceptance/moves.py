"""Modules have moved and nothing changed for users: images, tokens, weights, files and texts.

    python tests/acceptance/moves.py [--data FOLDER] [--record]

The results of the commit before the move, with public names and the command line alone, are in
`moves.npz` and `moves.json` beside this file. On a processor and with versions like those of the
recording, images and the weights that JAX trains have to be equal to the byte. Weights that
TensorFlow trains may be off by 1e-7: its graph optimizer orders the terms of a gradient by the
names of operations, which moved too; with it switched off the bytes are equal. Elsewhere an
image may be off by 1/255, weights by 1e-4 of their norm and figures of training by 1e-2. Tokens,
files and texts are the same everywhere. Runs of `kdiffusion train` that the older commit began are
continued, see `golden/make_before_the_move.py`.

For bytes on another processor, record anew there, with an older checkout in PYTHONPATH:

    PYTHONPATH=OLDER_CHECKOUT python tests/acceptance/moves.py --record --data FOLDER
    PYTHONPATH=. python tests/acceptance/moves.py --data FOLDER

Needs TensorFlow and JAX, each of which runs in a child process, on one core: sums over several
cores may be taken in another order.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from moves_case import KINDS, collect, flat
from PIL import Image

from weights_conversion import open_safetensors

LIBRARIES = {"tensorflow": ("tensorflow",), "jax": ("jax", "jaxlib")}
BACKENDS = tuple(LIBRARIES)
PICTURES_BAR, WEIGHTS_BAR, FIGURES_BAR = 1, 1e-4, 1e-2
ORDER_OF_SUMS = {"tensorflow": 1e-7, "jax": 0.0}  # bars of weights and figures, see above
GOLDEN = Path(__file__).parents[1] / "golden" / "before_the_move"
ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "KDIFFUSION_COMPILE_CACHE": "off", "COLUMNS": "100"}
# They change how numbers are rounded.
NUMERICS = ("TF_ENABLE_ONEDNN_OPTS", "TF_XLA_FLAGS", "XLA_FLAGS")
PROCESSOR = ("vendor_id", "cpu family", "model", "stepping", "cache size")

GENERATE = """generate --preset {preset} --steps 4 --seed 42 --sampler dpmpp_2m --spacing karras
    --negative-prompt blurry --batch-size 2 --guidance-rescale 0.7 --output {preset}.png --quiet"""
# The child's folder holds two saved models.
COMMANDS = (
    "kdiffusion inspect random-tiny",
    "weights_conversion inspect random-tiny",
    "weights_conversion inspect random-tiny --json",
    "weights_conversion convert wide single.safetensors",
    "weights_conversion inspect single.safetensors",
    "weights_conversion inspect single.safetensors --json",
    "weights_conversion convert single.safetensors again --config wide --tokenizer wide/tokenizer",
    "weights_conversion inspect again",
    "weights_conversion convert random-tiny half --dtype float16 --max-shard-bytes 300000",
    "weights_conversion inspect half --json",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the data")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent, help="their folder")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        collect(arguments.child)
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    with tempfile.TemporaryDirectory() as folder:
        found = {backend: run_child(backend, Path(folder, backend)) for backend in BACKENDS}
        run_commands(Path(folder, BACKENDS[0]), found[BACKENDS[0]])
        train(Path(folder, BACKENDS[0]), found[BACKENDS[0]])
    if arguments.record:
        failures = [*record(arguments.data, found)]
    else:
        recorded = read(arguments.data)
        failures = [*check_texts(recorded, found)]
        for backend in BACKENDS:
            failures += check_numbers(backend, recorded[backend], found[backend])
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


def run_child(backend, folder):
    """Return the results of a backend: texts by name, arrays by kind and name, its versions."""
    folder.mkdir()
    command = [sys.executable, __file__, "--child", str(folder)]
    subprocess.run(command, env=environment(backend), check=True)
    found = json.loads((folder / "found.json").read_text("utf-8"))
    with np.load(folder / "found.npz") as arrays:
        found["arrays"] = dict(arrays)
    found["surroundings"] = surroundings(backend)
    return found


def environment(backend):
    """Return the variables of a child process, which may run in another folder."""
    variables = {key: value for key, value in os.environ.items() if key not in NUMERICS}
    places = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    variables["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, places))
    return variables | ENVIRONMENT | {"KERAS_BACKEND": backend}


def surroundings(backend):
    """Return the versions and processor features that rounding depends on."""
    libraries = ("keras", "numpy", *LIBRARIES[backend])
    versions = {name: version(name) for name in libraries}
    try:
        rows = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return versions
    known = dict(re.split(r"\s*:\s*", row, maxsplit=1) for row in rows)
    flags = [flag for flag in known.get("flags", "").split() if re.match("avx|amx|fma|f16c", flag)]
    processor = {name: known.get(name, "") for name in PROCESSOR}
    return versions | processor | {"flags": " ".join(sorted(flags))}


def run_commands(folder, found):
    """Run the command lines: keep their output, their files, and images with their texts."""
    for command in COMMANDS:
        found["texts"][f"$ {command}"] = run(command.split(), folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(("single.", "again/", "half/")):
            found["texts"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for preset, words in (("shapes", "a green ring on a red background"), ("random-tiny", "a lé")):
        options = GENERATE.format(preset=preset).split()
        printed = run(["kdiffusion", options[0], words, *options[1:]], folder)
        found["texts"][f"$ kdiffusion generate --preset {preset}"] = printed
        for name in printed.split():
            with Image.open(folder / name) as picture:
                found["arrays"][f"pictures|{name}"] = np.array(picture)
                texts = [f"{key}: {text}" for key, text in picture.text.items()]
            # A release may have another number.
            found["texts"][name] = re.sub(r"kdiffusion [\d.]+", "kdiffusion N", "\n".join(texts))


def train(folder, found):
    """Continue runs that an older commit began, and begin new ones."""
    for name in ("folders", "command_line"):
        with zipfile.ZipFile(GOLDEN / f"{name}.zip") as file:
            file.extractall(folder / name)
    folder = folder / "command_line"
    cache = {path: path.stat().st_mtime_ns for path in folder.glob("cache/*/*")}
    for kind in ("diffusion", "clip"):
        for options in (
            f"--output {kind} --resume --steps 6",
            f"--output new-{kind} --config {kind}/config.json --steps 1",
        ):
            command = f"kdiffusion train {kind} {options} --quiet"
            found["texts"][f"$ {command}"] = run(command.split(), folder)
    for model in sorted(folder.glob("*/model")):
        for path in sorted(model.rglob("*.safetensors")):
            tensors = open_safetensors(path)
            values = [np.ravel(tensors[name]) for name in sorted(tensors)]
            name = path.relative_to(folder).as_posix()
            found["arrays"][f"weights|{name}"] = np.concatenate(values).astype(np.float32)
    same = {path: path.stat().st_mtime_ns for path in folder.glob("cache/*/*")} == cache
    found["texts"]["the cache of latents"] = "recognised" if same else "written anew"


def run(command, folder):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment(BACKENDS[0]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"FAILED: {' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout.replace(str(folder.resolve()), "FOLDER")


def record(folder, found):
    """Write the results; texts are those of all backends."""
    texts, arrays, values = {}, {}, {}
    for backend, results in found.items():
        for name, text in results["texts"].items():
            if texts.setdefault(name, text) != text:
                yield f"{backend} has other texts than {BACKENDS[0]}: {name}"
        values[backend] = {key: results[key] for key in ("surroundings", "digests", "figures")}
        arrays |= {f"{backend}|{name}": array for name, array in results["arrays"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "moves.npz", **arrays)
    content = json.dumps({"texts": texts, **values}, indent=1, sort_keys=True)
    (folder / "moves.json").write_text(content + "\n", "utf-8")
    print(f"recorded {len(arrays)} arrays and {len(texts)} texts")


def read(folder):
    recorded = json.loads((folder / "moves.json").read_text("utf-8"))
    with np.load(folder / "moves.npz") as arrays:
        for backend in BACKENDS:
            own = {name: arrays[name] for name in arrays if name.startswith(f"{backend}|")}
            own = {name.partition("|")[2]: array for name, array in own.items()}
            recorded[backend]["arrays"] = own
    return recorded


def check_texts(recorded, found):
    """Compare tokens, digests of files, and printed or stored texts."""
    texts = recorded["texts"]
    for backend, results in found.items():
        own = results["texts"]
        equal = sum(own[name] == texts.get(name) for name in own)
        print(f"{backend}: {equal} of {len(own)} files, printed texts and rows of tokens equal")
        for name in sorted(own):
            if own[name] != texts.get(name):
                yield f"{backend}: {name!r} was {texts.get(name)!r:.400} and is {own[name]!r:.400}"
    for name in sorted(texts.keys() - found[BACKENDS[0]]["texts"].keys()):
        yield f"{name!r} is gone"


def check_numbers(backend, recorded, found):
    """Compare images and weights: to the byte where they were recorded, else within the bars."""
    other = {
        name
        for name in {**recorded["surroundings"], **found["surroundings"]}
        if recorded["surroundings"].get(name) != found["surroundings"].get(name)
    }
    if other:
        print(f"{backend}: recorded with another {', '.join(sorted(other))}; the bars count")
    if recorded["arrays"].keys() != found["arrays"].keys():
        names = sorted(recorded["arrays"].keys() ^ found["arrays"].keys())
        yield f"{backend}: not both then and now: {', '.join(names)}"
    sums = ORDER_OF_SUMS[backend]
    bars = {"pictures": PICTURES_BAR, "weights": WEIGHTS_BAR}
    if not other:
        bars = {"pictures": 0, "weights": sums}
    for kind, unit in (("pictures", "/255"), ("weights", "")):
        names = [name for name in recorded["arrays"] if name.startswith(f"{kind}|")]
        pairs = {
            name: (recorded["arrays"][name], found["arrays"][name])
            for name in names
            if name in found["arrays"]
        }
        apart = {name: KINDS[kind](*pair) for name, pair in pairs.items()}
        equal = sum(np.array_equal(*pair) for pair in pairs.values())
        largest = max(apart.values())
        print(
            f"{backend}: {equal} of {len(names)} {kind} equal, largest difference "
            f"{largest:.3g}{unit}, bar {bars[kind]}{unit}"
        )
        for name in pairs:
            if not apart[name] <= bars[kind]:
                yield f"{backend}: {name.replace('|', ' ')} are {apart[name]:.3g}{unit} apart"
    yield from check_values(backend, recorded, found, other)


def check_values(backend, recorded, found, other):
    """Compare digests of all weights, of which the arrays hold a part, and figures of training."""
    if not other:
        equal = sum(found["digests"].get(n) == text for n, text in recorded["digests"].items())
        print(f"{backend}: {equal} of {len(recorded['digests'])} digests of weights equal")
        for name, text in recorded["digests"].items():
            if found["digests"].get(name) != text and not ORDER_OF_SUMS[backend]:
                yield f"{backend}: weights of {name}, or their order or paths, are other ones"
    before, now = flat(recorded["figures"]), flat(found["figures"])
    if before.keys() != now.keys():
        yield f"{backend}: other figures: {sorted(before.keys() ^ now.keys())}"
        return
    apart = {name: abs(now[name] - value) / max(abs(value), 1e-3) for name, value in before.items()}
    bar = FIGURES_BAR if other else ORDER_OF_SUMS[backend]
    largest = max(apart.values())
    print(f"{backend}: {len(apart)} figures, largest relative difference {largest:.3g}, bar {bar}")
    for name, difference in apart.items():
        if not difference <= bar:
            yield f"{backend}: {name} was {before[name]} and is {now[name]}"


if __name__ == "__main__":
    main()
