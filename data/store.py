"""The replay store: trajectories of every source in one folder of plain Zarr v3 groups, committed by rename.

    <store>/zarr.json           attributes: schema, schema_version, embodiment, spec, statistics, fields
    <store>/seg/<number>/       one immutable segment per append (``data.segment``)
    <store>/cloned/<number>/    estimated behaviour of the episodes of a segment that were recorded without one
    <store>/superseded/<n>/     what a rollback moved away
    <store>/tmp/                segments being written; readers never look here

Segments are numbered in commit order and numbers are not used twice, so ``position`` names a prefix of the store.
A rename is atomic against a killed process; nothing is synced against power loss.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.segment import (
    SCHEMA_VERSION,
    Segment,
    field_table,
    read_attributes,
    write_array,
    write_group,
    write_segment,
)
from data.types import Behaviour, Spec, Statistics, Trajectory, UserError

SCHEMA = "wm-rl replay"


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """All committed episodes in commit order, one NumPy column per property, ``[episodes]`` each."""

    segment: np.ndarray
    """Name of the segment it lies in."""
    row: np.ndarray
    """Its index among the segment's episodes."""
    start: np.ndarray
    """Its first row in the segment's arrays."""
    length: np.ndarray
    """Control steps ``t``; the episode takes ``t + 1`` rows."""
    source: np.ndarray
    task: np.ndarray
    instruction: np.ndarray
    success: np.ndarray
    behaviour: np.ndarray
    """As read: ``cloned`` where an overlay labels an unknown one."""
    policy_version: np.ndarray
    """The newest version that acted."""
    world_model_version: np.ndarray

    def __len__(self) -> int:
        return len(self.segment)


