"""Mutants of small sound files: `python tests/acceptance/fuzz.py [--count N] [--seed N]`.

For each parser, N mutants (default 200,000) are opened and read whole. Each must load or raise a
`CheckpointError`: nothing else, none in more than a second, or for more than 1 GB. A safetensors
mutant that loads must load in the safetensors library too. Exits with 1 if one fails, and prints
its bytes.
"""

import argparse
import collections
import io
import json
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
from corpus import safetensors_cases, torch_cases  # noqa: E402
from corpus.pickles import archive, dictionary, floats  # noqa: E402
from safetensors import SafetensorError, deserialize  # noqa: E402

from weights_conversion import CheckpointError, Limits, open_checkpoint  # noqa: E402
from weights_conversion.files.pickle_reader import load_pickle  # noqa: E402

COUNT = 200_000
MOST_SECONDS = 1.0
MOST_BYTES = 1_000_000_000
MOST_SEED_BYTES = 20_000
INTERESTING = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1]
INTERESTING += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [b"-1", b"0", b"1e9", b"4.0", b"true", b"null", b"[]", b"{}", b'"x"', b"9" * 30]
WORDS += [b"\\u0000", b'"x":', b"__metadata__", b",", b":", b" ", b"F16", b"F64", b"BOOL"]
WORDS += [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"]


def main():
    parser = argparse.ArgumentParser(description="Open mutants of small sound files.")
    parser.add_argument("--count", type=int, default=COUNT, help="of mutants for each parser")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES,) * 2)
    failed = 0
    with tempfile.TemporaryDirectory(dir=memory_disk()) as folder:
        for name, (seeds, check) in PARSERS.items():
            failed += fuzz(name, seeds, check, Path(folder), arguments)
    print(f"{failed} failures")
    return 1 if failed else 0


def memory_disk():
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def fuzz(name, seeds, check, folder, arguments):
    generator = random.Random(f"{name} {arguments.seed}")
    outcomes, failed, slowest = collections.Counter(), 0, 0.0
    began = time.perf_counter()
    for _ in range(arguments.count):
        content = mutant(generator, seeds)
        start = time.process_time()  # a busy machine is no slow parser
        try:
            outcome = check(content, folder / "model.ckpt")
        except Exception as error:  # whatever is no CheckpointError is what this looks for
            outcome = f"FAILED with {type(error).__name__}: {str(error)[:200]}"
        seconds = time.process_time() - start
        slowest = max(slowest, seconds)
        if seconds > MOST_SECONDS:
            outcome = f"FAILED: took {seconds:.1f} s"
        outcomes[outcome if not outcome.startswith("FAILED") else "FAILED"] += 1
        if outcome.startswith("FAILED"):
            failed += 1
            if failed <= 10:
                print(f"{name}: {outcome}\n  {content[:2000]!r}")
    told = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
    took = time.perf_counter() - began
    print(f"{name}: {arguments.count:,} in {took:.0f} s, slowest {slowest:.2f} s: {told}")
    sys.stdout.flush()
    return failed


# ── what is done with a mutant ──


def read_file(content, path):
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        for tensor in checkpoint:
            checkpoint[tensor]
    except CheckpointError as error:
        return type(error).__name__
    return "loaded"


def read_safetensors(content, path):
    outcome = read_file(content, path)
    if outcome == "loaded" and not content.startswith((b"PK", b"\x80")):
        try:
            deserialize(content)
        except SafetensorError as error:
            return f"FAILED: loaded what the library refuses: {error}"
        return "loaded as by the library"
    return outcome


def read_header(content, path):
    """The mutant is the header of a file whose length and data are sound."""
    head = len(content).to_bytes(8, "little")
    return read_safetensors(head + content + bytes(HEADERS[1]), path)


