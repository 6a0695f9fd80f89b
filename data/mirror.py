"""A copy of a replay store in another place, a moment behind: what a learner on another machine reads.

    news = changes(store, mirror.held)      where the store is
    mirror.take(news)                       where the copy is; again, and again

Both sides speak of files alone, and the store's files only ever grow, are sealed, or go. So the copy has the segments,
rows and commit times of the store, and what a reader is told of one it finds in the other (``wm_rl.plans``). Only this
module writes to a copy: appending to it, or rolling it back, would part it from its store.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data import journal
from data.layout import chunk_file, field_table, read_attributes, row_bytes
from data.segment import LEFTOVER
from data.store import store_attributes
from data.types import Spec

_PIECE = 64 * 2**20
"""Bytes of one answer, about: what one side holds in memory and the other does not wait for too long."""
_BESIDE = ("cloned", "outcome", "control/hidden")
"""Folders of small files that say something about segments: copied whole where they changed."""
_FOLDERS = ("open", "seg", "tmp", "superseded", *_BESIDE)

Stamp = tuple[int, int]
"""Inode and time of a file: tells one version of it from the next, on the machine where it lies."""


class Piece(NamedTuple):
    """What follows in one of a segment's files."""

    file: str
    """Its path in the segment's folder."""
    offset: int
    content: bytes


@dataclass(frozen=True, kw_only=True)
class News:
    """What is new of one segment. Its pieces are to be written in their order."""

    name: str
    pieces: list[Piece]
    holes: Mapping[str, int] = field(default_factory=dict)
    """Of a segment that is new and open: its columns' files, and how long they may get."""
    sealed: Stamp | None = None
    """The stamp of the source's sealed segment, when these pieces are all that was lacking of it."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a copy lacks, or a first part of it."""

    beside: Mapping[str, tuple[Stamp, bytes]]
    """Small files, by their path in the store."""
    gone: list[str]
    """Small files and segments that are no more."""
    segments: list[News]
    whole: bool
    """Nothing more was there to be told."""


@dataclass
class Held:
    """What a copy has of a segment."""

    lengths: dict[str, int] = field(default_factory=dict)
    """Bytes of each of its files, while some are lacking."""
    sealed: Stamp | None = None
    """All of it is there; the source's stamp."""


@dataclass
class Holding:
    """What a copy has of its store."""

    beside: dict[str, Stamp] = field(default_factory=dict)
    segments: dict[str, Held] = field(default_factory=dict)


def changes(store: Path, held: Holding, *, most: int = _PIECE) -> Changes:
    """What the copy that has ``held`` lacks of the store at ``store``, about ``most`` bytes of it at the most.

    The store may be written to, evicted and compacted meanwhile: what vanishes is told with the next call.

    Raises:
        UserError: there is no store.
    """
    spec = Spec.from_dict(store_attributes(store)["spec"])
    beside = {str(path.relative_to(store)): path for path in [store / "zarr.json", *_beside(store)]}
    fresh: dict[str, tuple[Stamp, bytes]] = {}
    for name, path in beside.items():
        with contextlib.suppress(FileNotFoundError):
            stamp = _stamp(path)
            if held.beside.get(name) != stamp:
                fresh[name] = stamp, path.read_bytes()
    listed: dict[str, Path] = {}
    for kind in ("open", "seg"):  # one that is sealed meanwhile is then in both
        listed |= {entry.name: Path(entry.path) for entry in os.scandir(store / kind) if entry.is_dir()}
    gone = [name for name in held.beside if name not in beside] + [
        name for name in held.segments if name not in listed]
    segments, left = [], most
    for name, folder in sorted(listed.items()):
        own = held.segments.get(name, Held())
        with contextlib.suppress(FileNotFoundError):  # sealed, evicted or compacted just now
            if folder.parent.name == "open":
                news = _of_open(name, folder, own, spec, left)
            elif own.sealed == _stamp(folder / "zarr.json"):
                continue
            elif own.sealed is not None or (own.lengths and read_attributes(folder)["tier"] != "hot"):
                gone.append(name)  # it was compressed since: other bytes
                continue
            else:
                news = _of_sealed(name, folder, own, left)
            if news.pieces:
                segments.append(news)
                left -= sum(len(piece.content) for piece in news.pieces)
        if left <= 0:
            break
    return Changes(beside=fresh, gone=gone, segments=segments, whole=left > 0 and not gone)