class ReplayStore:
    """Append, read and roll back trajectories. Use ``create`` or ``open``.

    Several processes may append at once. A process sees others' segments after ``refresh``, its own at once.
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any]) -> None:
        self.path = path
        self.spec = Spec.from_dict(attributes["spec"])
        self.statistics = Statistics.from_dict(attributes["statistics"])
        self.embodiment: str = attributes["embodiment"]
        self.segments: list[Segment] = []
        self.generation = 0
        """Grows whenever a refresh changed something: what a reader caches its own tables by."""
        self._loaded: dict[str, tuple[tuple[int, int] | None, Segment]] = {}
        self.refresh()

    @staticmethod
    def create(path: str | Path, *, spec: Spec, statistics: Statistics, embodiment: str) -> ReplayStore:
        """Make an empty store. Raises ``UserError`` when the folder holds something already."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"cannot create a replay store: {path} exists already; choose another folder")
        attributes = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "embodiment": embodiment,
                      "spec": spec.to_dict(), "statistics": statistics.to_dict(), "cameras": list(spec.cameras),
                      "fields": field_table(spec)}
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
        write_group(building, attributes)
        for name in ("seg", "cloned", "superseded", "tmp"):
            write_group(building / name, {})
        building.rename(path)
        return ReplayStore(path, attributes)

    @staticmethod
    def open(path: str | Path) -> ReplayStore:
        """Open a store. Raises ``UserError`` when there is none, or one of another schema version; changes nothing."""
        path = Path(path)
        try:
            attributes = read_attributes(path)
        except (OSError, ValueError, KeyError):
            attributes = {}
        if attributes.get("schema") != SCHEMA:
            raise UserError(f"no replay store at {path}: expected a folder written by this project, found "
                            f"{'another folder' if path.is_dir() else 'nothing'}; check store=<folder>")
        if attributes["schema_version"] != SCHEMA_VERSION:
            raise UserError(f"the replay store {path} has schema version {attributes['schema_version']}, this code "
                            f"reads version {SCHEMA_VERSION}; use the code that wrote it, or another store=<folder>")
        return ReplayStore(path, attributes)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    @property
    def position(self) -> int:
        """Number of committed segments seen: what a checkpoint records and ``rollback`` returns to."""
        return len(self.segments)

    def append(self, trajectories: Sequence[Trajectory]) -> str:
        """Commit the trajectories as one segment, all or nothing, and return its name.

        Raises ``UserError`` for another embodiment, ``ValueError`` for rows that do not fit the store's spec.
        """
        if not trajectories:
            raise ValueError("append needs at least one trajectory, got none")
        for trajectory in trajectories:
            self._check(trajectory)

        def write(path: Path) -> None:
            write_segment(path, trajectories, self.spec)

        name = self._commit(write, lambda: self.path / "seg" / f"{self._next_number():08d}")
        self.refresh()
        return name

    def label_behaviour(
        self, segment: str, *, action_token: np.ndarray, log_prob: np.ndarray, decision: np.ndarray, model: str
    ) -> None:
        """Give the episodes of ``segment`` whose behaviour is unknown an estimated one; they then read as ``cloned``.

        ``action_token`` and ``log_prob`` are ``[rows, a]`` and ``decision`` ``[rows]``, one row per row of the
        segment: step ``i`` of episode ``e`` is row ``episodes.start[e] + i``. Rows of final observations and of
        episodes with a known behaviour are ignored. ``model`` says what estimated them. A later label replaces
        an earlier one, which is moved to ``superseded/``; the segment itself never changes.
        """
        recorded = Segment(self.path / "seg" / segment, self.spec, None)
        values = {"action_token": action_token, "log_prob": log_prob, "decision": decision}
        for name, value in values.items():
            if value.shape != recorded.columns[name].shape:
                raise ValueError(f"{name} has shape {value.shape}, expected {recorded.columns[name].shape}")
        unknown = recorded.unknown_rows()
        if not np.isfinite(log_prob[unknown]).all() or (action_token[unknown] < 0).any():
            raise ValueError(f"the behaviour of segment {segment} has steps without a finite log_prob or a token")

        def write(path: Path) -> None:
            write_group(path, {"schema_version": SCHEMA_VERSION, "model": model})
            fields = field_table(self.spec)
            for name, value in values.items():
                write_array(path / name, [value], dtype=fields[name]["dtype"], dimensions=fields[name]["dimensions"])

        target = self.path / "cloned" / segment
        if target.exists():
            target.rename(self._superseded() / "cloned" / segment)
        self._commit(write, lambda: target)
        self.refresh()

    def refresh(self) -> None:
        """See what other writers committed, labelled or rolled back since."""
        names = sorted(entry.name for entry in os.scandir(self.path / "seg") if entry.is_dir())
        loaded = {}
        for name in names:
            overlay = self.path / "cloned" / name
            stamp = _stamp(overlay / "zarr.json")
            known = self._loaded.get(name)
            if known is None or known[0] != stamp:
                known = (stamp, Segment(self.path / "seg" / name, self.spec, overlay if stamp else None))
            loaded[name] = known
        if not self.generation or [segment for _, segment in loaded.values()] != self.segments:
            self._show(loaded)

    def _show(self, loaded: dict[str, tuple[Any, Segment]]) -> None:
        segments = [segment for _, segment in loaded.values()]
        self._loaded, self.segments = loaded, segments
        self.episodes = _table(segments)
        self._segment_of = np.repeat(np.arange(len(segments)), [len(s.lengths) for s in segments])
        self.generation += 1

    def locate(self, index: int) -> tuple[Segment, int]:
        """The segment that episode ``index`` lies in, and its index there."""
        return self.segments[self._segment_of[index]], int(self.episodes.row[index])

    def trajectory(self, index: int) -> Trajectory:
        """Episode ``index``, bit for bit as appended (behaviour columns from the overlay where it is cloned)."""
        segment, row = self.locate(index)
        return segment.trajectory(row, self.spec.cameras)

    def column(self, index: int, field: str) -> np.ndarray:
        """Rows ``[t + 1, ...]`` of one field of episode ``index``, without a copy; do not write to it.

        ``field`` is a field of ``Trajectory`` or ``rgb_<camera>``. The last row is the final observation's.
        """
        segment, row = self.locate(index)
        start, length = segment.starts[row], segment.lengths[row]
        return segment.columns[field][start : start + length + 1]

    def provenance(self, index: int) -> dict[str, Any]:
        """Where episode ``index`` came from."""
        segment, row = self.locate(index)
        return segment.episodes[row]["provenance"]

    def at(self, position: int) -> ReplayStore:
        """The store as it was when ``position`` segments were committed, to read from; what follows stays hidden."""
        earlier = ReplayStore(self.path, {"spec": self.spec.to_dict(), "statistics": self.statistics.to_dict(),
                                          "embodiment": self.embodiment})
        earlier._show(dict(list(self._loaded.items())[:position]))
        return earlier

    def rollback(self, position: int) -> list[str]:
        """Move segments committed after ``position``, with their overlays, to ``superseded/<n>/``; return their names.

        What a resumed run does with what was appended after its checkpoint. Nothing is deleted.
        """
        self.refresh()
        if position > self.position:
            raise UserError(f"the checkpoint was written with {position} segments in the replay store, {self.path} "
                            f"has {self.position}; restore the store, or start a new run")
        names = [segment.name for segment in self.segments[position:]]
        if names:
            target = self._superseded()
            for name in reversed(names):  # the newest first: if killed here, what is left is still a prefix
                if (self.path / "cloned" / name).exists():
                    (self.path / "cloned" / name).rename(target / "cloned" / name)
                (self.path / "seg" / name).rename(target / "seg" / name)
            self.refresh()
        return names

    def summary(self) -> list[dict[str, Any]]:
        """Episodes and steps by source, task, behaviour and success, in a fixed order."""
        episodes, steps = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
        names = ("source", "task", "behaviour", "success")
        columns = (getattr(self.episodes, name).tolist() for name in names)
        for *group, length in zip(*columns, self.episodes.length.tolist(), strict=True):
            episodes[tuple(group)] += 1
            steps[tuple(group)] += length
        return [{**dict(zip(names, group, strict=True)), "episodes": count, "steps": steps[group]}
                for group, count in sorted(episodes.items())]

    def _check(self, trajectory: Trajectory) -> None:
        if trajectory.embodiment != self.embodiment:
            raise UserError(f"the replay store {self.path} holds embodiment {self.embodiment!r}, got a trajectory of "
                            f"{trajectory.embodiment!r}; use one store per embodiment: store=<folder>")
        if set(trajectory.frames) != set(self.spec.cameras):
            raise ValueError(f"expected cameras {sorted(self.spec.cameras)}, got {sorted(trajectory.frames)}")
        for name, field in field_table(self.spec).items():
            camera = name.removeprefix("rgb_")
            value = trajectory.frames[camera] if name.startswith("rgb_") else getattr(trajectory, name)
            if list(value.shape[1:]) != field["shape"] or value.dtype != np.dtype(field["dtype"]):
                raise ValueError(f"{name}: expected rows of {field['shape']} {np.dtype(field['dtype'])}, "
                                 f"got {list(value.shape[1:])} {value.dtype}")
        for name in ("proprio", "action", "reward", "uncertainty", "timestamp"):
            if not np.isfinite(getattr(trajectory, name)).all():
                raise ValueError(f"{name} has values that are not finite")
        known = trajectory.behaviour is not Behaviour.UNKNOWN
        if known and not (np.isfinite(trajectory.log_prob).all() and (trajectory.action_token >= 0).all()):
            raise ValueError(f"behaviour is {trajectory.behaviour.value}, but some steps have no log_prob or no token")

    def _commit(self, write: Callable[[Path], None], target: Callable[[], Path]) -> str:
        """Write a group into ``tmp/``, then rename it to ``target``, which must not exist; returns its name."""
        temporary = self.path / "tmp" / uuid.uuid4().hex
        try:
            write(temporary)
            while True:
                place = target()
                try:
                    temporary.rename(place)
                    return place.name
                except OSError:
                    if not place.exists():  # not another writer who took this number first
                        raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _next_number(self) -> int:
        taken = [*self.path.glob("seg/[0-9]*"), *self.path.glob("superseded/*/seg/[0-9]*")]
        return 1 + max((int(path.name) for path in taken), default=-1)

    def _superseded(self) -> Path:
        """A new folder ``superseded/<n>`` with groups ``seg`` and ``cloned``."""
        parent = self.path / "superseded"
        path = parent / str(sum(entry.is_dir() for entry in os.scandir(parent)))
        write_group(path, {})
        for name in ("seg", "cloned"):
            write_group(path / name, {})
        return path


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells one version of a file from the next; None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _table(segments: Sequence[Segment]) -> Episodes:
    def words(name: str) -> np.ndarray:
        return np.array([episode[name] for segment in segments for episode in segment.episodes], dtype=str)

    def numbers(columns: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int64), *columns])

    return Episodes(
        segment=np.array([segment.name for segment in segments for _ in segment.episodes], dtype=str),
        row=numbers([np.arange(len(segment.episodes)) for segment in segments]),
        start=numbers([segment.starts for segment in segments]),
        length=numbers([segment.lengths for segment in segments]),
        source=words("source"), task=words("task"), instruction=words("instruction"), success=words("success"),
        behaviour=np.array([behaviour.value for segment in segments for behaviour in segment.behaviours], dtype=str),
        policy_version=numbers([np.maximum.reduceat(segment.columns["policy_version"], segment.starts)
                                for segment in segments]),
        world_model_version=words("world_model_version").astype(np.int64),
    )


