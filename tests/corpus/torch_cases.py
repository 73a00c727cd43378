"""Threats 35 to 67: files of PyTorch, and what is odd but sound in them."""

import io
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
from corpus.case import Case
from corpus.pickles import (
    archive,
    dictionary,
    floats,
    legacy,
    name,
    number,
    storage,
    tensor,
    text,
)

from weights_conversion import CheckpointLimit, CorruptCheckpoint, UnsafeCheckpoint

MARKER = "executed"  # the payloads would make a file of this name
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
LOADS = {"x": ARRAY}
COMMAND = b"(" + text(f"touch {MARKER}") + b"t"
FLOATS = storage("0", "FloatStorage", 6)


def archived(pickled=None, storages=None, **settings):
    pickled = dictionary(x=floats("0", (2, 3))) if pickled is None else pickled
    return archive(pickled, {"0": ARRAY} if storages is None else storages, **settings)


def beside(extra):
    """A sound tensor, and beside it what is odd."""
    return dictionary(x=floats("0", (2, 3)), extra=extra)


def with_members(**members):
    content = io.BytesIO(archived())
    with zipfile.ZipFile(content, "a") as file:
        for member, data in members.items():
            file.writestr(member, data)
    return content.getvalue()


def changed(content, place, value):
    content = bytearray(content)
    content[place] ^= value
    return bytes(content)


def flagged():
    content = archived()
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content = changed(content, content.index(magic) + place, 1)
    return content


def without_crc(content, data=ARRAY):
    crc = struct.pack("<L", zlib.crc32(data))
    return content.replace(crc, bytes(4))


def twice_named():
    import warnings

    content = io.BytesIO(archived())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(content, "a") as file:
            file.writestr("archive/data.pkl", b"\x80\x02}.")
    return content.getvalue()


def commented():
    content = io.BytesIO(archived())
    with zipfile.ZipFile(content, "a") as file:
        file.comment = b"made by hand"
    return content.getvalue()


