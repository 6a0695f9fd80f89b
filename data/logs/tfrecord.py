"""TFRecord files and the ``tf.train.Example`` in each record, without TensorFlow.

A record is its length (uint64), a checksum of that (uint32), its bytes, and a checksum of them (uint32), all in little
endian. Checksums are masked CRC-32C. Format: https://www.tensorflow.org/tutorials/load_data/tfrecord
An Example is a map from names to lists of bytes, of float32, or of int64, on the protobuf wire:
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from jaxtyping import Int64, UInt8

HEADER = struct.Struct("<QI")
CHECKSUM = struct.Struct("<I")
VARINT, LENGTH_DELIMITED = 0, 2
FIXED = {1: 8, 5: 4}
"""Types of a field on the protobuf wire; of those of fixed length, their bytes."""

Feature = np.ndarray | list[slice]
"""Numbers ``[n]`` of float32 or int64, or where in the record each of ``n`` strings of bytes is."""


@dataclass(frozen=True)
class Record:
    """The bytes of one record."""

    offset: int
    """Where they begin in the file."""
    content: bytes
    damage: str
    """Why they cannot be trusted; empty when the checksum holds."""


class CutError(Exception):
    """The file ends, or is damaged, where another record should begin. Its text says where."""


def read_records(file: Path) -> Iterator[Record]:
    """Every record of a file. Raises ``CutError`` where no other can be found before its end."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        while (offset := stream.tell()) < size:
            header = stream.read(HEADER.size)
            if len(header) < HEADER.size:
                raise CutError(f"the file ends at byte {size}, within a record that begins at {offset}")
            length, checksum = HEADER.unpack(header)
            if _masked(header[:8]) != checksum:
                raise CutError(f"the length of the record at byte {offset} does not fit its checksum")
            if offset + HEADER.size + length + CHECKSUM.size > size:
                raise CutError(f"the file ends at byte {size}, within the {length} bytes of a record that begins at "
                               f"{offset}")
            content = stream.read(length)
            (checksum,) = CHECKSUM.unpack(stream.read(CHECKSUM.size))
            damage = "" if _masked(content) == checksum else f"the record at byte {offset} does not fit its checksum"
            yield Record(offset + HEADER.size, content, damage)


def starts_as_tfrecord(file: Path) -> bool:
    """The first bytes are the length of a record with its checksum."""
    try:
        with file.open("rb") as stream:
            header = stream.read(HEADER.size)
    except OSError:
        return False
    return len(header) == HEADER.size and _masked(header[:8]) == HEADER.unpack(header)[1]


def peek(file: Path, feature: str) -> Iterator[np.ndarray]:
    """One feature of every record that has it as numbers, without reading, or checking, the rest of the record."""
    size = file.stat().st_size
    content = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)
    offset = 0
    while offset + HEADER.size <= size:
        header = content[offset : offset + HEADER.size].tobytes()
        length, checksum = HEADER.unpack(header)
        if _masked(header[:8]) != checksum or offset + HEADER.size + length + CHECKSUM.size > size:
            return
        begin = offset + HEADER.size
        with contextlib.suppress(ValueError):
            found = parse_example(content[begin : begin + length].data, only=feature).get(feature)
            if isinstance(found, np.ndarray):
                yield found
        offset = begin + length + CHECKSUM.size


def parse_example(record: bytes | memoryview, only: str | None = None) -> dict[str, Feature]:
    """The features of a ``tf.train.Example``, or ``only`` one. Raises ``ValueError`` when the bytes are none."""
    features: dict[str, Feature] = {}
    view = memoryview(record)
    for example in _fields(view, slice(0, len(view)), 1):
        for entry in _fields(view, example, 1):
            name = "".join(bytes(view[part]).decode() for part in _fields(view, entry, 1))
            if only is None or name == only:
                features[name] = _feature(view, next(iter(_fields(view, entry, 2)), slice(0, 0)))
    return features


def _feature(view: memoryview, at: slice) -> Feature:
    """Field 1 is a list of bytes, 2 of float32, 3 of int64."""
    for items in _fields(view, at, 1):
        return list(_fields(view, items, 1))
    for items in _fields(view, at, 2):
        content = b"".join(view[item] for item in _fields(view, items, 1))
        return np.frombuffer(content, "<f4")  # raises ValueError where the last number is cut
    for items in _fields(view, at, 3):
        return _varints(np.frombuffer(b"".join(view[item] for item in _fields(view, items, 1)), np.uint8))
    return []


def _fields(view: memoryview, within: slice, wanted: int) -> list[slice]:
    """Where the values of one field of a message are, packed or not. Raises ``ValueError`` when it is no message."""
    found = []
    at = within.start
    while at < within.stop:
        tag, at = _varint(view, at, within.stop)
        begin = at
        kind = tag & 7
        if kind == VARINT:
            _, at = _varint(view, at, within.stop)
        elif kind == LENGTH_DELIMITED:
            length, begin = _varint(view, at, within.stop)
            at = begin + length
        elif kind in FIXED:
            at += FIXED[kind]
        else:
            raise ValueError(f"no protobuf message: a field of type {kind} at byte {at}")
        if at > within.stop:
            raise ValueError(f"no protobuf message: a field at byte {begin} is longer than its message")
        if tag >> 3 == wanted:
            found.append(slice(begin, at))
    return found


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError(f"no protobuf message: a number that does not end at byte {at}")


def _varints(content: UInt8[np.ndarray, " b"]) -> Int64[np.ndarray, " n"]:
    """Numbers of 7 bits a byte, the lowest first, one after the other."""
    last = np.flatnonzero(content < 0x80)
    if (last[-1] + 1 if len(last) else 0) != len(content):
        raise ValueError("a list of int64 is cut")
    first = np.concatenate([[0], last + 1])[:-1]
    if not len(last):
        return np.zeros(0, np.int64)
    lengths = last - first + 1
    if lengths.max() > 10:
        raise ValueError("an int64 has more than 10 bytes")
    shifts = 7 * (np.arange(len(content)) - np.repeat(first, lengths))
    return np.add.reduceat((content & 0x7F).astype(np.uint64) << shifts.astype(np.uint64), first).view(np.int64)


def _masked(content: bytes) -> int:
    """CRC-32C as TFRecord stores it."""
    checksum = google_crc32c.value(content)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
