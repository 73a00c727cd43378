"""The reader of PyTorch's files: what it reads exactly, and what it refuses, without PyTorch.

The files are written opcode by opcode, so that the tests need no PyTorch; files that PyTorch wrote
are read in tests/parity.
"""

import io
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from corpus.pickles import archive, dictionary, floats, legacy, name, number, storage, tensor, text

from weights_conversion import (
    CheckpointError,
    CheckpointLimit,
    CorruptCheckpoint,
    UnsafeCheckpoint,
    open_checkpoint,
    open_torch,
)
from weights_conversion.files.limits import Limits
from weights_conversion.files.pickle_reader import load_pickle
from weights_conversion.files.pickle_values import Global, Placeholder


@pytest.fixture
def opened(tmp_path):
    def write_and_open(content, **settings):
        path = tmp_path / "model.ckpt"
        path.write_bytes(content)
        return open_checkpoint(path, **settings)

    return write_and_open


def loaded(pickled):
    return load_pickle("file", b"\x80\x02" + pickled + b".", 0, Limits())[0]


# ── what it reads ─────────────────────────────────────────────────────────────────────────────

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(opened, method):
    checkpoint = opened(archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY}, method=method))
    assert checkpoint.info("x").shape == (2, 3)
    np.testing.assert_array_equal(checkpoint["x"], ARRAY, strict=True)


def test_legacy(opened):
    content = legacy(
        dictionary(x=floats("a", (2, 3)), y=floats("b", (3,))), [("b", ARRAY[1]), ("a", ARRAY)]
    )
    checkpoint = opened(content)
    np.testing.assert_array_equal(checkpoint["x"], ARRAY, strict=True)
    np.testing.assert_array_equal(checkpoint["y"], ARRAY[1], strict=True)


@pytest.mark.parametrize("key, size", [("FloatStorage", 4), ("HalfStorage", 2), ("LongStorage", 8)])
def test_big_endian(opened, key, size):
    data = bytes(range(2 * size))
    content = archive(dictionary(x=tensor(storage("0", key, 2), (2,), (1,))), {"0": data})
    little = opened(content)["x"]
    content = archive(
        dictionary(x=tensor(storage("0", key, 2), (2,), (1,))), {"0": data}, byteorder=b"big"
    )
    assert opened(content)["x"].tobytes() == little.byteswap().tobytes()


def test_big_endian_complex_numbers(opened):
    array = np.array([1 + 2j, 3 - 4j], np.complex64)
    pickled = dictionary(x=tensor(storage("0", "ComplexFloatStorage", 2), (2,), (1,)))
    content = archive(pickled, {"0": array.byteswap().tobytes()}, byteorder=b"big")
    np.testing.assert_array_equal(opened(content)["x"], array, strict=True)


def test_legacy_views_of_storages(opened):
    view = b"(" + text("view") + number(2) + number(3) + b"tt"
    source = storage("a", "FloatStorage", 6).removesuffix(b"tQ") + view + b"Q"
    content = legacy(dictionary(x=tensor(source, (3,), (1,))), [("a", ARRAY)])
    np.testing.assert_array_equal(opened(content)["x"], ARRAY.reshape(-1)[2:5])


def test_bfloat16_is_bit_exact(opened):
    array = np.array([1.5, -2, 3e38], ml_dtypes.bfloat16)
    pickled = dictionary(x=tensor(storage("0", "BFloat16Storage", 3), (3,), (1,)))
    found = opened(archive(pickled, {"0": array.tobytes()}))["x"]
    assert found.dtype == ml_dtypes.bfloat16
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_shared_and_strided_storages(opened, method):
    source = storage("0", "FloatStorage", 12)
    views = {
        "whole": tensor(source, (3, 4), (4, 1)),
        "turned": tensor(source, (4, 3), (1, 4)),
        "part": tensor(source, (2, 2), (4, 2), offset=5),
        "row": tensor(source, (4,), (1,), offset=8),
        "repeated": tensor(source, (3, 2), (0, 1)),
        "any stride": tensor(source, (1, 4), (2**61, 1), offset=8),
        "scalar": tensor(source, (), (), offset=7),
        "empty": tensor(source, (0, 5), (5, 1)),
    }
    array = np.arange(12, dtype=np.float32)
    checkpoint = opened(archive(dictionary(**views), {"0": array}, method=method))
    grid = array.reshape(3, 4)
    expected = {
        "whole": grid,
        "turned": grid.T,
        "part": grid[1:, 1::2],
        "row": grid[2],
        "any stride": grid[2:],
        "repeated": np.tile(array[:2], (3, 1)),
        "scalar": np.float32(7).reshape(()),
        "empty": np.empty((0, 5), np.float32),
    }
    for key, value in expected.items():
        np.testing.assert_array_equal(checkpoint[key], value, strict=True)
        assert checkpoint[key].flags.c_contiguous


