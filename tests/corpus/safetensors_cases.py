"""Threats 1 to 34: safetensors files and the shards of folders."""

import json
import os
import struct

import ml_dtypes
import numpy as np
from corpus.case import Case, read_all
from corpus.headers import F4, container, tensor
from corpus.models import tensors
from safetensors.numpy import save, save_file

from weights_conversion import (
    CheckpointLimit,
    CheckpointMismatch,
    CorruptCheckpoint,
    DiffusersFolder,
    NonFiniteWeights,
    UnsafeCheckpoint,
    open_checkpoint,
    open_single_file,
)

BYTES = bytes(4)
EIGHT = tensor(shape=[2], data_offsets=[0, 8])
NAMES = ("../../etc/passwd", "a\0b", "a\u202eb", "x" * 1_000_000)


def one(entry, data=BYTES):
    return container({"x": entry}, data)


def two(first, second, data):
    return container({"a": first, "b": second}, data)


def model_with(value):
    found = tensors("sd1")
    found["model.diffusion_model.out.2.bias"][0] = value
    return save(found)


def model_of(dtype):
    found = tensors("sd1")
    name = "model.diffusion_model.out.2.bias"
    found[name] = found[name].astype(dtype)
    return save(found)


def read_diffusion_model(path):
    return dict(open_single_file(path).arrays("diffusion_model"))


def read_while(change):
    def use(path):
        checkpoint = open_checkpoint(path)
        change(path)
        return {name: checkpoint[name] for name in checkpoint}

    return use


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def replace(path):
    beside = path.with_name("other")
    beside.write_bytes(path.read_bytes())
    beside.replace(path)


CASES = [
    Case(1, "empty file", b"", CorruptCheckpoint),
    Case(2, "7 bytes", b"\x08\0\0\0\0\0\0", CorruptCheckpoint),
    Case(3, "header of 2^64 - 1 bytes", b"\xff" * 8 + b"{}", CheckpointLimit),
    Case(4, "header longer than the file", container("{}", length=5000), CorruptCheckpoint),
    Case(5, "header of 100 MB", struct.pack("<Q", 100_000_001) + b"{}", CheckpointLimit),
    Case(6, "header not UTF-8", container(b'{"\xff": 1}'), CorruptCheckpoint),
    Case(7, "header not JSON", container('{"x": }'), CorruptCheckpoint),
    Case(8, "JSON 200,000 deep", container('{"x":' + "[" * 200_000), CorruptCheckpoint),
    Case(9, "header a list", container("[1, 2]"), CorruptCheckpoint),
    Case(10, "offsets past the end", one(EIGHT), CorruptCheckpoint, "truncated"),
    Case(11, "negative offset", one(tensor(data_offsets=[-4, 0])), CorruptCheckpoint),
    Case(12, "begin behind end", one(tensor(data_offsets=[4, 0])), CorruptCheckpoint),
    Case(13, "overlap", two(EIGHT, EIGHT, bytes(8)), CorruptCheckpoint, "overlaps"),
    Case(14, "hole", two(F4, tensor(data_offsets=[8, 12]), bytes(12)), CorruptCheckpoint, "hole"),
    Case(15, "shape and bytes disagree", one(tensor(shape=[3])), CorruptCheckpoint, "span"),
    Case(16, "shape over 2^64", one(tensor(shape=[2**33, 2**33])), CorruptCheckpoint),
    Case(17, "unknown dtype", one(tensor(dtype="F12")), CorruptCheckpoint, "known are BOOL"),
    Case(18, "trailing bytes", one(F4, bytes(9)), CorruptCheckpoint, "repair"),
    Case(19, "half a download", save(tensors("sd1"))[:100_000], CorruptCheckpoint, "ownload"),
    Case(
        20,
        "a key twice",
        container('{"x":%s,"x":%s}' % ((json.dumps(F4),) * 2), BYTES),
        CorruptCheckpoint,
        "twice",
    ),
    Case(21, "metadata not text", container({"__metadata__": {"a": 1}}), CorruptCheckpoint),
    Case(
        22,
        "shape [0, 2^40]",
        one(tensor(shape=[0, 2**40], data_offsets=[0, 0]), b""),
        expected={"x": np.empty((0, 2**40), np.float32)},
    ),
    Case(23, "NaN", model_with(np.nan), NonFiniteWeights, "out.2.bias", use=read_diffusion_model),
    Case(23, "infinity", model_with(-np.inf), NonFiniteWeights, use=read_diffusion_model),
    Case(
        24,
        "100,000 empty tensors",
        container({str(n): tensor(shape=[0], data_offsets=[0, 0]) for n in range(100_000)}),
        CheckpointLimit,
    ),
    Case(25, "a size of 4.0", one(tensor(shape=[1.0])), CorruptCheckpoint),
    Case(25, "a size of true", one(tensor(shape=[True])), CorruptCheckpoint),
    Case(26, "spaces before the header", container("  {}"), CorruptCheckpoint),
    *(
        Case(
            27,
            f"name {ascii(name[:20])}",
            container({name: F4}, BYTES),
            expected={name: np.zeros(1, np.float32)},
        )
        for name in NAMES
    ),
    Case(
        27,
        "a bad entry's name in the message",
        container({"\x1b[2J\u202e": {}}),
        CorruptCheckpoint,
        "u202e",
    ),
    Case(28, "web page", b"<!DOCTYPE html><html><body>Sign in", CorruptCheckpoint, "web page"),
    Case(28, "web page after blanks", b"\n\n  <html>", CorruptCheckpoint, "web page"),
    Case(
        29,
        "Git LFS pointer",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        CorruptCheckpoint,
        "git lfs pull",
    ),
    Case(
        30,
        "shape [2^31, 2^31, 0]",
        one(tensor(shape=[2**31, 2**31, 0], data_offsets=[0, 0]), b""),
        CorruptCheckpoint,
    ),
    Case(
        31,
        "truncated while it is read",
        save({"x": np.zeros(999, np.float32)}),
        CorruptCheckpoint,
        "changed",
        use=read_while(truncate),
    ),
    Case(
        31,
        "replaced while it is read",
        save({"x": np.zeros(999, np.float32)}),
        CorruptCheckpoint,
        "changed",
        use=read_while(replace),
    ),
    Case(
        32, "bfloat16 in a weight's place", model_of(ml_dtypes.bfloat16), use=read_diffusion_model
    ),
    Case(32, "float64 in a weight's place", model_of(np.float64), use=read_diffusion_model),
    Case(
        32,
        "float8 in a weight's place",
        one(tensor(dtype="F8_E4M3", shape=[4]), b"\x38\xb8\x00\x7e"),
        expected={"x": np.array([1, -1, 0, 448], ml_dtypes.float8_e4m3fn)},
    ),
    Case(
        32,
        "int64 in a weight's place",
        model_of(np.int64),
        CheckpointMismatch,
        "float dtype",
        use=read_diffusion_model,
    ),
]