class Mirror:
    """A copy that takes over what ``changes`` says. A ``ReplayStore`` opened at ``path`` reads it, in any process."""

    def __init__(self, path: Path) -> None:
        """Begin anew: what lies at ``path`` goes. It can be opened once the first changes were taken."""
        self.path, self.held = path, Holding()
        shutil.rmtree(path, ignore_errors=True)
        for name in _FOLDERS:
            (path / name).mkdir(parents=True)

    def take(self, news: Changes) -> None:
        """Make the copy what the source was. A reader sees whole episodes at any moment."""
        for name in news.gone:
            self._remove(name)
        # A group's metadata comes last, since a reader looks for it: the rest is there by then.
        for name, (stamp, content) in sorted(news.beside.items(), key=lambda item: item[0].endswith("zarr.json")):
            _replace(self.path / name, content)
            self.held.beside[name] = stamp
        for segment in news.segments:
            self._take(segment)

    def _take(self, news: News) -> None:
        held = self.held.segments.get(news.name)
        folder = self.path / "open" / news.name
        if held is None:
            held = self.held.segments[news.name] = Held()
            if news.holes:
                self._begin(folder, news)
        if not folder.exists():  # sealed before any of it was seen: nobody looks until it is whole
            folder = self.path / "tmp" / f"{LEFTOVER}{news.name}"
        for piece in news.pieces:
            file = folder / piece.file
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                journal.write_all(descriptor, [piece.content], piece.offset)
            finally:
                os.close(descriptor)
            held.lengths[piece.file] = piece.offset + len(piece.content)
        if news.sealed is not None:
            for name, length in held.lengths.items():
                if name not in _JOURNALLED:
                    os.truncate(folder / name, length)
            sealed = folder.rename(self.path / "seg" / news.name)
            for name in _JOURNALLED:
                (sealed / name).unlink(missing_ok=True)
            held.lengths, held.sealed = {}, news.sealed

    def _begin(self, folder: Path, news: News) -> None:
        """An open segment without rows, shown when it is complete."""
        building = self.path / "tmp" / f"{LEFTOVER}{uuid.uuid4().hex}"
        for column, length in news.holes.items():
            (building / column).parent.mkdir(parents=True)
            with (building / column).open("wb") as hole:
                hole.truncate(length)
        (building / "journal").touch()
        building.rename(folder)

    def _remove(self, name: str) -> None:
        if name in self.held.beside:
            (self.path / name).unlink(missing_ok=True)
            del self.held.beside[name]
            return
        del self.held.segments[name]
        for place in (self.path / "seg" / name, self.path / "open" / name, self.path / "tmp" / f"{LEFTOVER}{name}"):
            if place.exists():
                trash = self.path / "tmp" / f"{LEFTOVER}{uuid.uuid4().hex}"
                place.rename(trash)
                shutil.rmtree(trash, ignore_errors=True)


_JOURNALLED = ("journal", "header.json")
"""Files of open segments alone."""


def _of_open(name: str, folder: Path, held: Held, spec: Spec, most: int) -> News:
    """Rows first, then the journal's lines that say they are there."""
    fields = {str(chunk_file(Path(column), 1 + len(each["shape"]))): row_bytes(each)
              for column, each in field_table(spec).items()}
    begin = held.lengths.get("journal", 0)
    records, end = journal.read(folder / "journal", begin)
    with (folder / "journal").open("rb") as file:
        file.seek(begin)
        lines = file.read(end - begin).splitlines(keepends=True)
    told, rows, size = b"", 0, 0
    first = min(held.lengths.get(file, 0) // width for file, width in fields.items() if width)
    for line, episodes in zip(lines, records, strict=True):
        told += line
        rows = episodes[-1]["start"] + episodes[-1]["length"] + 1
        size = (rows - first) * sum(fields.values())
        if size >= most:
            break
    if not told:
        return News(name=name, pieces=[])
    pieces = [_read(folder, file, held.lengths.get(file, 0), rows * width) for file, width in fields.items()]
    capacity = json.loads((folder / "header.json").read_text())["capacity"]
    holes = {} if held.lengths else {file: capacity * width for file, width in fields.items()}
    return News(name=name, pieces=[*pieces, Piece("journal", begin, told)], holes=holes)


def _of_sealed(name: str, folder: Path, held: Held, most: int) -> News:
    """What is lacking of every file; of a segment that was held open, mostly the last rows."""
    stamp = _stamp(folder / "zarr.json")
    pieces: list[Piece] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = str(path.relative_to(folder))
        begin, end = held.lengths.get(file, 0), path.stat().st_size
        if file in _JOURNALLED or path.suffix == ".tmp" or begin >= end:
            continue
        if most <= 0:
            return News(name=name, pieces=pieces)
        pieces.append(_read(folder, file, begin, min(end, begin + most)))
        most -= len(pieces[-1].content)
        if pieces[-1].offset + len(pieces[-1].content) < end:
            return News(name=name, pieces=pieces)
    return News(name=name, pieces=pieces, sealed=stamp)


def _read(folder: Path, file: str, begin: int, end: int) -> Piece:
    with (folder / file).open("rb") as source:
        source.seek(begin)
        return Piece(file, begin, source.read(end - begin))


def _beside(store: Path) -> Iterator[Path]:
    for name in _BESIDE:
        yield from (path for path in sorted((store / name).rglob("*")) if path.is_file() and path.suffix != ".tmp")


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f"{path.name}.tmp")
    building.write_bytes(content)
    building.rename(path)
