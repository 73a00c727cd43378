"""safetensors files, written by hand, right or wrong as tests need them."""

import json
import struct

F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def container(header, data=b"", length=None):
    """The bytes of a file whose header is a dict, text or bytes."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(**changes):
    return {**F4, **changes}