def test_reads_only_what_is_asked_for(tmp_path):
    # The optimizer's storage is not even there.
    states = b"](" + dictionary(exp_avg=floats("missing", (2, 3))) + b"e"
    pickled = dictionary(
        state_dict=dictionary(x=floats("0", (2, 3))),
        optimizer_states=states,
        global_step=number(875000),
    )
    path = tmp_path / "model.ckpt"
    path.write_bytes(archive(pickled, {"0": ARRAY}))
    checkpoint = open_torch(path)
    assert list(checkpoint) == ["x"]
    assert checkpoint.metadata == {"global_step": "875000"}


def test_lightning_leftovers_become_placeholders():
    callback = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    value = loaded(b"}" + callback + b"}" + text("best") + number(1) + b"ss")
    assert value == {
        Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): {"best": 1}
    }
    made = loaded(callback + b")\x81" + dictionary(monitor=text("val")) + b"b")
    assert isinstance(made, Placeholder)
    assert made.state == {"monitor": "val"}
    path = loaded(name("pathlib", "PosixPath") + b"(" + text("/etc/passwd") + b"tR")
    assert path.arguments == ("/etc/passwd",)


def test_names_that_are_only_mentioned_load():
    assert loaded(name("os", "system")) == Global("os", "system")
    with pytest.raises(UnsafeCheckpoint, match="reaches for"):
        loaded(name("torch", "serialization.os.system"))


def test_plain_containers_of_all_protocols():
    import collections
    import pickle

    value = {
        "list": [1, -2, 2**70, 2.5, True, None, "ü\n'"],
        "tuple": (1, (2, (3, (4,)))),
        "bytes": b"\x00\xff",
        "ordered": collections.OrderedDict(a=1),
        3: {"nested": {}},
    }
    for protocol in range(6):
        content = pickle.dumps({**value, "bytes": b"ab"} if protocol < 3 else value, protocol)
        found = load_pickle("file", content, 0, Limits())[0]
        expected = {**value, "bytes": found["bytes"]} if protocol < 3 else value
        assert found == expected
    assert load_pickle("file", pickle.dumps({1, 2}, 4), 0, Limits())[0] == [1, 2]


def test_strings_of_python_2():
    content = rb"S'a\'\\\x41\n'" + b"\nU\x02\xe9bT\x01\x00\x00\x00c\x87."
    assert load_pickle("file", content, 0, Limits())[0] == ("a'\\A\n", "éb", "c")


def test_a_member_nobody_needs_is_noted(opened):
    content = io.BytesIO(archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY}))
    with zipfile.ZipFile(content, "a") as file:
        file.writestr("archive/evil.py", "import os")
    checkpoint = opened(content.getvalue())
    assert checkpoint.notes == ("ignored the archive's member 'archive/evil.py'",)


def test_the_content_decides_not_the_name(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY}))
    np.testing.assert_array_equal(open_checkpoint(path)["x"], ARRAY)


def test_a_safetensors_header_that_starts_like_a_pickle(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(640)
    path = tmp_path / "model"
    path.write_bytes(struct.pack("<Q", 640) + header + struct.pack("<f", 2))
    assert open_checkpoint(path)["x"] == [2]


def test_the_record_of_large_archives(opened):
    content = archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY})
    np.testing.assert_array_equal(opened(with_large_record(content, 2))["x"], ARRAY)
    with pytest.raises(UnsafeCheckpoint, match="two directories"):
        opened(with_large_record(content, 1))