def read_unet(path):
    checkpoint = DiffusersFolder(path).weights("unet")
    return {name: checkpoint[name] for name in checkpoint}


def shards(weight_map, files=("a.safetensors",), link=None):
    """A folder whose index has this map; each file holds the tensor of its first letter."""

    def make(folder):
        unet = folder / "unet"
        unet.mkdir()
        for file in files:
            save_file({file[0]: np.zeros(2, np.float32)}, unet / file)
        save_file({"o": np.zeros(2, np.float32)}, folder / "outside.safetensors")
        if link is not None:
            (unet / link).symlink_to(folder.parent / "elsewhere.safetensors")
            save_file({"l": np.zeros(2, np.float32)}, folder.parent / "elsewhere.safetensors")
        index = unet / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return make


A = "a.safetensors"
CASES += [
    Case(33, f"index names {name}", shards({"o": name}), UnsafeCheckpoint, use=read_unet)
    for name in ("../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "C:\\x")
] + [
    Case(
        33,
        "a shard is a link out of the folder",
        shards({"l": "l.st"}, link="l.st"),
        UnsafeCheckpoint,
        use=read_unet,
    ),
    Case(
        34,
        "missing shard",
        shards({"a": A, "b": "b.safetensors"}),
        CorruptCheckpoint,
        "missing",
        use=read_unet,
    ),
    Case(
        34,
        "a key that its shard has not",
        shards({"a": A, "b": A}),
        CorruptCheckpoint,
        "do not agree",
        use=read_unet,
    ),
    Case(
        34,
        "a key in two shards",
        shards({"a": "b.safetensors"}, (A, "b.safetensors")),
        CorruptCheckpoint,
        "do not agree",
        use=read_unet,
    ),
    Case(
        34,
        "10^6 entries",
        shards({f"{n}": A for n in range(10**6)}),
        CheckpointLimit,
        use=read_unet,
    ),
]

VALID_ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2], np.float16),
    "scalar": np.array(7, np.int64),
    "flags": np.array([True, False]),
}
CASES += [
    Case("valid", "safetensors named .ckpt", save(VALID_ARRAYS), expected=VALID_ARRAYS),
    Case(
        "valid",
        "spaces behind the header",
        container(json.dumps({"x": F4}) + " " * 50, BYTES),
        expected={"x": np.zeros(1, np.float32)},
    ),
    Case(
        "valid",
        "tensors in another order than their bytes",
        two(tensor(data_offsets=[4, 8]), F4, struct.pack("<2f", 1, 2)),
        expected={"a": np.float32([2]), "b": np.float32([1])},
    ),
    Case("valid", "no tensor at all", container("{}"), expected={}),
    Case(
        "valid",
        "bytes that are not aligned",
        two(
            tensor(dtype="U8", data_offsets=[0, 1]),
            tensor(data_offsets=[1, 5]),
            b"\x07" + struct.pack("<f", 3),
        ),
        expected={"a": np.uint8([7]), "b": np.float32([3])},
    ),
    Case(
        "valid",
        "a header of 640 bytes, which starts like a pickle",
        container(json.dumps({"x": F4}).ljust(640), BYTES),
        expected={"x": np.zeros(1, np.float32)},
        use=read_all,
    ),
]