def large():
    """A storage written as a member of unknown size, with the record of large archives."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + dictionary(x=floats("0", (2, 3))) + b".")
        with file.open("a/data/0", "w", force_zip64=True) as member:
            member.write(ARRAY.tobytes())
    return content.getvalue()


def executes(module, function):
    return {
        "REDUCE": name(module, function) + COMMAND + b"R",
        "STACK_GLOBAL": text(module) + text(function) + b"\x93" + COMMAND + b"R",
        "INST": b"(" + text(f"touch {MARKER}") + f"i{module}\n{function}\n".encode(),
        "OBJ": b"(" + name(module, function) + text(f"touch {MARKER}") + b"o",
    }


SYSTEM = executes("posix", "system")
GETATTR = name("builtins", "getattr")
CHAIN = GETATTR + b"(" + GETATTR + b"(" + name("os", "path") + text("os") + b"tR" + text("system")
STATE = dictionary(__setstate__=name("posix", "system"))
LIGHTNING = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
NUMPY_DTYPE = name("numpy", "dtype") + b"(" + text("f8") + b"\x89\x88tR"
SCALAR = name("numpy.core.multiarray", "scalar") + b"(" + NUMPY_DTYPE + b"C\x08" + bytes(8) + b"tR"
BOMB = 1 << 27
MODULUS = 2**61 - 1  # of Python's hash of numbers
COLLIDING = b"}(" + b"".join(number(n * MODULUS) + b"N" for n in range(1, 150_000)) + b"u"
LAUGHS = text("ha") + b"q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60))

CASES = [
    Case(35, "os.system, zip", archived(SYSTEM["REDUCE"]), UnsafeCheckpoint, "posix.system"),
    Case(36, "os.system, legacy", legacy(SYSTEM["REDUCE"]), UnsafeCheckpoint, "posix.system"),
    Case(37, "STACK_GLOBAL", archived(SYSTEM["STACK_GLOBAL"]), UnsafeCheckpoint, "posix.system"),
    Case(38, "INST", archived(SYSTEM["INST"]), UnsafeCheckpoint, "posix.system"),
    Case(39, "OBJ", archived(SYSTEM["OBJ"]), UnsafeCheckpoint, "posix.system"),
    Case(
        40,
        "plain pickle, payload first, then broken bytes",
        b"\x80\x02" + SYSTEM["REDUCE"] + b"\xff\xff",
        UnsafeCheckpoint,
    ),
    Case(
        40,
        "plain pickle of protocol 0",
        b"cposix\nsystem\n(S'touch executed'\ntR.",
        UnsafeCheckpoint,
    ),
    Case(
        41,
        "dotted name",
        archived(text("torch") + text("serialization.os.system") + b"\x93" + COMMAND + b"R"),
        UnsafeCheckpoint,
        "serialization.os.system",
    ),
    Case(42, "a chain of getattr", archived(CHAIN + b"tR" + COMMAND + b"R"), UnsafeCheckpoint),
    Case(42, "EXT1", archived(b"\x82\x01" + COMMAND + b"R"), UnsafeCheckpoint),
    Case(42, "EXT4", archived(b"\x84\x01\0\0\0"), UnsafeCheckpoint),
    Case(42, "NEWOBJ_EX", archived(name("posix", "system") + COMMAND + b"}\x92"), UnsafeCheckpoint),
    Case(42, "NEWOBJ", archived(name("subprocess", "Popen") + COMMAND + b"\x81"), UnsafeCheckpoint),
    Case(
        42,
        "BUILD with __setstate__",
        archived(name("argparse", "Namespace") + b")\x81" + STATE + b"b"),
        UnsafeCheckpoint,
    ),
    Case(42, "BUILD of a name", archived(name("os", "path") + STATE + b"b"), UnsafeCheckpoint),
    *(
        Case(
            42,
            f"calls {function}",
            archived(name(*function.rsplit(".", 1)) + COMMAND + b"R"),
            UnsafeCheckpoint,
            function,
        )
        for function in (
            "builtins.eval",
            "builtins.exec",
            "pkgutil.resolve_name",
            "pty.spawn",
            "importlib.import_module",
            "torch.storage._load_from_bytes",
            "torch.load",
            "numpy.testing._private.utils.runstring",
            "webbrowser.open",
        )
    ),
    Case(
        43,
        "legacy tar",
        b"sys_info" + bytes(249) + b"ustar" + bytes(300),
        UnsafeCheckpoint,
        "unsupported container",
    ),
    Case(
        43,
        "TorchScript",
        archived(**{"constants.pkl": b"\x80\x02).", "code/x.py": b""}),
        UnsafeCheckpoint,
        "unsupported container",
    ),
    Case(43, "7z", b"7z\xbc\xaf\x27\x1c" + bytes(300), UnsafeCheckpoint, "unsupported container"),
    Case(43, "gzip", b"\x1f\x8b\x08" + bytes(300), UnsafeCheckpoint, "unsupported container"),
    Case(
        44, "Lightning's class as a key", archived(beside(b"}" + LIGHTNING + b"}s")), expected=LOADS
    ),
    Case(44, "numpy's scalar and dtype", archived(beside(SCALAR)), expected=LOADS),
    Case(
        44,
        "torch.Size",
        archived(beside(name("torch", "Size") + b"(K\x02K\x03t\x85R")),
        expected=LOADS,
    ),
    Case(
        44,
        "an unknown name, only mentioned",
        archived(beside(name("posix", "system"))),
        expected=LOADS,
    ),
    Case(
        44,
        "an unknown name in a tensor's place",
        archived(
            name("torch._utils", "_rebuild_tensor_v2")
            + b"("
            + name("posix", "system")
            + b"K\x00)))tR"
        ),
        CorruptCheckpoint,
    ),
    Case(45, "truncated pickle", archived(text("abc")[:-1]), CorruptCheckpoint),
    Case(45, "truncated legacy pickle", legacy(dictionary())[:-5], CorruptCheckpoint),
    Case(46, "stack underflow", archived(b"00000"), CorruptCheckpoint),
    Case(46, "no mark", archived(b"}u"), CorruptCheckpoint),
    Case(47, "missing memo", archived(b"h\x07"), CorruptCheckpoint, "memo"),
    Case(
        48,
        "10^7 lists, deflated",
        archive(b"]" * 10**7, method=zipfile.ZIP_DEFLATED),
        CheckpointLimit,
    ),
    Case(48, "10^7 lists", archive(b"]" * 10**7), CheckpointLimit),
    *(
        Case(
            48,
            f"900,000 {what} beside a tensor",
            archived(beside(b"](" + code * 900_000 + b"e")),
            expected=LOADS,
        )
        for what, code in {"lists": b"]", "dictionaries": b"}"}.items()
    ),
    Case(48, "150,000 numbers of one hash as keys", archived(beside(COLLIDING)), expected=LOADS),
    Case(49, "LONG_BINPUT of 2^32 - 1", archived(b"]r\xff\xff\xff\xff"), CheckpointLimit),
    Case(50, "billion laughs", archived(beside(LAUGHS)), expected=LOADS),
    Case(51, "200,000 nested tuples", archived(b")" + b"\x85" * 200_000), CheckpointLimit),
    Case(
        51,
        "200,000 nested tuples as a key",
        archived(b"})" + b"\x85" * 200_000 + b"Ns"),
        CheckpointLimit,
    ),
    Case(
        51,
        "100,000 nested placeholders",
        archived(name("pathlib", "Path") + b"q\x00N" + b"\x85q\x010h\x00h\x01R" * 100_000),
        CheckpointLimit,
    ),
    Case(51, "200,000 nested marks", archived(b"(" * 200_000), CorruptCheckpoint),
    Case(52, "LONG4 of 2^31 bytes", archived(b"\x8b\xff\xff\xff\x7f"), CorruptCheckpoint),
    Case(
        52,
        "BINBYTES8 of 2^62 bytes",
        archived(b"\x8e" + struct.pack("<Q", 2**62)),
        CorruptCheckpoint,
    ),
    Case(53, "SETITEM on a list", archived(b"]K\x01K\x02s"), CorruptCheckpoint),
    Case(53, "APPEND to a dictionary", archived(b"}K\x01a"), CorruptCheckpoint),
    Case(
        53,
        "SETITEMS on a tensor",
        archived(floats("0", (2, 3)) + b"(K\x01K\x02u"),
        CorruptCheckpoint,
    ),
    Case(54, "missing storage", archived(storages={}), CorruptCheckpoint, "no member"),
    Case(55, "short storage", archived(storages={"0": ARRAY[0]}), CorruptCheckpoint, "12"),
    Case(
        56,
        "2^31 elements from 32 bytes",
        archived(dictionary(x=floats("0", (2**31,))), {"0": bytes(32)}),
        CorruptCheckpoint,
    ),
    Case(
        57,
        "shape larger than its storage",
        archived(dictionary(x=tensor(FLOATS, (7,), (1,)))),
        CorruptCheckpoint,
        "uses 28 bytes",
    ),
    Case(
        58,
        "offset past the end",
        archived(dictionary(x=tensor(FLOATS, (1,), (1,), 6))),
        CorruptCheckpoint,
    ),
    Case(
        58,
        "offset over 64 bits",
        archived(dictionary(x=tensor(FLOATS, (1,), (1,), 2**64 - 1))),
        CorruptCheckpoint,
    ),
    Case(
        59,
        "negative stride",
        archived(dictionary(x=tensor(FLOATS, (3,), (-1,), 5))),
        CorruptCheckpoint,
    ),
    Case(
        60,
        "2^32 elements by stride 0",
        archived(dictionary(x=tensor(FLOATS, (2**16, 2**16), (0, 0)))),
        CheckpointLimit,
    ),
    Case(
        61,
        "flipped byte",
        changed(archived(), archived().index(ARRAY.tobytes()) + 9, 4),
        CorruptCheckpoint,
        "CRC",
    ),
    Case(
        61,
        "flipped byte in the pickle",
        changed(archived(), archived().index(b"FloatStorage"), 32),
        CorruptCheckpoint,
    ),
    Case(
        62,
        "128 MB of zeros, deflated",
        archive(
            dictionary(x=tensor(storage("0", "ByteStorage", BOMB), (BOMB,), (1,))),
            {"0": bytes(BOMB)},
            method=zipfile.ZIP_DEFLATED,
        ),
        CheckpointLimit,
    ),
    Case(63, "zip slip", with_members(**{"../../evil": b""}), UnsafeCheckpoint, "elsewhere"),
    Case(63, "absolute member", with_members(**{"/etc/passwd": b""}), UnsafeCheckpoint),
    Case(63, "a drive's member", with_members(**{"C:evil": b""}), UnsafeCheckpoint),
    Case(
        64,
        "a program beside the tensors",
        with_members(**{"archive/evil.py": b"1/0"}),
        expected=LOADS,
    ),
    Case(65, "two data.pkl", with_members(**{"other/data.pkl": b"\x80\x02}."}), UnsafeCheckpoint),
    Case(65, "two members of one name", twice_named(), UnsafeCheckpoint),
    Case(65, "local and central names differ", changed(archived(), 30, 1), UnsafeCheckpoint),
    Case(65, "prepended zip", archived() + archived(), UnsafeCheckpoint),
    Case(65, "prepended bytes", b"PK\x03\x04" + archived(), UnsafeCheckpoint),
    Case(66, "encrypted", flagged(), CorruptCheckpoint, "encrypted"),
    Case(66, "truncated directory", archived()[:-40], CorruptCheckpoint),
    Case(66, "half an archive", archived()[: len(archived()) // 2], CorruptCheckpoint),
]


def views(big=False, **settings):
    """One storage, seen in many ways."""
    array = np.arange(24, dtype=np.float32)
    source = storage("0", "FloatStorage", 24)
    grid = array.reshape(2, 3, 4)
    seen = {
        "whole": (tensor(source, (2, 3, 4), (12, 4, 1)), grid),
        "turned": (tensor(source, (4, 6), (1, 4)), array.reshape(6, 4).T),
        "channels last": (tensor(source, (2, 4, 3), (12, 1, 4)), grid.transpose(0, 2, 1)),
        "part": (tensor(source, (2, 2), (12, 2), 5), grid[:, 1, 1::2]),
        "tied": (tensor(source, (24,), (1,)), array),
        "repeated": (tensor(source, (3, 4), (0, 1)), np.tile(array[:4], (3, 1))),
        "scalar": (tensor(source, (), (), 7), np.array(7, np.float32)),
        "empty": (tensor(source, (0, 5), (5, 1)), np.empty((0, 5), np.float32)),
    }
    data = array.byteswap() if big else array
    pickled = dictionary(**{key: value for key, (value, _) in seen.items()})
    members = {"byteorder": b"big"} if big else {}
    content = archive(pickled, {"0": data}, **members, **settings)
    return content, {key: value for key, (_, value) in seen.items()}


def legacy_views():
    array = np.arange(6, dtype=np.float32)
    pickled = dictionary(
        x=tensor(storage("a", "FloatStorage", 6), (3, 2), (1, 3)),
        y=tensor(viewed("a", 6, 2, 3), (3,), (1,)),
    )
    return legacy(pickled, [("a", array)]), {"x": array.reshape(2, 3).T, "y": array[2:5]}


def viewed(key, numel, first, length):
    """A persistent id of before 2018: a storage that is a view of another."""
    ends = storage(key, "FloatStorage", numel).removesuffix(b"tQ")
    view = b"(" + text("view") + number(first) + number(length) + b"t"
    return ends + view + b"tQ"


def of_dtype(kind, array):
    pickled = dictionary(x=tensor(storage("0", kind, array.size), array.shape, (1,)))
    return archive(pickled, {"0": array.tobytes()}), {"x": array}


def float8():
    array = np.array([1, -1, 448], ml_dtypes.float8_e4m3fn)
    source = b"(" + text("storage") + name("torch.storage", "UntypedStorage") + text("0")
    source += text("cpu") + number(3) + b"tQ"
    call = name("torch._utils", "_rebuild_tensor_v3") + b"(" + source + b"K\x00K\x03\x85K\x01\x85"
    pickled = call + b"\x89N" + name("torch", "float8_e4m3fn") + b"tR"
    return archive(dictionary(x=pickled), {"0": array.tobytes()}), {"x": array}


def parameter():
    call = name("torch._utils", "_rebuild_parameter") + b"(" + floats("0", (2, 3)) + b"\x88N"
    return archived(dictionary(x=call + b"tR")), LOADS


def memoised():
    """Names, texts and a storage that come from the memo, as protocol 4 writes them."""
    pickled = text("x") + b"\x94" + text("torch") + b"\x94" + b"00"
    return archived(pickled + b"}h\x00" + floats("0", (2, 3)) + b"\x94s"), LOADS


NESTED = dictionary(state_dict=dictionary(state_dict=dictionary(x=floats("0", (2, 3)))))
TRAINING = dictionary(
    state_dict=dictionary(x=floats("0", (2, 3))),
    optimizer_states=b"](" + dictionary(exp_avg=floats("not there", (2, 3))) + b"e",
    callbacks=b"}" + LIGHTNING + b"}s",
    hyper_parameters=name("omegaconf.dictconfig", "DictConfig") + b")\x81}b",
    global_step=number(470_000),
)
ORDERED = name("collections", "OrderedDict") + b")R" + text("x") + floats("0", (2, 3)) + b"s"
ORDERED += dictionary(_metadata=b"}") + b"b"
SOUND = {
    "shared and strided storages": views(),
    "the same, deflated": views(method=zipfile.ZIP_DEFLATED),
    "the same, big-endian": views(big=True),
    "legacy with views of storages": legacy_views(),
    "bfloat16": of_dtype("BFloat16Storage", np.array([1.5, -3e38], ml_dtypes.bfloat16)),
    "half": of_dtype("HalfStorage", np.array([1.5, -6e4], np.float16)),
    "integers": of_dtype("LongStorage", np.array([-1, 2**62])),
    "complex numbers": of_dtype("ComplexFloatStorage", np.array([1 + 2j], np.complex64)),
    "float8 by _rebuild_tensor_v3": float8(),
    "a parameter": parameter(),
    "nested state_dict": (archived(NESTED), LOADS),
    "training state whose optimizer is never read": (archived(TRAINING), LOADS),
    "OrderedDict with _metadata": (archived(ORDERED), LOADS),
    "memo of protocol 4": memoised(),
    "no CRC": (without_crc(archived()), LOADS),
    "a comment behind the archive": (commented(), LOADS),
    "the record of large archives": (large(), LOADS),
    "PyTorch's newer members": (
        archived(
            **{
                "version": b"3\n",
                "byteorder": b"little",
                ".format_version": b"1",
                ".storage_alignment": b"64",
                ".data/serialization_id": b"0",
            }
        ),
        LOADS,
    ),
    "another top folder": (archived(top="v1-5-pruned"), LOADS),
}
CASES += [
    Case(
        67 if "big-endian" in name_ or "strided" in name_ else "valid",
        name_,
        content,
        expected=expected,
    )
    for name_, (content, expected) in SOUND.items()
]
