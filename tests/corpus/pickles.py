"""PyTorch's files, written opcode by opcode without PyTorch, right or wrong as tests need them."""

import io
import struct
import zipfile

import numpy as np


def text(value):
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value):
    content = value.to_bytes(12, "little", signed=True)
    return b"\x8a\x0c" + content


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def storage(key, kind, numel):
    return (
        b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(numel)
    ) + b"tQ"


def tensor(source, shape, strides, offset=0):
    arguments = source + number(offset) + numbers(shape) + numbers(strides)
    empty = name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"\x89" + empty + b"tR"


def floats(key, shape):
    strides = np.cumprod((1, *shape[:0:-1]))[::-1].tolist() if shape else []
    return tensor(storage(key, "FloatStorage", int(np.prod(shape))), shape, strides)


def dictionary(**values):
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def archive(pickled, storages=None, top="archive", method=zipfile.ZIP_STORED, **members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as file:
        file.writestr(f"{top}/data.pkl", b"\x80\x02" + pickled + b".")
        for key, data in (storages or {}).items():
            file.writestr(f"{top}/data/{key}", data)
        for member, data in members.items():
            file.writestr(f"{top}/{member}", data)
    return content.getvalue()


def legacy(pickled, storages=()):
    parts = [number(0x1950A86A20F9469CFC6C), number(1001)]
    parts += [dictionary(little_endian=b"\x88"), pickled]
    parts += [b"](" + b"".join(text(key) for key, _ in storages) + b"e"]
    content = b"".join(b"\x80\x02" + part + b"." for part in parts)
    for _, array in storages:
        content += struct.pack("<q", array.size) + array.tobytes()
    return content
