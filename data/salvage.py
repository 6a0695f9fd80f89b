"""A segment of a replay store, read as far as its files allow: what is damaged, and the episodes that are not.

Every column has a CRC-32C per episode, every other file of a sealed segment one in its attributes, these one of
themselves. So any changed byte is found, and named by what it costs. A column's last chunk is padded; that costs none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import journal
from data.compressed import CompressedColumn, decode_jpeg, decode_zstd, read_shard, read_spans
from data.layout import (
    EPISODE,
    chunk_file,
    field_table,
    file_checksum,
    read_array,
    read_signed,
    row_bytes,
    shard_bytes,
    shard_index,
)
from data.mapping import map_file
from data.segment import Segment, checksum, describe
from data.types import Spec

_TABLES = ("episode", "provenance")
"""Without these nobody can tell what the rows are."""

_Reader = Callable[[int, int], np.ndarray]
"""Rows of a stored column, for their checksum. Raises ``ValueError`` where it cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it was written."""

    where: str
    """Column, table or file."""
    what: str
    episodes: tuple[int, ...]
    """What it costs: rows of the segment's ``episode`` table."""


class Salvage(Segment):
    """A sealed or open segment with its ``problems``. ``readable`` is false when nothing can be taken from it."""

    def __init__(self, path: Path, spec: Spec, *, sealed: bool) -> None:
        self.path, self.name, self.spec, self.sealed = path, path.name, spec, sealed
        self.tier, self.readable = "hot", True
        self.problems: list[Problem] = []
        self.unfinished = 0
        """Bytes at the end of an open segment's journal that belong to no record: an append under way, or cut short."""
        self.repaired, self.columns, self.labelled = {}, {}, {}
        self.words = {"task": {}, "instruction": {}}
        self.table = np.empty((0, len(EPISODE)), np.int64)
        self._records = []
        self._fields = field_table(spec)
        try:
            if sealed:
                self._read()
            else:
                self._read_journal()
        except PermissionError:
            raise
        except (OSError, ValueError, KeyError) as error:
            self.readable = False
            self.problems = [Problem(where="tables", what=str(error), episodes=tuple(range(len(self))))]

    @property
    def intact(self) -> list[int]:
        """Episodes of which every byte is as it was committed."""
        lost = {episode for problem in self.problems for episode in problem.episodes}
        return [episode for episode in range(len(self)) if self.readable and episode not in lost]

    def _read(self) -> None:
        attributes = read_signed(self.path)
        self.tier, self.repaired = attributes["tier"], attributes.get("repaired", {})
        self.words = {name: {word: i for i, word in enumerate(attributes[name])} for name in self.words}
        self._embodiment = attributes["embodiment"]
        changed = [name for name, value in attributes["files"].items() if not self._is(name, value)]
        for name in changed:
            if name.split("/")[0] in _TABLES and not name.endswith("zarr.json"):
                raise ValueError(f"{name} differs from its checksum")
        self.problems = [Problem(where=name, what="missing, or differs from its checksum", episodes=())
                         for name in changed]
        self.table = read_array(self.path / "episode", "<i8", (attributes["episodes"], len(EPISODE)))
        names = attributes["crc32c_columns"]
        checks = read_array(self.path / "crc32c", "<u4", (len(self), len(names)))
        readers: dict[str, _Reader] = {}
        for name, field in self._fields.items():
            if self.tier == "hot" or not name.startswith("rgb_"):
                readers[name] = self._plain(name, field)
            elif attributes["codec"]["name"] == "zstd":
                readers[name] = self._zstd(name, field)
            else:
                readers |= self._jpeg(name, field)
        for i, name in enumerate(names):
            self._compare(name, readers[name], checks[:, i].tolist())

    def _read_journal(self) -> None:
        lines = (self.path / "journal").read_bytes().split(b"\n")
        self.unfinished = len(lines.pop())
        bad = [i for i, line in enumerate(lines) if not journal.intact(line)]
        if bad:
            after = len(lines) - 1 - bad[0] - len(bad[1:])
            self.problems.append(Problem(where="journal", episodes=(), what=(
                f"{len(bad)} records are damaged, the first is number {bad[0]}; {after} intact ones follow it")))
        self._records = [episode for i, line in enumerate(lines) if i not in bad for episode in json.loads(line[9:])]
        rows = [describe(episode, self.words) for episode in self._records]
        self.table = np.array(rows, np.int64).reshape(len(rows), len(EPISODE))
        for name, field in self._fields.items():
            self._compare(name, self._plain(name, field), [record["crc32c"][name] for record in self._records])

    def _is(self, name: str, value: int) -> bool:
        file = self.path / name
        return file.exists() and file_checksum(file) == value

    def _compare(self, name: str, read: _Reader, checks: list[int]) -> None:
        lost = []
        for episode, (start, length) in enumerate(self.table[:, :2].tolist()):
            try:
                if checksum(read(start, start + length + 1)) != checks[episode]:
                    lost.append(episode)
            except ValueError:
                lost.append(episode)
        if lost:
            self.problems.append(Problem(where=name, what="differs from its checksum", episodes=tuple(lost)))

    def _plain(self, name: str, field: Mapping[str, Any]) -> _Reader:
        """Map an uncompressed column, as far as there is one, and check what surrounds its rows."""
        file = chunk_file(self.path / name, 1 + len(field["shape"]))
        size, rows = file.stat().st_size if file.exists() else 0, self.rows
        there = min(rows, size // row_bytes(field))
        column = self.columns[name] = (map_file(file, field["dtype"], (there, *field["shape"])) if there else
                                       np.empty((0, *field["shape"]), field["dtype"]))
        data, index = rows * row_bytes(field), shard_index(field, rows)
        if self.sealed and size != shard_bytes(field, rows):
            self._add(name, f"should have {shard_bytes(field, rows)} bytes, has {size}")
        elif self.sealed and size:
            rest = map_file(file, "|u1", (size,))[data:]
            if rest[-len(index) :].tobytes() != index:
                self._add(name, "the shard's index is damaged")
            if rest[: -len(index)].any():
                self._add(name, "the padding of the last chunk is not zero")

        def read(begin: int, end: int) -> np.ndarray:
            if end > there:
                raise ValueError("missing rows")
            return column[begin:end]

        return read

    def _zstd(self, name: str, field: Mapping[str, Any]) -> _Reader:
        file = chunk_file(self.path / name, 1 + len(field["shape"]))
        content, index, _ = read_shard(file, -(-self.rows // field["chunk"]))
        # The chunks lie one after another, so one damaged entry of the index can be told from its neighbours.
        sizes = index[:, 1].astype(np.float64)
        begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        gaps = np.diff(np.append(index[:, 0], len(content) - index.nbytes - 4).astype(np.float64))

        def decode(chunk: int) -> np.ndarray:
            for begin, size in [(index[chunk, 0], sizes[chunk]), (begins[chunk], sizes[chunk]),
                                (index[chunk, 0], gaps[chunk])]:
                if begin >= 0 and size > 0 and begin + size <= len(content):
                    try:
                        return decode_zstd(content, np.array([begin, size]), field)
                    except ValueError:
                        continue
            raise ValueError(f"chunk {chunk} cannot be decoded")

        column = self.columns[name] = CompressedColumn((self.rows, *field["shape"]), field["chunk"], decode)
        return lambda begin, end: column[begin:end]

    def _jpeg(self, name: str, field: Mapping[str, Any]) -> dict[str, _Reader]:
        file = chunk_file(self.path / f"{name}_jpeg", 1)
        spans = read_spans(self.path, name, self.rows)
        content = map_file(file, "|u1", (file.stat().st_size if file.exists() else 0,))
        self.columns[name] = CompressedColumn((self.rows, *field["shape"]), 1,
                                              lambda row: decode_jpeg(content, spans[row], field)[None])

        def read(begin: int, end: int) -> np.ndarray:
            first, last = int(spans[begin, 0]), int(spans[end - 1].sum())
            if not 0 <= first <= last <= len(content):
                raise ValueError("missing bytes")
            return content[first:last]

        return {f"{name}_jpeg": read, f"{name}_span": lambda begin, end: spans[begin:end]}

    def _add(self, where: str, what: str) -> None:
        self.problems.append(Problem(where=where, what=what, episodes=()))
