"""The replay store: trajectories of every source in one folder of plain Zarr v3 groups.

    <store>/zarr.json            attributes: schema, schema_version, embodiment, spec, statistics, cameras, fields
    <store>/open/<number>/       a segment being written, one per writer and source (``data.segment``)
    <store>/seg/<number>/        a sealed segment: it never changes again
    <store>/cloned/<number>/     estimated behaviour of the episodes of a segment that were recorded without one
    <store>/outcome/<number>.json  success that a model saw in episodes without a label (``data.outcome_labels``)
    <store>/superseded/<n>/      estimates and labels that later ones replaced, or that were taken back
    <store>/control/hidden/<number>   how many of a segment's episodes a rollback left visible
    <store>/control/evicted      journal of the segments that a byte budget removed
    <store>/tmp/                 what is not committed; readers never look here

Any number of processes may append; each owns the segments it writes. An append is acknowledged once its journal record
is written: a killed process loses nothing acknowledged, a power cut nothing with ``durability=sync``. Episodes are
numbered by commit time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import outcome_labels
from data.budget import Evicted, StoreConfig, make_room, used_bytes
from data.episodes import Episodes
from data.growing import Growing
from data.layout import (
    EPISODE,
    SCHEMA,
    SCHEMA_VERSION,
    WORDS,
    field_table,
    read_attributes,
    row_bytes,
    shard_bytes,
    write_array,
    write_group,
)
from data.segment import LEFTOVER, Segment, SegmentWriter, recover, sync_file, sync_tree
from data.types import Behaviour, Source, Spec, Statistics, Trajectory, UserError

_COLUMN = {name: i for i, name in enumerate(EPISODE)}
_SIDE_BYTES = 2**20
"""Room for a segment's journal, tables and metadata."""
_FOLDERS = ("seg", "open", "cloned", "superseded", "control", "tmp")

Position = Mapping[str, int]
"""What a reader saw: episodes of each segment. A checkpoint records it, ``rollback`` returns to it."""


class BeingWrittenError(UserError):
    """Another process is writing to the store."""


def store_attributes(path: Path) -> dict[str, Any]:
    """What a store says of itself. Raises ``UserError`` when there is none, or one of another schema version."""
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
    return attributes


