"""A strict reader of zip archives: both copies of the table of contents have to agree.

Malicious files pass scanners as archives whose central directory and local headers differ, or that
follow other data. Such archives are refused. Only archives like PyTorch's are read: from the first
byte of the file to its last, with stored members (or deflated ones, which archivers make when they
repack) and without encryption. Source: PKWARE's APPNOTE.TXT 6.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from weights_conversion.files.errors import (
    CheckpointLimit,
    CorruptCheckpoint,
    UnsafeCheckpoint,
    printable,
)
from weights_conversion.files.limits import Limits

MAGIC = b"PK\x03\x04"
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_MAX_DIRECTORY = 64_000_000
_ENCRYPTED = 0x2041  # flag bits: encrypted, strongly encrypted, masked headers
_STORED, _DEFLATED = 0, 8
_CHUNK = 1 << 20


class Member(NamedTuple):
    """A file in an archive.

    Args:
        name: its path in the archive.
        size: bytes of its content.
        stored_size: bytes that it takes in the archive.
        method: 0 if it is stored, 8 if it is deflated.
        crc: CRC-32 of its content; 0 if the writer computed none.
        header: position of its local header.
        limit: position at which its bytes must end.
    """

    name: str
    size: int
    stored_size: int
    method: int
    crc: int
    header: int
    limit: int


def read_members(path: Path, file: BufferedReader, size: int, limits: Limits) -> dict[str, Member]:
    """Read the central directory of a whole archive.

    Raises:
        CheckpointError: If it is truncated, encrypted, ambiguous, or larger than allowed.
    """
    begin, length, count = _find_directory(path, file, size)
    if count > limits.members or length > _MAX_DIRECTORY:
        raise CheckpointLimit(
            f"{path} is a zip archive of {count:,} members, more than the {limits.members:,} "
            "allowed. Pass other limits if you trust it."
        )
    file.seek(begin)
    directory = file.read(length)
    members: dict[str, Member] = {}
    for member in _entries(path, directory, count, begin):
        if member.name in members:
            raise UnsafeCheckpoint(
                f"{path} has two members named {printable(member.name)}. "
                "Do not trust it; download it from its source."
            )
        members[member.name] = member
    if members and min(member.header for member in members.values()) > 0:
        raise UnsafeCheckpoint(
            f"{path} is a zip archive behind other data, which no PyTorch file is. "
            "Do not trust it; download it from its source."
        )
    return members


def locate(path: Path, file: BufferedReader, member: Member, limits: Limits) -> int:
    """Return the position of a member's bytes, after comparing local header and directory.

    Raises:
        CheckpointError: If the two disagree, or the member is too large for its bytes.
    """
    file.seek(member.header)
    content = file.read(_LOCAL.size)
    if len(content) < _LOCAL.size or not content.startswith(MAGIC):
        raise _corrupt(path, f"member {printable(member.name)} has no local header")
    _, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(content)
    name = file.read(name_length)
    if name != member.name.encode() or method != member.method:
        raise UnsafeCheckpoint(
            f"{path} calls a member {printable(member.name)} in its directory and "
            f"{printable(name)} before its bytes, or stores it otherwise. "
            "Do not trust it; download it from its source."
        )
    if flags & _ENCRYPTED:
        raise _corrupt(path, f"member {printable(member.name)} is encrypted")
    begin = member.header + _LOCAL.size + name_length + extra_length
    if begin + member.stored_size > member.limit:
        raise _corrupt(path, f"member {printable(member.name)} reaches into the directory")
    if member.size > limits.compression * member.stored_size + _CHUNK:
        raise CheckpointLimit(
            f"{path}: member {printable(member.name)} would grow from {member.stored_size:,} to "
            f"{member.size:,} bytes; PyTorch stores without compression. Do not trust it."
        )
    return begin


def chunks(
    path: Path, file: BufferedReader, member: Member, begin: int, size: int = _CHUNK
) -> Iterator[bytes]:
    """Yield a member's content from its first byte to its last, checked against its CRC.

    Raises:
        CorruptCheckpoint: If the content differs from the directory.
    """
    file.seek(begin)
    crc, length = 0, 0
    source = _stored if member.method == _STORED else _inflated
    for chunk in source(path, file, member, size):
        crc, length = zlib.crc32(chunk, crc), length + len(chunk)
        if length > member.size:
            break
        yield chunk
    if length != member.size:
        raise _corrupt(path, f"member {printable(member.name)} has not the size it declares")
    check_crc(path, member, crc)


def check_crc(path: Path, member: Member, crc: int) -> None:
    """Compare a CRC with the directory's, unless that is zero.

    Raises:
        CorruptCheckpoint: If they differ.
    """
    if member.crc not in (0, crc):
        raise _corrupt(path, f"member {printable(member.name)} is damaged: its CRC is wrong")


def _find_directory(path: Path, file: BufferedReader, size: int) -> tuple[int, int, int]:
    """Return the begin, the length and the number of entries of the central directory."""
    tail_begin = max(0, size - _END.size - _MAX_COMMENT)
    file.seek(tail_begin)
    tail = file.read(size - tail_begin)
    place = len(tail)
    while (place := tail.rfind(b"PK\x05\x06", 0, place)) >= 0:
        if len(tail) - place >= _END.size:
            _, disk, first_disk, _, count, length, begin, comment = _END.unpack_from(tail, place)
            if place + _END.size + comment == len(tail):
                break
    else:
        raise _corrupt(path, "it is truncated: a zip archive without its end")
    if disk or first_disk:
        raise _corrupt(path, "it is one part of several")
    end = tail_begin + place
    large = _find_directory_64(path, file, end)
    if large is not None:  # PyTorch always writes both records
        small, (begin, length, count, end) = (begin, length, count), large
        if any(mine not in (theirs, 0xFFFF, 0xFFFFFFFF) for mine, theirs in zip(small, large)):
            raise UnsafeCheckpoint(
                f"{path} is a zip archive with two directories. Do not trust it; "
                "download it from its source."
            )
    if begin + length != end:
        raise UnsafeCheckpoint(
            f"{path} is a zip archive with other data before or within it, which no PyTorch file "
            "has. Do not trust it; download it from its source."
        )
    return begin, length, count


def _find_directory_64(
    path: Path, file: BufferedReader, end: int
) -> tuple[int, int, int, int] | None:
    """Return the begin, length, number of entries and end of a large archive's directory."""
    file.seek(max(0, end - _LOCATOR_64.size))
    content = file.read(_LOCATOR_64.size)
    if len(content) < _LOCATOR_64.size or not content.startswith(b"PK\x06\x07"):
        return None
    place = _LOCATOR_64.unpack(content)[2]
    if place <= end - _LOCATOR_64.size - _END_64.size:
        file.seek(place)
        fields = _END_64.unpack(file.read(_END_64.size))
        if fields[0] == b"PK\x06\x06":
            count, length, begin = fields[-3:]
            return begin, length, count, place
    raise _corrupt(path, "its end record of large archives is missing")


