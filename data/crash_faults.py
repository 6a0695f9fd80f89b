"""Bugs planted on purpose, in the process that calls them: a crash test that misses one of these proves nothing."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import journal, store
from data.segment import SegmentWriter


def journal_before_data() -> None:
    """The record says that rows are there before they are."""
    write, waiting = journal.write_all, []

    def later(descriptor: int, parts: list[Any], offset: int) -> None:
        waiting.append((descriptor, [bytes(part) for part in parts], offset))

    def append(descriptor: int, offset: int, line: bytes) -> int:
        write(descriptor, [line], offset)
        for rows in waiting:
            write(*rows)
        waiting.clear()
        return offset + len(line)

    journal.write_all, journal.append = later, append


def journal_without_checksum() -> None:
    """Any line that can be parsed is believed."""

    def read(path: Path, offset: int = 0) -> tuple[list[Any], int]:
        records = []
        for line in path.read_bytes()[offset:].splitlines(keepends=True):
            try:
                records.append(json.loads(line[9:]))
            except ValueError:
                break
            offset += len(line)
        return records, offset

    journal.read = read


def acknowledged_before_journal() -> None:
    """The record is written with the next one, or when the segment is sealed."""
    write, seal, waiting = journal.append, SegmentWriter.seal, {}

    def append(descriptor: int, offset: int, line: bytes) -> int:
        if line[9:10] != b"[":  # not a record of episodes
            return write(descriptor, offset, line)
        flush(descriptor)
        waiting[descriptor] = (offset, line)
        return offset + len(line)

    def flush(descriptor: int) -> None:
        if descriptor in waiting:
            write(descriptor, *waiting.pop(descriptor))

    def seal_all(self: SegmentWriter) -> None:
        flush(self._journal)
        seal(self)

    journal.append = append
    SegmentWriter.seal = seal_all  # type: ignore[method-assign]


def seal_without_padding() -> None:
    """The last chunk of a sealed column is not whole."""
    _skip_truncation(lambda now, size: size > now)


def recovery_without_truncation() -> None:
    """What a killed writer left behind its last record stays."""
    recover, recovering = store.recover, [False]

    def flagged(*arguments: Any, **named: Any) -> bool:
        recovering[0] = True
        try:
            return recover(*arguments, **named)
        finally:
            recovering[0] = False

    store.recover = flagged
    _skip_truncation(lambda now, size: size < now and recovering[0])


FAULTS: dict[str, Callable[[], None]] = {
    "journal record before the data": journal_before_data,
    "journal without checksum": journal_without_checksum,
    "acknowledged before the journal": acknowledged_before_journal,
    "sealed without padding": seal_without_padding,
    "recovery without truncation": recovery_without_truncation,
}


def _skip_truncation(skipped: Callable[[int, int], bool]) -> None:
    """Leave out changes of the size of files that exist already."""
    truncate, opened = os.truncate, io.open

    def truncate_path(path: Any, length: int) -> None:
        if not skipped(os.stat(path).st_size, length):
            truncate(path, length)

    class File(io.FileIO):
        def truncate(self, size: int | None = None) -> int:
            if size is not None and skipped(os.fstat(self.fileno()).st_size, size):
                return size
            return super().truncate(size)

    def open_file(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        return File(file, "r+") if mode == "r+b" else opened(file, mode, *arguments, **named)

    os.truncate = truncate_path
    io.open = open_file  # type: ignore[assignment]