def with_large_record(content, count):
    """Add the second end record that PyTorch writes, with this number of members."""
    end = content.rindex(b"PK\x05\x06")
    length, begin = struct.unpack_from("<2L", content, end + 12)
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, begin)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    return content[:end] + record + locator + content[end:]


def test_a_crc_of_zero_is_none(opened):
    content = bytearray(archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY}))
    assert replaced_crc(content, ARRAY, 0) == 2
    np.testing.assert_array_equal(opened(bytes(content))["x"], ARRAY)


def replaced_crc(content, array, crc):
    """Change an array's CRC in both headers and return how often."""
    old, new = struct.pack("<L", zlib.crc32(array)), struct.pack("<L", crc)
    count, place = 0, -1
    while (place := content.find(old, place + 1)) >= 0:
        content[place : place + 4] = new
        count += 1
    return count


# ── what it refuses ───────────────────────────────────────────────────────────────────────────

CALL = b"(" + text("echo") + b"t"
EXECUTES = {
    "REDUCE": name("os", "system") + CALL + b"R",
    "STACK_GLOBAL": text("posix") + text("system") + b"\x93" + CALL + b"R",
    "INST": b"(" + text("echo") + b"iposix\nsystem\n",
    "OBJ": b"(" + name("posix", "system") + text("echo") + b"o",
    "NEWOBJ": name("posix", "system") + CALL + b"\x81",
    "NEWOBJ_EX": name("posix", "system") + CALL + b"}\x92",
    "dotted": text("torch") + text("serialization.os.system") + b"\x93" + CALL + b"R",
    "getattr": name("builtins", "getattr") + b"(" + name("os", "x") + text("system") + b"tR",
    "eval": name("builtins", "eval") + CALL + b"R",
    "load from bytes": name("torch.storage", "_load_from_bytes") + b"(C\x01xtR",
    "EXT1": b"\x82\x01",
    "BUILD of a name": name("os", "x") + dictionary(a=b"N") + b"b",
    "__setstate__": name("argparse", "Namespace")
    + b")\x81"
    + dictionary(__setstate__=name("os", "system"))
    + b"b",
    "PERSID": b"Psomething\n",
    "out-of-band buffer": b"\x97",
}


@pytest.mark.parametrize("pickled", EXECUTES.values(), ids=EXECUTES)
@pytest.mark.parametrize("container", [archive, legacy])
def test_calls_nothing(opened, container, pickled):
    with pytest.raises(UnsafeCheckpoint, match="at byte .* Nothing was run"):
        opened(container(dictionary(x=pickled)))


def test_a_refused_call_is_named_with_its_place(opened):
    with pytest.raises(UnsafeCheckpoint, match=r"at byte 2\d its pickle calls 'posix.system'"):
        opened(archive(name("posix", "system") + CALL + b"R"))


BROKEN = {
    "truncated": text("abc")[:-1],
    "empty stack": b"0",
    "no mark": b"t",
    "no value": b"",
    "unknown opcode": b"\xff",
    "memo": b"h\x07",
    "huge text": b"\x8d" + struct.pack("<Q", 2**62),
    "huge bytes": b"\x8e" + struct.pack("<Q", 2**62),
    "huge integer": b"\x8b" + struct.pack("<i", 2**30),
    "negative length": b"T" + struct.pack("<i", -1),
    "long integer": b"\x8b" + struct.pack("<i", 300) + b"1" * 300,
    "item of a list": b"]" + text("a") + text("b") + b"s",
    "append to a dictionary": b"}" + text("a") + b"a",
    "item without value": b"}(" + text("a") + b"u",
    "a list as key": b"}]" + text("b") + b"s",
    "protocol 9": b"\x80\x09",
    "wrong number": b"Ixyz\n",
    "wrong float": b"Fxyz\n",
    "wrong text": b"Sxyz\n",
    "wrong escape": b"S'\\q'\n",
    "no UTF-8": b"X\x01\x00\x00\x00\xff",
    "persistent id": text("id") + b"Q",
    "tensor without storage": tensor(text("x"), (1,), (1,)),
    "unknown storage": storage("0", "OddStorage", 3),
    "negative numel": storage("0", "FloatStorage", -1),
    "shape larger than storage": tensor(storage("0", "FloatStorage", 3), (4,), (1,)),
    "offset past the end": tensor(storage("0", "FloatStorage", 3), (1,), (1,), 3),
    "offset over 64 bits": tensor(storage("0", "FloatStorage", 3), (1,), (1,), 2**65),
    "negative stride": tensor(storage("0", "FloatStorage", 3), (3,), (-1,)),
    "a dictionary of two": name("collections", "OrderedDict") + b"(]]tR",
    "a list of a number": name("builtins", "list") + b"(K\x01tR",
    "stride missing": tensor(storage("0", "FloatStorage", 3), (3, 1), (1,)),
    "shape over 64 bits": tensor(storage("0", "FloatStorage", 3), (2**40, 2**40, 0), (0, 0, 0)),
    "rank 40": tensor(storage("0", "FloatStorage", 3), (1,) * 40, (1,) * 40),
}


