"""What is demanded of a store once all writers are dead and it was recovered."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from data.crash_content import FLOOR, Witness, config, episode
from data.layout import field_table, read_array
from data.segment import Segment, checksum
from data.store import ReplayStore
from data.types import Source

LAST_WRITER = 999
"""Appends after the last kill, to show that writing can go on."""

Acknowledged = tuple[int, str, int, int, str]
"""Writer, source, number of the first episode, episodes, segment."""


def check(path: Path, acknowledged: Sequence[Acknowledged]) -> dict[str, Any]:
    """Everything acknowledged is there bit for bit, or was evicted by the rules; the files are what they should be."""
    store = ReplayStore.open(path, config())
    problems = Witness(store, 0).look()
    visible = {(said["writer"], said["source"], said["number"]) for said in map(store.provenance, range(len(store)))}
    gone = store.evicted()
    missing = [(writer, source, number, name) for writer, source, first, count, name in acknowledged
               for number in range(first, first + count) if (writer, source, number) not in visible]
    for writer, source, number, name in missing:
        if name not in gone or source == Source.REAL.value:
            problems.append(f"lost: number {number} of writer {writer}, source {source}, segment {name}")
    if any(source == Source.IMAGINED.value for _, source, _, _ in missing):
        left = sum(_size(segment.path) for segment in store.segments if _source(store, segment) == Source.IMAGINED)
        if left < FLOOR:
            problems.append(f"lost: {left} bytes of imagined episodes were left, the floor is {FLOOR}")
    for place, segment in enumerate(store.segments):
        problems += _compare_checksums(segment)
        if place == len(store.segments) // 2:
            problems += _compare_with_zarr(segment)
    return {"problems": [*problems, *_tidy(store), *_go_on(store)], "evicted": len(missing)}


def _source(store: ReplayStore, segment: Segment) -> str:
    return store.episodes.source[np.flatnonzero(store.episodes.segment == segment.name)[0]]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _compare_checksums(segment: Segment) -> Iterable[str]:
    names = list(field_table(segment.spec))
    checks = read_array(segment.path / "crc32c", "<u4", (len(segment), len(names)))
    for row, (start, length) in enumerate(segment.table[:, :2].tolist()):
        for name, expected in zip(names, checks[row].tolist(), strict=True):
            if checksum(segment.columns[name][start : start + length + 1]) != expected:
                yield f"torn: checksum of {name}, segment {segment.name}, episode {row}"


def _compare_with_zarr(segment: Segment) -> Iterable[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group: Any = zarr.open_group(segment.path, mode="r")
        names = {*field_table(segment.spec), "episode", "crc32c", "provenance"}
        if set(group.array_keys()) != names:
            yield f"torn: Zarr sees the arrays {sorted(group.array_keys())} in segment {segment.name}"
        for name, column in segment.columns.items():
            read = group[name][:]
            if read.dtype != column.dtype or read.tobytes() != column.tobytes():
                yield f"torn: Zarr reads {name} of segment {segment.name} differently"


def _tidy(store: ReplayStore) -> Iterable[str]:
    budget, used = config().budget_bytes, store.used_bytes()
    if budget is not None and used > budget:
        yield f"error: {used} bytes are used, the budget is {budget}"
    if opened := [entry.name for entry in os.scandir(store.path / "open") if entry.is_dir()]:
        yield f"error: the segments {opened} are still open"
    for file in (store.path / "seg").rglob("*.tmp"):
        yield f"error: {file.relative_to(store.path)} was left behind"


def _go_on(store: ReplayStore) -> Iterable[str]:
    before = len(store)
    store.append([episode(LAST_WRITER, Source.SIM, number, 0, 3) for number in range(3)])
    store.close()
    again = ReplayStore.open(store.path)
    if not any(said["writer"] == LAST_WRITER for said in map(again.provenance, range(len(again)))):
        yield f"error: {before} episodes, and an append to them is not there"
    if left := [entry.name for entry in os.scandir(store.path / "tmp") if entry.is_dir()]:
        yield f"error: {len(left)} folders were left in tmp"
    yield from Witness(again, 0).look()