def read_repacked(content, path):
    """The mutant is the pickle in a sound archive."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a/data.pkl", content)
        file.writestr("a/data/0", np.arange(24, dtype=np.float32).tobytes())
    return read_file(packed.getvalue(), path)


def read_pickle(content, path):
    try:
        load_pickle(path, content, 0, Limits(opcodes=100_000))
    except CheckpointError as error:
        return type(error).__name__
    return "loaded"


# ── mutants ──


def mutant(generator, seeds):
    content = bytearray(generator.choice(seeds))
    for _ in range(generator.choice((1, 1, 1, 2, 3, 8))):
        generator.choice(CHANGES)(generator, content, seeds)
    return bytes(content)


def place(generator, content):
    return generator.randrange(len(content)) if content else 0


def flip_a_bit(generator, content, seeds):
    if content:
        content[place(generator, content)] ^= 1 << generator.randrange(8)


def set_a_byte(generator, content, seeds):
    if content:
        content[place(generator, content)] = generator.randrange(256)


def set_a_number(generator, content, seeds):
    form = generator.choice(("<B", "<H", "<I", "<Q", ">I"))
    number = generator.choice(INTERESTING) % 256 ** struct.calcsize(form)
    begin = place(generator, content)
    content[begin : begin + struct.calcsize(form)] = struct.pack(form, number)


def change_a_digit(generator, content, seeds):
    digits = [i for i, byte in enumerate(content[:4000]) if 48 <= byte <= 57]
    if digits:
        content[generator.choice(digits)] = generator.randrange(48, 58)


def insert_a_word(generator, content, seeds):
    begin = place(generator, content)
    end = begin + generator.choice((0, 0, 1, 2, 4))
    content[begin:end] = generator.choice(WORDS)


def remove_some(generator, content, seeds):
    begin = place(generator, content)
    del content[begin : begin + generator.choice((1, 1, 2, 4, 8, 40))]


def repeat_some(generator, content, seeds):
    begin = place(generator, content)
    part = content[begin : begin + generator.randrange(1, 64)]
    content[begin:begin] = part * generator.choice((1, 1, 2, 50))


def cut(generator, content, seeds):
    del content[place(generator, content) :]


def append(generator, content, seeds):
    content += generator.randbytes(generator.randrange(1, 30))


def splice(generator, content, seeds):
    other = generator.choice(seeds)
    content[place(generator, content) :] = other[place(generator, other) :]


CHANGES = [flip_a_bit, flip_a_bit, set_a_byte, set_a_byte, set_a_number, set_a_number]
CHANGES += [change_a_digit, insert_a_word, insert_a_word, remove_some, repeat_some, splice]
CHANGES += [cut, append]


# ── seeds ──


def sound(cases):
    contents = [case.content for case in cases if case.error is None]
    return [c for c in contents if isinstance(c, bytes) and len(c) <= MOST_SEED_BYTES]


def header_seeds():
    """Headers of files with the same number of bytes of data, and that number."""
    kinds = {"F32": 4, "I64": 8, "BF16": 2, "U8": 1, "F8_E4M3": 1}
    seeds = []
    for width in (1, 2, 3):
        entries, begin = {"__metadata__": {"format": "pt"}}, 0
        for dtype, size in kinds.items():
            end = begin + 12 * size
            shape = [12 // width, width]
            entries[dtype] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            begin = end
        seeds.append(json.dumps(entries, separators=(",", ":")).encode())
    return seeds, begin


def pickle_seeds():
    value = {
        "state_dict": collections.OrderedDict(a=[1, 2.5, None, True, "ü"], b=(1, (2, 3), "x")),
        "epoch": 2**70,
        3: {"nested": [{}, [], (), b"bytes"]},
    }
    seeds = [pickle.dumps(value, protocol) for protocol in range(6)]
    tensors = dictionary(x=floats("0", (2, 3)), y=floats("0", (24,)))
    for content in (archive(tensors), *sound(torch_cases.CASES)):
        if content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as file:
                name = next(name for name in file.namelist() if name.endswith("data.pkl"))
                seeds.append(file.read(name))
    return seeds


def seeds_starting(start):
    return [content for content in sound(torch_cases.CASES) if content.startswith(start)]


HEADERS = header_seeds()
PARSERS = {
    "safetensors": (sound(safetensors_cases.CASES), read_safetensors),
    "safetensors headers": (HEADERS[0], read_header),
    "zip archives": (seeds_starting(b"PK"), read_file),
    "legacy files": (seeds_starting(b"\x80"), read_file),
    "pickles in archives": (pickle_seeds(), read_repacked),
    "pickles": (pickle_seeds(), read_pickle),
}


if __name__ == "__main__":
    sys.exit(main())
