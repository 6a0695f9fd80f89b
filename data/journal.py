"""An append-only file of checksummed JSON lines: the truth about what was committed.

A line is the CRC-32C of its text, in eight hex digits, a space, and the text. A reader takes whole, intact lines from
the beginning and stops at the first that is not, so whatever happens to the file leaves an exact prefix.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import google_crc32c


def encode(record: Any) -> bytes:
    """One line."""
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (google_crc32c.value(text), text)


def read(path: Path, offset: int = 0) -> tuple[list[Any], int]:
    """Records from ``offset`` on, and the offset behind the last intact one. Raises ``OSError`` when unreadable."""
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    records, begin = [], 0
    while (end := content.find(b"\n", begin)) >= 0:
        line = content[begin:end]
        if not intact(line):
            break
        records.append(json.loads(line[9:]))
        begin = end + 1
    return records, offset + begin


def intact(line: bytes) -> bool:
    """Whether a line, without its end, is as it was written."""
    return line[:9] == b"%08x " % google_crc32c.value(line[9:])


def append(descriptor: int, offset: int, line: bytes) -> int:
    """Write one line at ``offset``, all or nothing (but for a kill, which a reader sees through); returns its end."""
    try:
        write_all(descriptor, [line], offset)
    except OSError:
        os.ftruncate(descriptor, offset)
        raise
    return offset + len(line)


def write_all(descriptor: int, parts: list[Any], offset: int) -> None:
    """``pwrite`` buffers one after another, however often the system writes less than asked."""
    for part in parts:
        view = memoryview(part).cast("B")
        while len(view):
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