@pytest.mark.parametrize("pickled", BROKEN.values(), ids=BROKEN)
def test_broken_pickles(opened, pickled):
    with pytest.raises(CorruptCheckpoint, match="Download"):
        opened(archive(pickled))


def nested_tuples(depth):
    return b")" + b"\x85" * depth


LIMITS = {
    "ten million lists": b"]" * 1_100_000,
    "memo index": b"]r\xff\xff\xff\xff",
    "nesting": nested_tuples(200_000),
    "copies": b"}"
    + b"("
    + b"".join(number(n) + b"N" for n in range(3000))
    + b"uq\x00(("
    + (b"1(" + name("collections", "OrderedDict") + b"h\x00\x85R") * 1000
    + b"l",
}


@pytest.mark.parametrize("pickled", LIMITS.values(), ids=LIMITS)
def test_budgets(opened, pickled):
    with pytest.raises(CheckpointLimit):
        opened(archive(pickled))


def test_billion_laughs_load_in_no_time(opened):
    laughs = text("ha") + b"q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60))
    found = opened(archive(dictionary(x=floats("0", (2, 3)), joke=laughs), {"0": ARRAY}))
    assert list(found) == ["x"]


def test_a_key_of_nested_tuples_is_never_hashed():
    assert len(loaded(b"}" + nested_tuples(900) + b"Ns")) == 1


def damaged(change, **members):
    content = bytearray(archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY}, **members))
    return bytes(change(content) or content)


def flip(content, place, value):
    content[place] ^= value


def both_headers(place_local, place_central, value):
    def change(content):
        for magic, place in ((b"PK\x03\x04", place_local), (b"PK\x01\x02", place_central)):
            flip(content, content.index(magic) + place, value)

    return change


ARCHIVES = {
    "encrypted": (both_headers(6, 8, 1), CorruptCheckpoint, "encrypted"),
    "no end": (lambda c: c[:-30], CorruptCheckpoint, "without its end"),
    "prepended": (lambda c: c + c, UnsafeCheckpoint, "other data"),
    "trailing bytes": (lambda c: c + b"x", CorruptCheckpoint, "without its end"),
    "local name": (lambda c: flip(c, 30, 1), UnsafeCheckpoint, "calls a member"),
    "method": (both_headers(8, 10, 12), CorruptCheckpoint, "compression method"),
    "directory": (
        lambda c: flip(c, c.index(b"PK\x01\x02"), 1),
        CorruptCheckpoint,
        "directory is truncated",
    ),
}


@pytest.mark.parametrize("change, error, message", ARCHIVES.values(), ids=ARCHIVES)
def test_damaged_archives(opened, change, error, message):
    with pytest.raises(error, match=message):
        opened(damaged(change))


MEMBERS = {
    "zip slip": ("../../evil", UnsafeCheckpoint, "unpacked elsewhere"),
    "absolute": ("/etc/passwd", UnsafeCheckpoint, "unpacked elsewhere"),
    "second pickle": ("other/data.pkl", UnsafeCheckpoint, "2 pickles"),
    "TorchScript": ("archive/constants.pkl", UnsafeCheckpoint, "unsupported container"),
}


