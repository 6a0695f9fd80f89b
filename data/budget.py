"""How large a replay store may grow, and what goes first when it is full."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data import journal
from data.layout import read_attributes
from data.segment import LEFTOVER
from data.types import Source, UserError


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How a process writes to a store."""

    segment_bytes: int = 256 * 2**20
    """Size of a sealed segment, about."""
    durability: str = "process"
    """``process``: what was acknowledged survives a killed process. ``sync``: a power cut as well."""
    budget_bytes: int | None = None
    """The store's files never take more; the oldest segments go first. None: nothing is ever removed."""
    floor_bytes: Mapping[str, float] = field(default_factory=lambda: {Source.REAL.value: float("inf")})
    """For a source, how many of its newest bytes the budget must leave alone. Real logs are all kept by default."""

    def __post_init__(self) -> None:
        if self.durability not in ("process", "sync"):
            raise UserError(f"storage.durability: expected process or sync, got {self.durability!r}")
        if self.segment_bytes < 1:
            raise UserError(f"storage.segment_bytes: expected at least 1, got {self.segment_bytes}")
        if self.budget_bytes is not None and self.budget_bytes < 4 * self.segment_bytes:
            raise UserError(f"storage.budget_bytes: expected four segments or more, {4 * self.segment_bytes} bytes, "
                            f"got {self.budget_bytes}; raise it, or lower storage.segment_bytes={self.segment_bytes}")
        for source in self.floor_bytes:
            if source not in list(Source):
                raise UserError(f"storage.floor_bytes: expected sim, real or imagined, got {source!r}")


class Evicted:
    """The segments that a budget removed, as the store's journal names them."""

    def __init__(self, store: Path) -> None:
        self.file = store / "control" / "evicted"
        self._names: set[str] = set()
        self._end = 0

    def names(self) -> set[str]:
        """All so far. Only what was added since is read: there is a line for every segment that ever was removed."""
        if self.file.exists():
            records, self._end = journal.read(self.file, self._end)
            self._names |= {record["segment"] for record in records}
        return self._names

    def add(self, name: str, *, sync: bool) -> None:
        """Write one down, before it is removed."""
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self.names()
            journal.append(descriptor, self._end, journal.encode({"segment": name, "time": time.time_ns()}))
            if sync:
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def used_bytes(store: Path) -> int:
    """What the store's files take, open segments counted as if they were full."""
    return sum(tree_bytes(store / name) for name in ("seg", "open", "cloned", "outcome", "superseded", "tmp"))


def make_room(store: Path, size: int, config: StoreConfig, evicted: Evicted) -> None:
    """Evict the oldest segments until ``size`` more bytes fit the budget; the caller holds the store's lock.

    Raises ``UserError`` when they do not fit for all that may be removed.
    """
    if config.budget_bytes is None:
        return
    excess = used_bytes(store) + size - config.budget_bytes
    if excess <= 0:
        return
    for name, bytes_here in _movable(store, config.floor_bytes):
        _evict(store, name, evicted, sync=config.durability == "sync")
        excess -= bytes_here
        if excess <= 0:
            return
    raise UserError(f"the replay store {store} cannot make room: storage.budget_bytes={config.budget_bytes}, "
                    f"{used_bytes(store)} are used and what is left is kept by storage.floor_bytes or still being "
                    f"written; raise the budget, or lower storage.floor_bytes")


def _movable(store: Path, floor_bytes: Mapping[str, float]) -> list[tuple[str, int]]:
    """Name and size of the sealed segments that no floor keeps, oldest first."""
    kept: Counter[str] = Counter()
    movable = []
    for name in sorted((entry.name for entry in os.scandir(store / "seg") if entry.is_dir()), reverse=True):
        source = read_attributes(store / "seg" / name)["episode_source"]
        size = tree_bytes(store / "seg" / name)
        if kept[source] >= floor_bytes.get(source, 0):
            movable.append((name, size))
        kept[source] += size  # the newest of a source count towards its floor
    return movable[::-1]


def _evict(store: Path, name: str, evicted: Evicted, *, sync: bool) -> None:
    """Remove a sealed segment. Readers keep what they mapped until they refresh."""
    evicted.add(name, sync=sync)
    for place in (store / "seg" / name, store / "cloned" / name):
        if place.exists():
            trash = store / "tmp" / f"{LEFTOVER}{uuid.uuid4().hex}"
            place.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
    for mark in (store / "outcome" / f"{name}.json", store / "control" / "hidden" / name):
        mark.unlink(missing_ok=True)


def tree_bytes(folder: Path) -> int:
    """Sizes of all files below; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
