"""The safetensors reader: what it reads exactly, and what it refuses, case by case."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from corpus.headers import F4, container, tensor
from safetensors.numpy import load_file, save_file

from weights_conversion import (
    CheckpointError,
    CheckpointLimit,
    CorruptCheckpoint,
    open_safetensors,
)
from weights_conversion.files.limits import Limits
from weights_conversion.files.safetensors_reader import DTYPES


@pytest.fixture
def opened(tmp_path):
    def write_and_open(content):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return open_safetensors(path)

    return write_and_open


# ── what it reads ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name, dtype", DTYPES.items())
def test_every_dtype_is_read_bit_for_bit(opened, name, dtype):
    data = np.random.default_rng(0).integers(0, 2, 6 * dtype.itemsize, np.uint8).tobytes()
    entry = {"dtype": name, "shape": [2, 3], "data_offsets": [0, len(data)]}
    checkpoint = opened(container({"x": entry}, data))
    assert checkpoint.info("x").dtype == dtype
    assert checkpoint["x"].dtype == dtype
    assert checkpoint["x"].shape == (2, 3)
    assert checkpoint["x"].tobytes() == data


def test_equals_the_library(tmp_path):
    generator = np.random.default_rng(1)
    arrays = {
        "a.weight": generator.standard_normal((3, 4, 5)).astype(np.float32),
        "b": generator.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "c": np.full((), 3.5, np.float16),
        "d": np.zeros((0, 4), np.float32),
        "e": np.arange(77),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    checkpoint = open_safetensors(path)
    assert set(checkpoint) == set(arrays)
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.path == path
    assert checkpoint.nbytes == sum(array.nbytes for array in arrays.values())
    for name, expected in load_file(path).items():
        assert checkpoint[name].dtype == expected.dtype
        np.testing.assert_array_equal(checkpoint[name], expected)


def test_each_read_is_a_fresh_writable_array(opened):
    checkpoint = opened(container({"x": F4}, b"\0\0\x80\x3f"))
    first = checkpoint["x"]
    first[0] = 5
    assert checkpoint["x"][0] == 1


@pytest.mark.parametrize(
    "content, shape",
    [
        (container({"x": F4}, bytes(4)), (1,)),
        (container(json.dumps({"x": F4}) + " " * 61, bytes(4)), (1,)),
        (container({"x": tensor(shape=[])}, bytes(4)), ()),
        (container({"x": tensor(shape=[0, 2**40], data_offsets=[0, 0])}), (0, 2**40)),
        (container({"\0\u202e../../etc/passwd": F4}, bytes(4)), (1,)),
        (container({"x": F4, "__metadata__": {}}, bytes(4)), (1,)),
        (
            container({"y": tensor(data_offsets=[4, 8]), "x": F4}, bytes(8)),
            (1,),
        ),  # not in order
    ],
)
def test_odd_but_valid(opened, content, shape):
    checkpoint = opened(content)
    for name in checkpoint:
        assert checkpoint[name].shape == shape


def test_no_tensors(opened):
    assert len(opened(container({}))) == 0


def test_unknown_name_is_a_key_error(opened):
    with pytest.raises(KeyError):
        opened(container({}))["x"]


# ── what it refuses ───────────────────────────────────────────────────────────────────────────

DEEP = '{"x":' * 200_000
TWICE = '{"x":%s,"x":%s}' % (json.dumps(F4), json.dumps(F4))

REFUSED = {
    "empty": (b"", CorruptCheckpoint, "0 bytes"),
    "seven bytes": (b"1234567", CorruptCheckpoint, "7 bytes"),
    "header of 2**64 - 1": (container("{}", length=2**64 - 1), CheckpointLimit, "18,446,744"),
    "header longer than file": (container("{}", length=1000), CorruptCheckpoint, "truncated or"),
    "header of 100 MB": (container("{}", length=100_000_001), CheckpointLimit, "100,000,001"),
    "not UTF-8": (container(b'{"\xff":1}'), CorruptCheckpoint, "utf-8"),
    "not JSON": (container('{"x":'), CorruptCheckpoint, "parsed"),
    "two values": (container("{} {}"), CorruptCheckpoint, "Extra data"),
    "deep JSON": (container(DEEP), CorruptCheckpoint, "recursion"),
    "a list": (container("[]"), CorruptCheckpoint, "start"),
    "a space first": (container(" {}"), CorruptCheckpoint, "start"),
    "NaN": (container('{"x":NaN}'), CorruptCheckpoint, "NaN"),
    "past the end": (
        container({"x": tensor(shape=[2], data_offsets=[0, 8])}, bytes(4)),
        CorruptCheckpoint,
        "Download it again",
    ),
    "half a download": (
        container({"x": tensor(shape=[1000], data_offsets=[0, 4000])}, bytes(1000)),
        CorruptCheckpoint,
        r"1,0\d\d of 4,0\d\d bytes",
    ),
    "negative offset": (
        container({"x": tensor(data_offsets=[-4, 0])}),
        CorruptCheckpoint,
        "-4' is negative",
    ),
    "minus zero": (
        container('{"x":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4)),
        CorruptCheckpoint,
        "-0' is negative",
    ),
    "begin behind end": (
        container({"x": tensor(data_offsets=[4, 0])}, bytes(4)),
        CorruptCheckpoint,
        "span -4",
    ),
    "overlap": (container({"x": F4, "y": F4}, bytes(4)), CorruptCheckpoint, "'y' overlaps"),
    "hole": (
        container({"x": F4, "y": tensor(data_offsets=[8, 12])}, bytes(12)),
        CorruptCheckpoint,
        "'y' follows a hole",
    ),
    "hole at the start": (
        container({"x": tensor(data_offsets=[4, 8])}, bytes(8)),
        CorruptCheckpoint,
        "'x' follows a hole",
    ),
    "shape is not span": (
        container({"x": tensor(shape=[2])}, bytes(4)),
        CorruptCheckpoint,
        "8 bytes, but its data_offsets span 4",
    ),
    "shape beyond 2**64": (
        container({"x": tensor(shape=[2**33, 2**33])}, bytes(4)),
        CorruptCheckpoint,
        "which no array can have",
    ),
    "huge shape with a zero": (
        container({"x": tensor(shape=[2**31, 2**31, 0], data_offsets=[0, 0])}),
        CorruptCheckpoint,
        "which no array can have",
    ),
    "rank 33": (container({"x": tensor(shape=[1] * 33)}, bytes(4)), CorruptCheckpoint, "no array"),
    "unknown dtype": (
        container({"x": tensor(dtype="F4")}, bytes(4)),
        CorruptCheckpoint,
        "'F4'; known are BOOL, U8",
    ),
    "dtype is a list": (
        container({"x": tensor(dtype=["F32"])}, bytes(4)),
        CorruptCheckpoint,
        "F32",
    ),
    "trailing bytes": (container({"x": F4}, bytes(7)), CorruptCheckpoint, "3 bytes behind"),
    "duplicate name": (container(TWICE, bytes(4)), CorruptCheckpoint, "'x' stands there twice"),
    "metadata not text": (
        container({"__metadata__": {"step": 3}}),
        CorruptCheckpoint,
        "__metadata__",
    ),
    "metadata is a list": (container({"__metadata__": []}), CorruptCheckpoint, "__metadata__"),
    "float size": (
        container({"x": tensor(shape=[1.0])}, bytes(4)),
        CorruptCheckpoint,
        "natural numbers",
    ),
    "true as size": (
        container({"x": tensor(shape=[True])}, bytes(4)),
        CorruptCheckpoint,
        "natural numbers",
    ),
    "three offsets": (
        container({"x": tensor(data_offsets=[0, 4, 4])}, bytes(4)),
        CorruptCheckpoint,
        "the second of two",
    ),
    "no shape": (
        container({"x": {"dtype": "F32", "data_offsets": [0, 4]}}),
        CorruptCheckpoint,
        "exactly",
    ),
    "entry is a number": (container({"x": 4}), CorruptCheckpoint, "exactly dtype"),
    "half a surrogate": (
        container('{"\\ud800":%s}' % json.dumps(F4), bytes(4)),
        CorruptCheckpoint,
        "not Unicode",
    ),
    "name of 1 MB": (
        container({"x" * 1_000_000: tensor(dtype="?")}, bytes(4)),
        CorruptCheckpoint,
        r"1000002 characters",
    ),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in", CorruptCheckpoint, "web page"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        CorruptCheckpoint,
        "git lfs pull",
    ),
    "zip": (b"PK\x03\x04" + bytes(100), CorruptCheckpoint, "PyTorch .ckpt"),
    "too many tensors": (
        container(
            {
                str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for i in range(Limits().tensors + 1)
            }
        ),
        CheckpointLimit,
        "50,001 tensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(opened, case):
    content, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        opened(content)
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_nothing_is_allocated_for_a_lie(opened):
    size = Limits().header_bytes * 100
    content = container({"x": tensor(shape=[size], data_offsets=[0, 4 * size])}, bytes(8))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpoint):
            opened(content)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_shrinks_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(1000, np.float32)}, path)
    checkpoint = open_safetensors(path)
    os.truncate(path, 2000)
    with pytest.raises(CorruptCheckpoint, match="changed"):
        checkpoint["x"]


def test_a_file_that_is_replaced_is_noticed(tmp_path):
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    save_file({"x": np.zeros(1000, np.float32)}, path)
    save_file({"x": np.ones(1000, np.float32)}, other)
    checkpoint = open_safetensors(path)
    os.replace(other, path)
    with pytest.raises(CorruptCheckpoint, match="changed"):
        checkpoint["x"]


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(CheckpointError, match="is not a file"):
            open_safetensors(path)
    for path in (tmp_path / "missing", tmp_path / "dangling", os.fsdecode(b"\xff.safetensors")):
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_safetensors(path)


def test_never_accepts_what_the_library_refuses(tmp_path):
    """Check mutants of small files; the acceptance test runs more of them."""
    from safetensors import SafetensorError, safe_open

    path = tmp_path / "model.safetensors"
    save_file({"x": np.ones((2, 3), np.float32), "y": np.zeros(5, np.float16)}, path)
    original = path.read_bytes()
    letters = b'0123456789-.,:[]{}"\\ xyF\x00\xff'
    generator = np.random.default_rng(0)
    accepted = 0
    for _ in range(1000):
        mutant = bytearray(original)
        for _ in range(generator.integers(1, 3)):
            mutant[generator.integers(8, len(mutant) - 34)] = generator.choice(list(letters))
        path.write_bytes(mutant)
        try:
            checkpoint = open_safetensors(path)
            for name in checkpoint:
                checkpoint[name]
        except CheckpointError:
            continue
        accepted += 1
        try:
            with safe_open(path, "np") as file:
                assert set(file.keys()) == set(checkpoint)
        except SafetensorError as error:
            raise AssertionError(f"accepted {bytes(mutant)!r}") from error
    assert accepted > 10