class ReplayStore:
    """Append, read and roll back trajectories. Use ``create`` or ``open``, and ``close`` (or ``with``) after writing.

    A process sees others' episodes after ``refresh``, its own at once.
    """

    def __init__(
        self, path: Path, attributes: Mapping[str, Any], config: StoreConfig, *, outcome_labels: bool = False
    ) -> None:
        self.path, self.config, self.outcome_labels = path, config, outcome_labels
        self.spec = Spec.from_dict(attributes["spec"])
        self.statistics = Statistics.from_dict(attributes["statistics"])
        self.embodiment: str = attributes["embodiment"]
        self.generation = 0
        """Grows whenever a refresh changed something: what a reader caches its own tables by."""
        self.rebuilt = 0
        """Grows whenever episodes changed other than by new ones at the end."""
        self._frozen = False
        self._gone = Evicted(path)
        self._writers: dict[Source, SegmentWriter] = {}
        self._marks: dict[str, tuple[Any, Any, int | None]] = {}
        """Of every segment: which estimates, which labels of outcomes, and how many episodes a rollback left."""
        self._newest = 0
        """Latest commit time known."""
        self.segments: list[Segment] = []
        self._seen: dict[str, int] = {}
        """Place of every known segment in ``segments``."""
        self._shown: dict[str, int] = {}
        """How many of its episodes are in the table."""
        self._codes: dict[str, dict[str, int]] = {"task": {}, "instruction": {}}
        self._words: dict[str, list[str]] = {name: [] for name in self._codes}
        self._table = Growing((2 + len(EPISODE),))
        """Place of the segment, row in it, then the ``EPISODE`` columns."""
        self._publish()
        self.refresh()

    @staticmethod
    def create(
        path: str | Path, *, spec: Spec, statistics: Statistics, embodiment: str, config: StoreConfig | None = None
    ) -> ReplayStore:
        """Make an empty store. Raises ``UserError`` when the folder holds something already, or cannot be written."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"cannot create a replay store: {path} exists already; choose another folder")
        attributes = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "embodiment": embodiment,
                      "spec": spec.to_dict(), "statistics": statistics.to_dict(), "cameras": list(spec.cameras),
                      "sources": WORDS["source"], "fields": field_table(spec)}
        building = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_group(building, attributes)
            for name in _FOLDERS:
                write_group(building / name, {})
            (building / "control" / "hidden").mkdir()
            building.rename(path)
        return ReplayStore(path, attributes, config or StoreConfig())

    @staticmethod
    def open(path: str | Path, config: StoreConfig | None = None) -> ReplayStore:
        """Open a store. Raises ``UserError`` when there is none, or one of another schema version; changes nothing."""
        path = Path(path)
        attributes = store_attributes(path)
        return ReplayStore(path, attributes, config or StoreConfig())

    def __enter__(self) -> ReplayStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def position(self) -> dict[str, int]:
        """Episodes seen of each segment: what a checkpoint records and ``rollback`` returns to."""
        counts = np.bincount(self.episodes.place, minlength=len(self.segments))
        return {segment.name: int(count) for segment, count in zip(self.segments, counts, strict=True) if count}

    def refresh(self) -> None:
        """See what other writers committed, labelled or rolled back since."""
        if self._frozen:
            return
        listed = self._list()
        overlays = {entry.name: _stamp(Path(entry.path) / "zarr.json") for entry in os.scandir(self.path / "cloned")
                    if entry.is_dir()}
        hidden = {}
        for entry in os.scandir(self.path / "control" / "hidden"):
            with contextlib.suppress(FileNotFoundError):  # its segment is being evicted
                hidden[entry.name] = int(Path(entry.path).read_text())
        outcomes = {name: _stamp(self._labels(name)) if self.outcome_labels else None for name in listed}
        marks = {name: (overlays.get(name), outcomes[name], hidden.get(name)) for name in listed}
        # Evicted, labelled or rolled back.
        self._forget({name for name in self._seen
                      if name not in listed or marks[name] != self._marks.get(name, (None, None, None))})
        self._marks = marks
        fresh = []
        for name, folder in listed.items():
            try:
                fresh += self._look(name, folder)
            except FileNotFoundError:  # it moved meanwhile: sealed, or evicted
                with contextlib.suppress(FileNotFoundError):
                    fresh += self._look(name, self.path / "seg" / name)
        if fresh:
            self._add(np.concatenate(fresh))

    def locate(self, index: int) -> tuple[Segment, int]:
        """The segment that episode ``index`` lies in, and its index there."""
        episodes = self.episodes
        return self.segments[episodes.place[index]], int(episodes.row[index])

    def trajectory(self, index: int) -> Trajectory:
        """Episode ``index``, bit for bit as appended (behaviour columns from the overlay where it is cloned)."""
        segment, row = self.locate(index)
        return segment.trajectory(row)

    def column(self, index: int, field: str) -> np.ndarray:
        """Rows ``[t + 1, ...]`` of one field of episode ``index``, without a copy; read-only.

        ``field`` is a field of ``Trajectory`` or ``rgb_<camera>``. The last row is the final observation's.
        """
        segment, row = self.locate(index)
        start, length = segment.table[row, :2]
        return segment.columns[field][start : start + length + 1]

    def provenance(self, index: int) -> dict[str, Any]:
        """Where episode ``index`` came from."""
        segment, row = self.locate(index)
        return segment.provenance(row)

    def at(self, episodes: int) -> ReplayStore:
        """The store's first ``episodes`` episodes, to read from; what follows stays hidden."""
        return self.only(np.arange(min(episodes, len(self))))

    def only(self, episodes: np.ndarray) -> ReplayStore:
        """These episodes (indices, ascending), to read from; the others, and what is appended later, stay hidden."""
        view = ReplayStore.__new__(ReplayStore)
        view.__dict__.update(self.__dict__)
        view._writers, view._frozen = {}, True
        view.episodes = self.episodes.only(episodes)
        view.generation += 1
        return view

    def with_outcome_labels(self) -> ReplayStore:
        """The same store, to read from, with the success that a model saw where the recording has no label.

        It sees what others write after its own ``refresh``.
        """
        return ReplayStore(self.path, store_attributes(self.path), self.config, outcome_labels=True)

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

    # -- writing ----------------------------------------------------------------------------------------------------

    def append(self, trajectories: Sequence[Trajectory]) -> None:
        """Commit the trajectories, those of one source all or none; they are recoverable once this returns.

        Raises ``UserError`` for another embodiment, a full disk, a folder that cannot be written or a budget that is
        too small, ``ValueError`` for rows that do not fit the store's spec.
        """
        if not trajectories:
            raise ValueError("append needs at least one trajectory, got none")
        for trajectory in trajectories:
            self._check(trajectory)
        begin = max(time.time_ns(), self._newest + 1)
        for source in dict.fromkeys(trajectory.source for trajectory in trajectories):
            places = [i for i, trajectory in enumerate(trajectories) if trajectory.source is source]
            group = [trajectories[i] for i in places]
            with _writing(self.path):
                writer = self._writer(source, sum(len(trajectory) + 1 for trajectory in group))
                writer.commit(group, [begin + i for i in places])
                self._add(np.concatenate(self._look(writer.name, writer.folder)))

    def seal(self) -> None:
        """Seal this process's open segments; later appends begin new ones."""
        with _writing(self.path):
            for source in list(self._writers):
                self._writers.pop(source).seal()
        self.refresh()

    def close(self) -> None:
        """Seal what this process wrote. Only a convenience: the next writer seals what a killed one left."""
        if self._writers:
            self.seal()

    def label_behaviour(
        self, segment: str, *, action_token: np.ndarray, log_prob: np.ndarray, decision: np.ndarray, model: str
    ) -> None:
        """Give the episodes of a sealed segment whose behaviour is unknown an estimated one; they read as ``cloned``.

        ``action_token`` and ``log_prob`` are ``[rows, a]`` and ``decision`` ``[rows]``, one row per row of the
        segment: step ``i`` of episode ``e`` is row ``episodes.start[e] + i``. Rows of final observations and of
        episodes with a known behaviour or hidden by a rollback are ignored. ``model`` says what estimated them. A later
        label replaces an earlier one, which is moved to ``superseded/``; the segment itself never changes.
        """
        if not (self.path / "seg" / segment).is_dir():
            raise UserError(f"segment {segment} of {self.path} is still being written; label it once it is sealed")
        recorded = Segment(self.path / "seg" / segment, self.spec)
        fields = field_table(self.spec)
        values = {"action_token": action_token, "log_prob": log_prob, "decision": decision}
        for name, value in values.items():
            expected = (recorded.rows, *fields[name]["shape"])
            if value.shape != expected:
                raise ValueError(f"{name} has shape {value.shape}, expected {expected}")
        self.refresh()
        _, _, shown = self._marks.get(segment, (None, None, None))
        unknown = recorded.unknown_rows()
        if shown is not None and shown < len(recorded.starts):
            unknown[recorded.starts[shown] :] = False
        if not np.isfinite(log_prob[unknown]).all() or (action_token[unknown] < 0).any():
            raise ValueError(f"the behaviour of segment {segment} has steps without a finite log_prob or a token")
        with _writing(self.path):
            building = self.path / "tmp" / uuid.uuid4().hex
            write_group(building, {"schema_version": SCHEMA_VERSION, "model": model})
            for name, value in values.items():
                write_array(building / name, value, dtype=fields[name]["dtype"], dimensions=fields[name]["dimensions"])
            if self.config.durability == "sync":
                sync_tree(building)
            target = self.path / "cloned" / segment
            if target.exists():
                target.rename(self._superseded() / segment)
            building.rename(target)
        self.refresh()

    def rollback(self, position: Position) -> list[str]:
        """Hide what was committed after ``position``; return the names of the segments that hide something.

        What a resumed run does with what was appended after its checkpoint. Nothing is deleted. Raises
        ``BeingWrittenError`` when another process is writing, ``UserError`` when something of that position is lost
        (evicted segments aside).
        """
        self.close()
        self.recover()
        if writing := sorted(entry.name for entry in os.scandir(self.path / "open") if entry.is_dir()):
            raise BeingWrittenError(
                f"cannot roll {self.path} back: another process is writing segment {writing[0]}; stop it")
        now, gone, position = self.position, self.evicted(), self._after_repairs(position)
        for name, episodes in position.items():
            if now.get(name, 0) < episodes and name not in gone:
                raise UserError(f"the checkpoint was written with {episodes} episodes in segment {name} of {self.path},"
                                f" which has {now.get(name, 0)}; restore the store, or start a new run")
        names = [name for name, episodes in now.items() if episodes > position.get(name, 0)]
        with _writing(self.path):
            for name in names:
                building = self.path / "tmp" / uuid.uuid4().hex
                building.write_text(str(position.get(name, 0)))
                building.rename(self.path / "control" / "hidden" / name)
            if self.config.durability == "sync":
                sync_file(self.path / "control" / "hidden")
        self.refresh()
        return names

    def recover(self) -> None:
        """Seal what writers that died left open. Whoever begins a segment does this first."""
        with _writing(self.path):
            for entry in sorted(os.scandir(self.path / "open"), key=lambda entry: entry.name):
                if entry.is_dir():
                    recover(Path(entry.path), self.spec, sync=self.config.durability == "sync")
            for name in ("header.json", "journal"):  # of segments whose writer died just after sealing
                for file in (self.path / "seg").glob(f"*/{name}"):
                    file.unlink(missing_ok=True)
        self.refresh()

    def used_bytes(self) -> int:
        """What the store's files take, open segments counted as if they were full."""
        return used_bytes(self.path)

    def evicted(self) -> set[str]:
        """Names of the segments that a budget removed so far."""
        return self._gone.names()

    # -- inside: reading --------------------------------------------------------------------------------------------

    def _forget(self, names: set[str]) -> None:
        """Take segments out of the tables; one that is still there is then read anew. Earlier plans keep theirs."""
        if not names:
            return
        kept = [segment for segment in self.segments if segment.name not in names]
        moved = np.full(len(self.segments), -1)
        moved[[self._seen[segment.name] for segment in kept]] = np.arange(len(kept))
        table = self._table.values[moved[self._table.values[:, 0]] >= 0]
        table[:, 0] = moved[table[:, 0]]
        self._table = Growing((2 + len(EPISODE),))
        self._table.append(table)
        self.segments = kept
        self._seen = {segment.name: place for place, segment in enumerate(kept)}
        self._shown = {name: count for name, count in self._shown.items() if name in self._seen}
        self.rebuilt += 1
        self._publish()

    def _list(self) -> dict[str, Path]:
        """Every segment's folder. Open ones are listed first: one that is sealed meanwhile is then in both lists."""
        found: dict[str, Path] = {}
        for name in ("open", "seg"):
            found |= {entry.name: Path(entry.path) for entry in os.scandir(self.path / name) if entry.is_dir()}
        return dict(sorted(found.items()))

    def _labels(self, name: str) -> Path:
        return self.path / outcome_labels.FOLDER / f"{name}.json"

    def _look(self, name: str, folder: Path) -> list[np.ndarray]:
        """Rows of the table for what a segment shows that was not seen before."""
        place = self._seen.get(name)
        overlay, outcome, limit = self._marks.get(name, (None, None, None))
        if place is None or (folder.parent.name == "seg" and not self.segments[place].sealed):
            segment = Segment(folder, self.spec)
            if overlay is not None:
                try:
                    segment.lay_over(self.path / "cloned" / name)
                except (OSError, ValueError) as error:
                    if _stamp(self.path / "cloned" / name / "zarr.json") != overlay:  # the next refresh sees why
                        raise FileNotFoundError(self.path / "cloned" / name) from error
                    raise UserError(f"damaged estimates: {error}; restore them, or move the folder "
                                    f"{self.path / 'cloned' / name} away") from error
            if outcome is not None:
                try:
                    outcome_labels.lay_over(segment, self._labels(name))
                except ValueError as error:
                    raise UserError(f"damaged labels: {error}; move the file away, or type python main.py store "
                                    f"action=revoke_labels store={self.path}") from None
            if place is None:
                place = self._seen[name] = len(self.segments)
                self.segments.append(segment)
            self.segments[place] = segment
        else:
            segment = self.segments[place]
            segment.refresh()
        first, last = self._shown.get(name, 0), len(segment) if limit is None else min(limit, len(segment))
        if last <= first:
            return []
        self._shown[name] = last
        rows = np.empty((last - first, 2 + len(EPISODE)), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2:] = place, np.arange(first, last), segment.table[first:last]
        for word, known in self._codes.items():
            codes = [known.setdefault(text, len(known)) for text in segment.words[word]]
            if len(known) > len(self._words[word]):
                self._words[word] = list(known)
            rows[:, 2 + _COLUMN[word]] = np.array(codes)[rows[:, 2 + _COLUMN[word]]]
        return [rows]

    def _add(self, fresh: np.ndarray) -> None:
        """Put episodes in order of commit; nearly always they follow all that is known."""
        by_time = 2 + _COLUMN["commit_time"]
        if (np.diff(fresh[:, by_time]) < 0).any():
            fresh = fresh[np.argsort(fresh[:, by_time], kind="stable")]
        ordered = len(self._table) == 0 or fresh[0, by_time] >= self._table.values[-1, by_time]
        self._table.append(fresh)
        if not ordered:  # another writer's episodes became visible late
            known = self._table.values
            self._table = Growing((2 + len(EPISODE),))
            self._table.append(known[np.lexsort((known[:, 1], known[:, 0], known[:, by_time]))])
            self.rebuilt += 1
        self._newest = max(self._newest, int(fresh[-1, by_time]))
        self._publish()

    def _publish(self) -> None:
        self.episodes = Episodes(self._table.values, {**WORDS, **self._words}, self.segments)
        self.generation += 1

    # -- inside: writing --------------------------------------------------------------------------------------------

    def _check(self, trajectory: Trajectory) -> None:
        if trajectory.embodiment != self.embodiment:
            raise UserError(f"the replay store {self.path} holds embodiment {self.embodiment!r}, got a trajectory of "
                            f"{trajectory.embodiment!r}; use one store per embodiment: store=<folder>")
        if set(trajectory.frames) != set(self.spec.cameras):
            raise ValueError(f"expected cameras {sorted(self.spec.cameras)}, got {sorted(trajectory.frames)}")
        for name, description in field_table(self.spec).items():
            camera = name.removeprefix("rgb_")
            value = trajectory.frames[camera] if name.startswith("rgb_") else getattr(trajectory, name)
            if list(value.shape[1:]) != description["shape"] or value.dtype != np.dtype(description["dtype"]):
                raise ValueError(f"{name}: expected rows of {description['shape']} {np.dtype(description['dtype'])}, "
                                 f"got {list(value.shape[1:])} {value.dtype}")
        for name in ("proprio", "action", "reward", "uncertainty", "timestamp"):
            if not np.isfinite(getattr(trajectory, name)).all():
                raise ValueError(f"{name} has values that are not finite")
        known = trajectory.behaviour is not Behaviour.UNKNOWN
        if known and not (np.isfinite(trajectory.log_prob).all() and (trajectory.action_token >= 0).all()):
            raise ValueError(f"behaviour is {trajectory.behaviour.value}, but some steps have no log_prob or no token")

    def _writer(self, source: Source, rows: int) -> SegmentWriter:
        """The open segment of a source that this process writes, with room for ``rows`` more."""
        writer = self._writers.get(source)
        if writer is not None and writer.rows + rows > writer.capacity:
            self._writers.pop(source).seal()
            writer = None
        if writer is None:
            self.recover()
            writer = self._writers[source] = self._begin(source, rows)
        return writer

    def _begin(self, source: Source, rows: int) -> SegmentWriter:
        fields = field_table(self.spec).values()
        row = sum(map(row_bytes, fields))
        capacity = max(rows, self.config.segment_bytes // row)
        with self._locked():  # room that was made must not be taken by another writer
            for leftover in (self.path / "tmp").glob(f"{LEFTOVER}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            make_room(self.path, sum(shard_bytes(field, capacity) for field in fields) + _SIDE_BYTES, self.config,
                      self._gone)
            building = self.path / "tmp" / f"{LEFTOVER}{uuid.uuid4().hex}"
            descriptor = SegmentWriter.prepare(building, self.spec, source=source, capacity=capacity)
            folder = self.path / "open" / f"{self._next_number():08d}"
            building.rename(folder)
        if self.config.durability == "sync":
            sync_tree(folder)
            sync_file(folder.parent)
        return SegmentWriter(folder, descriptor, self.spec, sync=self.config.durability == "sync")

    def _after_repairs(self, position: Position) -> Position:
        """A position that counts the segments which took the place of damaged ones since."""
        moved = dict(position)
        for segment in self.segments:
            for name, episodes in segment.repaired.items():
                if name in position and segment.name not in position:
                    moved[segment.name] = sum(episode < position[name] for episode in episodes)
        return moved

    def _next_number(self) -> int:
        """Numbers are never used twice, so a name always means the same bytes."""
        return 1 + max((int(name) for name in [*self._list(), *self.evicted()]), default=-1)

    def _superseded(self) -> Path:
        """A new folder ``superseded/<n>``."""
        path = self.path / "superseded" / str(sum(e.is_dir() for e in os.scandir(self.path / "superseded")))
        write_group(path, {})
        return path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time begins segments and evicts them."""
        descriptor = os.open(self.path / "control" / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in one line why a store cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left for {path}: nothing of this append was stored, all earlier ones are; free "
                            "some, or give the store a budget: storage.budget_bytes=<bytes>") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"cannot write to {path}: {os.strerror(error.errno).lower()}; choose a folder that you may "
                            "write, or make this one writable") from error
        raise


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells one version of a file from the next; None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns
