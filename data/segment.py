"""One segment of a replay store: a run of episodes of one source, written as a log, then sealed as a Zarr v3 group.

    open/<number>/   journal, header.json, <column>/c.0…   being written; the columns' files are as long as they may get
    seg/<number>/    zarr.json, <column>/…, episode, crc32c, provenance     sealed: it never changes again

An episode's rows are written before its journal record, so a record means that the rows are there. An episode of ``t``
control steps takes ``t + 1`` rows; its last row holds the final observation and no action.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data import journal
from data.compressed import open_compressed
from data.layout import (
    ACTED,
    EPISODE,
    FINAL,
    OBSERVED,
    SCHEMA_VERSION,
    WORDS,
    chunk_file,
    field_table,
    read_array,
    read_attributes,
    row_bytes,
    shard_bytes,
    shard_index,
    sign,
    write_array,
    write_column_metadata,
    write_group,
    write_json,
)
from data.mapping import map_file
from data.types import Behaviour, Source, Spec, Success, Trajectory, UserError

_COLUMN = {name: i for i, name in enumerate(EPISODE)}
LEFTOVER = "segment-"
"""What a folder in ``tmp/`` begins with that is of no use unless the process that holds the store's lock moves it."""


class Segment:
    """A segment as a reader sees it: tables in memory, columns mapped. ``refresh`` sees what an open one has gained."""

    def __init__(self, path: Path, spec: Spec) -> None:
        """Raises ``FileNotFoundError`` when it was moved meanwhile, ``UserError`` when it is damaged."""
        self.path, self.name, self.spec = path, path.name, spec
        self.sealed = path.parent.name == "seg"
        self.tier = "hot"
        self.repaired: dict[str, list[int]] = {}
        """The episodes of damaged segments that these are (``data.repair``)."""
        self.columns: dict[str, Any] = {}
        """Arrays ``[rows, ...]``; those of frames are ``CompressedColumn`` in a cold segment."""
        self.words: dict[str, dict[str, int]] = {"task": {}, "instruction": {}}
        """Code of every task and instruction of this segment, in the order of the codes."""
        self.labelled: dict[int, dict[str, Any]] = {}
        """Episodes whose success is a model's opinion, and whose (``data.outcome_labels``)."""
        self._records: list[dict[str, Any]] = []
        self._offset = 0
        self.table = np.empty((0, len(EPISODE)), np.int64)
        """``[episodes, columns]``, the columns named by ``EPISODE``."""
        if self.sealed:
            self._load()
        else:
            self._fields = field_table(spec)
            self.refresh()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def rows(self) -> int:
        """Rows of the committed episodes."""
        return int(self.table[-1, 0] + self.table[-1, 1] + 1) if len(self.table) else 0

    @property
    def starts(self) -> np.ndarray:
        """First row of each episode."""
        return self.table[:, _COLUMN["start"]]

    @property
    def lengths(self) -> np.ndarray:
        """Control steps of each episode."""
        return self.table[:, _COLUMN["length"]]

    def refresh(self) -> None:
        """See what was committed to an open segment since."""
        if self.sealed:
            return
        records, self._offset = journal.read(self.path / "journal", self._offset)
        episodes = [episode for record in records for episode in record]
        if not episodes:
            return
        self._records += episodes
        rows = [describe(episode, self.words) for episode in episodes]
        self.table = np.concatenate([self.table, np.array(rows, np.int64)])
        for name, field in self._fields.items():
            if len(self.columns.get(name, ())) < self.rows:
                file = chunk_file(self.path / name, 1 + len(field["shape"]))
                try:
                    room = file.stat().st_size // max(row_bytes(field), 1)
                    self.columns[name] = map_file(file, field["dtype"], (room, *field["shape"]))
                except ValueError:  # it is being sealed: its files are cut to their last row
                    self.columns[name] = map_file(file, field["dtype"], (self.rows, *field["shape"]))

    def provenance(self, row: int) -> dict[str, Any]:
        """Where episode ``row`` came from; ``outcome_label`` says which model gave its success, where one did."""
        if not self.sealed:
            return self._records[row]["provenance"]
        end = self.table[:, _COLUMN["provenance_end"]]
        begin = int(end[row - 1]) if row else 0
        facts = json.loads(self._provenance[begin : end[row]].tobytes())
        return facts | ({"outcome_label": self.labelled[row]} if row in self.labelled else {})

    @cached_property
    def _provenance(self) -> np.ndarray:
        end = int(self.table[-1, _COLUMN["provenance_end"]])
        return map_file(chunk_file(self.path / "provenance", 1), "|u1", (end,))

    def unknown_rows(self) -> np.ndarray:
        """``[rows]`` bool: control steps of episodes whose recorded behaviour is unknown."""
        mask = np.zeros(self.rows, bool)
        unknown = WORDS["behaviour"].index(Behaviour.UNKNOWN)
        for start, length, behaviour in self.table[:, [0, 1, _COLUMN["behaviour"]]].tolist():
            mask[start : start + length] = behaviour == unknown
        return mask

    def lay_over(self, overlay: Path) -> None:
        """Give the episodes of unknown behaviour the estimated one of an overlay group."""
        unknown = self.unknown_rows()
        for name in ("action_token", "log_prob", "decision"):
            shape = (self.rows, *self.columns[name].shape[1:])
            column = self.columns[name][: self.rows].copy()
            column[unknown] = read_array(overlay / name, ACTED[name], shape)[unknown]
            self.columns[name] = column
        known = self.table[:, _COLUMN["behaviour"]] != WORDS["behaviour"].index(Behaviour.UNKNOWN)
        self.table = self.table.copy()
        self.table[~known, _COLUMN["behaviour"]] = WORDS["behaviour"].index(Behaviour.CLONED)
        counts = np.add.reduceat(self.columns["decision"].astype(np.int64), self.starts)
        self.table[~known, _COLUMN["decisions"]] = counts[~known]

    def trajectory(self, row: int) -> Trajectory:
        """Episode ``row``, copied out of the segment."""
        start, steps = self.table[row, :2].tolist()
        values: dict[str, Any] = {name: np.array(self.columns[name][start : start + steps]) for name in ACTED}
        values |= {name: np.array(self.columns[name][start : start + steps + 1]) for name in OBSERVED}
        frames = {camera: np.array(self.columns[f"rgb_{camera}"][start : start + steps + 1])
                  for camera in self.spec.cameras}
        episode = dict(zip(EPISODE, self.table[row].tolist(), strict=True))
        words = {name: list(codes)[episode[name]] for name, codes in self.words.items()}
        return Trajectory(
            frames=frames, **values, source=Source(WORDS["source"][episode["source"]]),
            success=Success(WORDS["success"][episode["success"]]),
            behaviour=Behaviour(WORDS["behaviour"][episode["behaviour"]]), embodiment=self.embodiment,
            world_model_version=episode["world_model_version"], provenance=self.provenance(row), **words)

    @property
    def embodiment(self) -> str:
        """Of all its episodes."""
        return self._embodiment if self.sealed else self._records[0]["embodiment"]

    def _load(self) -> None:
        """Read a sealed segment, again when a compressed one took its place meanwhile (``data.cold``)."""
        while True:
            folder = self.path.stat().st_ino
            try:
                self._read()
            except (FileNotFoundError, ValueError, KeyError) as error:
                if self.path.stat().st_ino == folder:
                    raise UserError(f"damaged segment: {self.path}: {error}; restore it, or type python main.py store "
                                    f"action=verify repair=true store={self.path.parent.parent}") from None
            else:
                if self.path.stat().st_ino == folder:
                    return

    def _read(self) -> None:
        attributes = read_attributes(self.path)
        self.tier, self.repaired = attributes["tier"], attributes.get("repaired", {})
        self.words = {name: {word: i for i, word in enumerate(attributes[name])} for name in self.words}
        self._embodiment = attributes["embodiment"]
        self.table = read_array(self.path / "episode", "<i8", (attributes["episodes"], len(EPISODE)))
        self.__dict__.pop("_provenance", None)
        _ = self._provenance  # mapped now, as the columns are: the segment may be evicted before it is read
        for name, field in field_table(self.spec).items():
            if self.tier == "cold" and name.startswith("rgb_"):
                codec = attributes["codec"]["name"]
                self.columns[name] = open_compressed(self.path, name, field, self.rows, codec)
                continue
            file = chunk_file(self.path / name, 1 + len(field["shape"]))
            # Zarr reads a missing shard as fill values without an error, so its size is compared.
            found, expected = file.stat().st_size if file.exists() else 0, shard_bytes(field, self.rows)
            if found != expected:
                raise ValueError(f"{file} should have {expected} bytes, found {found}")
            self.columns[name] = map_file(file, field["dtype"], (self.rows, *field["shape"]))


class SegmentWriter:
    """The one owner of an open segment. ``commit`` is all or nothing; ``seal`` ends it."""

    def __init__(self, folder: Path, descriptor: int, spec: Spec, *, sync: bool) -> None:
        """Use ``begin``."""
        self.folder, self.name, self.spec, self.sync = folder, folder.name, spec, sync
        self._journal, self._offset = descriptor, 0
        self._fields = field_table(spec)
        self.capacity: int = json.loads((folder / "header.json").read_text())["capacity"]
        self._files = {name: os.open(chunk_file(folder / name, 1 + len(field["shape"])), os.O_RDWR)
                       for name, field in self._fields.items()}
        self.rows = self.episodes = 0

    @staticmethod
    def prepare(folder: Path, spec: Spec, *, source: Source, capacity: int) -> int:
        """Write an empty segment of ``capacity`` rows where nobody looks, and return its locked journal.

        The caller renames the folder to where readers look, then makes the writer.
        """
        folder.mkdir(parents=True)
        for name, field in field_table(spec).items():
            (folder / name).mkdir()
            with chunk_file(folder / name, 1 + len(field["shape"])).open("wb") as file:
                file.truncate(capacity * row_bytes(field))  # a hole: it takes room as it is filled
        write_json(folder / "header.json", {"schema_version": SCHEMA_VERSION, "source": source.value,
                                            "capacity": capacity})
        descriptor = os.open(folder / "journal", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor

    def commit(self, trajectories: Sequence[Trajectory], commit_times: Sequence[int]) -> None:
        """Write the rows, then the journal record: acknowledged means recoverable.

        ``commit_times``: ns since 1970. Raises ``OSError`` (a full disk) with nothing committed; the next commit
        overwrites what was written.
        """
        checksums = {name: self._write_column(name, trajectories) for name in self._fields}
        rows, episodes = self.rows, []
        for i, (trajectory, commit_time) in enumerate(zip(trajectories, commit_times, strict=True)):
            own = {name: column[i] for name, column in checksums.items()}
            episodes.append(_record(trajectory, rows, commit_time, own))
            rows += len(trajectory) + 1
        if self.sync:
            for descriptor in self._files.values():
                os.fdatasync(descriptor)
        self._offset = journal.append(self._journal, self._offset, journal.encode(episodes))
        self.rows = rows
        self.episodes += len(episodes)
        if self.sync:
            os.fdatasync(self._journal)  # when this fails the record may be there: its rows must stay

    def seal(self) -> None:
        """Make it a Zarr group and move it to ``seg/``."""
        self._close_files()
        try:
            _seal(self.folder, self.spec, sync=self.sync)
        finally:
            os.close(self._journal)  # sealed, or anyone's to recover

    def _close_files(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _write_column(self, name: str, trajectories: Sequence[Trajectory]) -> list[int]:
        """Write a column's next rows; returns the CRC-32C of each episode's."""
        field = self._fields[name]
        parts = [_rows(trajectory, name, field["dtype"]) for trajectory in trajectories]
        whole = parts if name.startswith("rgb_") else [np.concatenate(parts)]  # many small writes are slow
        journal.write_all(self._files[name], whole, self.rows * row_bytes(field))
        return [checksum(part) for part in parts]


def checksum(values: np.ndarray) -> int:
    """CRC-32C of an array's bytes in C order."""
    content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    content.flags.writeable = False
    return google_crc32c.value(content)  # type: ignore[arg-type]  # it takes any read-only buffer


def describe(episode: Mapping[str, Any], words: dict[str, dict[str, int]]) -> list[int]:
    """The ``EPISODE`` columns of a journal record; new tasks and instructions get the next code."""
    row = []
    for name in EPISODE:
        if name in WORDS:
            row.append(WORDS[name].index(episode[name]))
        elif name in words:
            row.append(words[name].setdefault(episode[name], len(words[name])))
        else:
            row.append(episode.get(name, 0))
    return row


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[bool]:
    """Hold an open segment that its writer left behind; false when it is still being written, or gone."""
    try:
        descriptor = os.open(folder / "journal", os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(descriptor) and folder.exists()  # its writer may have sealed it in between
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def recover(folder: Path, spec: Spec, *, sync: bool) -> bool:
    """Seal a segment whose writer died: all acknowledged episodes, nothing else. False when its writer lives."""
    with owned(folder) as mine:
        if mine:
            _seal(folder, spec, sync=sync)
        return mine


def _seal(folder: Path, spec: Spec, *, sync: bool) -> None:
    """Whatever a killed earlier attempt left is written over: the journal alone says what there is."""
    records, end = journal.read(folder / "journal")
    os.truncate(folder / "journal", end)
    episodes = [episode for record in records for episode in record]
    store = folder.parent.parent
    if not episodes:
        trash = store / "tmp" / f"{LEFTOVER}{uuid.uuid4().hex}"
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
        return
    words: dict[str, dict[str, int]] = {"task": {}, "instruction": {}}
    provenance, end = [], 0
    for episode in episodes:
        provenance.append(json.dumps(episode["provenance"]).encode())
        end += len(provenance[-1])
        episode["provenance_end"] = end
    table = np.array([describe(episode, words) for episode in episodes], np.int64)
    rows = int(table[-1, 0] + table[-1, 1] + 1)
    fields = field_table(spec)
    for name, field in fields.items():
        file = chunk_file(folder / name, 1 + len(field["shape"]))
        data, index = rows * row_bytes(field), shard_index(field, rows)
        with file.open("r+b") as handle:
            handle.truncate(data)
            handle.truncate(shard_bytes(field, rows) - len(index))  # pads the last chunk with zeros
            handle.seek(0, os.SEEK_END)
            handle.write(index)
        write_column_metadata(folder / name, field, rows)
    write_array(folder / "episode", table, dtype="<i8", dimensions=["episode", "episode_column"])
    checks = np.array([[episode["crc32c"][name] for name in fields] for episode in episodes])
    write_array(folder / "crc32c", checks, dtype="<u4", dimensions=["episode", "column"])
    write_array(folder / "provenance", np.frombuffer(b"".join(provenance), np.uint8), dtype="|u1",
                dimensions=["byte"])
    write_group(folder, sign(folder, {
        "tier": "hot", "schema_version": SCHEMA_VERSION, "episodes": len(episodes), "rows": rows, "embodiment":
        episodes[0]["embodiment"], "episode_source": episodes[0]["source"],
        "episode_columns": list(EPISODE), "crc32c_columns": list(fields), **WORDS,
        **{name: list(codes) for name, codes in words.items()}}, unsigned=fields))
    if sync:
        sync_tree(folder)
    sealed = folder.rename(store / "seg" / folder.name)
    for name in ("header.json", "journal"):  # all they said is in the group
        (sealed / name).unlink(missing_ok=True)  # another may tidy up
    if sync:
        for parent in (store / "seg", store / "open"):
            sync_file(parent)


def sync_tree(folder: Path) -> None:
    """Everything below the folder is on the disk when this returns."""
    for path in [*folder.rglob("*"), folder]:
        sync_file(path)


def sync_file(path: Path) -> None:
    """A file's or a folder's content is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _record(trajectory: Trajectory, start: int, commit_time: int, checksums: dict[str, int]) -> dict[str, Any]:
    words = {field.name: getattr(trajectory, field.name) for field in dataclasses.fields(trajectory)
             if field.name in ("source", "task", "instruction", "success", "behaviour", "embodiment",
                               "world_model_version")}
    return {**words, "start": start, "length": len(trajectory), "decisions": int(trajectory.decision.sum()),
            "policy_version": int(trajectory.policy_version.max()), "commit_time": commit_time, "crc32c": checksums,
            "provenance": dict(trajectory.provenance)}


def _rows(trajectory: Trajectory, name: str, dtype: str) -> np.ndarray:
    if name.startswith("rgb_"):
        values = trajectory.frames[name.removeprefix("rgb_")]
    else:
        values = getattr(trajectory, name)
        if name not in OBSERVED:
            rows = np.empty((len(values) + 1, *values.shape[1:]), values.dtype)
            rows[:-1], rows[-1] = values, FINAL[name]
            values = rows
    return np.ascontiguousarray(values, dtype)