@pytest.mark.parametrize("member, error, message", MEMBERS.values(), ids=MEMBERS)
def test_members_that_should_not_be_there(opened, member, error, message):
    content = io.BytesIO(archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY}))
    with zipfile.ZipFile(content, "a") as file:
        file.writestr(member, b"")
    with pytest.raises(error, match=message):
        opened(content.getvalue())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(opened):
    content = io.BytesIO(archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY}))
    with zipfile.ZipFile(content, "a") as file:
        file.writestr("archive/data/0", b"")
    with pytest.raises(UnsafeCheckpoint, match="two members"):
        opened(content.getvalue())


def test_a_flipped_byte_is_seen_while_copying(opened):
    content = bytearray(archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY}))
    flip(content, content.index(ARRAY.tobytes()) + 5, 1)
    checkpoint = opened(bytes(content))
    with pytest.raises(CorruptCheckpoint, match="CRC"):
        checkpoint["x"]


def test_a_flipped_byte_outside_the_view_is_seen_too(opened):
    row = tensor(storage("0", "FloatStorage", 6), (3,), (1,))
    content = bytearray(archive(dictionary(x=row), {"0": ARRAY}))
    flip(content, content.index(ARRAY.tobytes()) + 20, 1)
    with pytest.raises(CorruptCheckpoint, match="CRC"):
        opened(bytes(content))["x"]


STORAGES = {
    "missing": ({}, CorruptCheckpoint, "no member for storage '0'"),
    "short": ({"0": ARRAY[0]}, CorruptCheckpoint, "should have 24 bytes and has 12"),
}


@pytest.mark.parametrize("storages, error, message", STORAGES.values(), ids=STORAGES)
def test_storages(opened, storages, error, message):
    with pytest.raises(error, match=message):
        opened(archive(dictionary(x=floats("0", (2, 3))), storages))


def test_a_view_that_repeats_too_much(opened):
    bomb = tensor(storage("0", "FloatStorage", 8), (2**16, 2**16), (0, 0))
    with pytest.raises(CheckpointLimit, match="repeats its storage"):
        opened(archive(dictionary(x=bomb), {"0": np.zeros(8, np.float32)}))


def test_a_deflated_bomb(opened):
    size = 1 << 26
    bomb = tensor(storage("0", "ByteStorage", size), (size,), (1,))
    content = archive(dictionary(x=bomb), {"0": bytes(size)}, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointLimit, match="without compression"):
        opened(content)


def test_legacy_storages_must_agree(opened):
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        opened(legacy(dictionary(x=floats("a", (2, 3))), [("a", ARRAY)])[:-1])
    with pytest.raises(CorruptCheckpoint, match="is not the one"):
        opened(legacy(dictionary(x=floats("a", (2, 3))), [("a", ARRAY[0])]))
    with pytest.raises(CorruptCheckpoint, match="no storage 'a'"):
        opened(legacy(dictionary(x=floats("a", (2, 3)))))


CONTAINERS = {
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(300), UnsafeCheckpoint),
    "gzip": (b"\x1f\x8b" + bytes(300), UnsafeCheckpoint),
    "tar": (b"sys_info" + bytes(249) + b"ustar" + bytes(300), UnsafeCheckpoint),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(300), CorruptCheckpoint),
    "plain pickle": (b"\x80\x04]\x94.", CorruptCheckpoint),
    "web page": (b"\n<!DOCTYPE html><html>", CorruptCheckpoint),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", CorruptCheckpoint),
    "empty zip": (b"PK\x05\x06" + bytes(18), CheckpointError),
}


@pytest.mark.parametrize("content, error", CONTAINERS.values(), ids=CONTAINERS)
def test_other_files(opened, content, error):
    with pytest.raises(error, match="model.ckpt"):
        opened(content)


def test_limits_are_arguments(opened):
    content = archive(
        dictionary(x=floats("0", (2, 3)), y=floats("1", (2, 3))), {"0": ARRAY, "1": ARRAY}
    )
    assert len(opened(content)) == 2
    for limits in (
        Limits(tensors=1),
        Limits(opcodes=10),
        Limits(pickle_bytes=10),
        Limits(members=2),
    ):
        with pytest.raises(CheckpointLimit):
            opened(content, limits=limits)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(archive(dictionary(x=floats("0", (2, 3))), {"0": ARRAY}))
    checkpoint = open_torch(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptCheckpoint, match="changed"):
        checkpoint["x"]


def test_a_folder_is_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="DiffusersFolder"):
        open_checkpoint(tmp_path)