def _entries(path: Path, directory: bytes, count: int, limit: int) -> Iterator[Member]:
    place = 0
    for _ in range(count):
        if len(directory) - place < _CENTRAL.size or not directory.startswith(b"PK\x01\x02", place):
            raise _corrupt(path, "its central directory is truncated")
        fields = _CENTRAL.unpack_from(directory, place)
        flags, method, crc = fields[3], fields[4], fields[7]
        name_length, extra_length, comment_length = fields[10:13]
        name_begin = place + _CENTRAL.size
        name = _member_name(path, directory[name_begin : name_begin + name_length])
        extra = directory[name_begin + name_length : name_begin + name_length + extra_length]
        stored_size, size, header = _sizes(path, (fields[8], fields[9], fields[16]), extra)
        if flags & _ENCRYPTED:
            raise _corrupt(path, f"member {printable(name)} is encrypted")
        if method not in (_STORED, _DEFLATED):
            raise _corrupt(path, f"member {printable(name)} has compression method {method}")
        if method == _STORED and size != stored_size:
            raise _corrupt(path, f"member {printable(name)} declares two sizes")
        yield Member(name, size, stored_size, method, crc, header, limit)
        place = name_begin + name_length + extra_length + comment_length
    if place != len(directory):
        raise _corrupt(path, "its central directory holds more than it declares")


def _member_name(path: Path, content: bytes) -> str:
    try:
        name = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _corrupt(path, f"a member's name {printable(content)} is not UTF-8") from error
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or ".." in parts or set("\\:\0") & set(name):
        raise UnsafeCheckpoint(
            f"{path} has a member named {printable(name)}, which would be unpacked elsewhere. "
            "Do not trust it; download it from its source."
        )
    return name


def _sizes(path: Path, fields: tuple[int, int, int], extra: bytes) -> tuple[int, int, int]:
    """Return the stored size, the size and the local header's position of a member.

    Those of large members are in the extra field.
    """
    stored_size, size, header = fields
    if 0xFFFFFFFF not in fields:
        return fields
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        content, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            numbers = [n for (n,) in struct.iter_unpack("<Q", content[: len(content) // 8 * 8])]
            if len(numbers) >= fields.count(0xFFFFFFFF):
                size = numbers.pop(0) if size == 0xFFFFFFFF else size
                stored_size = numbers.pop(0) if stored_size == 0xFFFFFFFF else stored_size
                header = numbers.pop(0) if header == 0xFFFFFFFF else header
                return stored_size, size, header
    raise _corrupt(path, "a large member's sizes are missing")


def _stored(path: Path, file: BufferedReader, member: Member, size: int) -> Iterator[bytes]:
    remaining = member.size
    while remaining:
        chunk = file.read(min(size, remaining))
        if not chunk:
            raise _corrupt(path, f"it ended within member {printable(member.name)}")
        remaining -= len(chunk)
        yield chunk


def _inflated(path: Path, file: BufferedReader, member: Member, size: int) -> Iterator[bytes]:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    remaining, waiting = member.stored_size, b""
    while not inflate.eof:
        if not waiting:
            waiting = file.read(min(size, remaining))
            remaining -= len(waiting)
            if not waiting:
                raise _corrupt(path, f"it ended within member {printable(member.name)}")
        try:
            chunk = inflate.decompress(waiting, size)
        except zlib.error as error:
            raise _corrupt(path, f"member {printable(member.name)} is damaged") from error
        waiting = inflate.unconsumed_tail
        yield chunk


def _corrupt(path: Path, problem: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{path} cannot be read as a zip archive: {problem}. Get it again.")
