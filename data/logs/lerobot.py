"""Read LeRobot sets, v2.1 and v3.0: a stream per feature, pictures from video or parquet, all on the nominal clock.

Metadata are compared with the files and not trusted: an episode that does not agree is refused, with a reason. Columns
``next.*`` speak of what follows a row, so they are stamped one step later. LeRobot's ``timestamp`` is computed from the
frame number; where it is not, it is a recorded clock, ``log``, beside the nominal one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float64

from data.lerobot import PICTURES, SUCCESS, file_sha256, is_lerobot, read_lerobot
from data.logs.pictures import encoded_picture, on_demand
from data.logs.streams import Kind, LogEpisode, Pictures, Refused, Stream
from data.logs.unchanged import see
from data.logs.video import VideoPictures, between, read_frames
from data.text import one_line, ranges
from data.types import Success

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
NUMBERS = ("float", "int", "uint", "bool")
"""How the dtypes of vectors begin."""
TASK = "task"
"""Name of the stream of sentences."""
DRIFT = 1e-3
"""Seconds by which a stamp may differ from the nominal one: float32 rounds it."""


class _UnusableError(Exception):
    """An episode that contradicts itself or its metadata. Its text is the reason."""


class LeRobotLog:
    """An opened set. Use ``open_log``."""

    def __init__(self, path: Path) -> None:
        """Read the metadata. Raises ``UserError`` when they are damaged."""
        self.path = path
        self.dataset = read_lerobot(path)
        self.format = f"LeRobot {self.dataset.version}"
        self._open_file: tuple[Path, pa.Table] | None = None

    def episodes(self) -> Iterator[LogEpisode | Refused]:
        """In the order of their numbers, then what is missing or named by nobody."""
        missing = []
        for index, entry in sorted(self.dataset.entries.items()):
            try:
                yield self._episode(index, entry)
            except FileNotFoundError:
                missing.append(index)
            except (_UnusableError, pa.ArrowException, OSError, ValueError, KeyError, TypeError) as reason:
                said = str(reason) if isinstance(reason, _UnusableError) else f"damaged ({one_line(reason)})"
                yield Refused(name=f"episode {index}", reason=said)
        if missing:
            yield Refused(name=f"episodes {ranges(missing)}", reason=f"{len(missing)} missing of "
                                                                     f"{len(self.dataset.entries)} that meta names")
        yield from (Refused(name=name, reason=why) for name, why in sorted(self.dataset.unlisted.items()))
        yield from self._unnamed_frames()

    def _episode(self, index: int, entry: Mapping[str, Any]) -> LogEpisode:
        dataset = self.dataset
        file = dataset.data_file(index)
        table = self._rows(file, index)
        if table.num_rows == 0 or table.num_rows != entry["length"]:
            raise _UnusableError(f"{self._relative(file)}: {table.num_rows} rows, meta says {entry['length']}; "
                                 "half-written?")
        problems: list[str] = []
        sentences = [dataset.tasks.get(number) for number in table["task_index"].to_pylist()]
        if None in sentences:
            raise _UnusableError(f"{self._relative(file)}: task_index {table['task_index'][sentences.index(None)]} is "
                                 "not in meta/tasks")
        clocks, later = self._clocks(table, file, problems)
        streams = {TASK: Stream(name=TASK, kind=Kind.TEXT, clocks=clocks, texts=tuple(map(str, sentences)))}
        videos = []
        for key, feature in dataset.features.items():
            try:
                if feature["dtype"] in PICTURES:
                    streams[key] = self._camera(index, key, file, table.num_rows, clocks)
                elif key not in BOOKKEEPING and feature["dtype"].startswith(NUMBERS) and len(feature["shape"]) == 1:
                    streams[key] = self._vector(table, key, later if key.startswith("next.") else clocks)
            except ValueError as reason:
                problems.append(f"{key}: {reason}")
            if feature["dtype"] == "video":
                videos.append(key)
        success, origin = self._success(entry, streams)
        return LogEpisode(
            name=f"episode {index}", streams=streams, instruction=str(sentences[0]), task=entry.get("task_name") or "",
            success=success, success_from=origin, marks=self._marks(success, streams), problems=tuple(problems),
            facts={"format": self.format, "set": self.path.resolve().name,
                   "recorded": json.loads(entry["provenance"]) if entry.get("provenance") else {}},
            sha256=self._sha256(index, file, videos))

    def _clocks(
        self, table: pa.Table, file: Path, problems: list[str]
    ) -> tuple[dict[str, Float64[np.ndarray, " r"]], dict[str, Float64[np.ndarray, " r"]]]:
        """Of the rows, and of what follows each of them. Raises ``_UnusableError``."""
        rows, step = table.num_rows, 1 / self.dataset.fps
        if (_numbers(table["frame_index"], 1)[:, 0] != np.arange(rows)).any():
            raise _UnusableError(f"{self._relative(file)}: frame_index does not count from 0 in steps of 1")
        stamps = _numbers(table["timestamp"], 1)[:, 0]
        if not (np.diff(stamps) > 0).all():
            raise _UnusableError(f"{self._relative(file)}: timestamps do not increase")
        nominal = np.arange(rows) / self.dataset.fps
        clocks, later = {"nominal": nominal}, {"nominal": np.arange(1, rows + 1) / self.dataset.fps}
        drift = np.abs(stamps - stamps[0] - nominal).max()
        if drift > DRIFT:
            problems.append(f"timestamp: up to {drift:.3g} s from frame_index / fps, so it is offered as clock log")
            clocks["log"], later["log"] = stamps, np.append(stamps[1:], stamps[-1] + step)
        return clocks, later

    def _vector(self, table: pa.Table, key: str, clocks: Mapping[str, np.ndarray]) -> Stream:
        if key not in table.column_names:
            raise ValueError("no such column")
        (size,) = self.dataset.features[key]["shape"]
        return Stream(name=key, kind=Kind.VECTOR, clocks=clocks, values=_numbers(table[key], size),
                      names=self.dataset.names(key), schema=f"{self.dataset.features[key]['dtype']} [{size}]")

    def _camera(self, index: int, key: str, data: Path, rows: int, clocks: Mapping[str, np.ndarray]) -> Stream:
        feature = self.dataset.features[key]
        shape = tuple(feature["shape"])
        size = (shape[-2:] if shape[0] == 3 else shape[:2]) if len(shape) == 3 else None
        if feature["dtype"] == "image":
            pictures: Pictures = on_demand(key, _Cells(data, index, key), encoded_picture)
        else:
            file, first, last = self.dataset.video(index, key)
            try:
                frames = read_frames(file)
            except ValueError as reason:
                raise ValueError(f"{self._relative(file)}: {reason}") from None
            stamps = between(frames, first, last, self.dataset.fps) if np.isfinite(last) else frames.stamps
            if len(stamps) != rows:
                raise ValueError(f"{self._relative(file)}: {len(stamps)} frames for {rows} rows of episode {index}")
            pictures = VideoPictures(name=self._relative(file), seen=see(file), first=int(frames.stamps[0]),
                                     stamps=stamps)
        return Stream(name=key, kind=Kind.IMAGE, clocks=clocks, pictures=pictures, size=size, schema=feature["dtype"],
                      portable=feature["dtype"] == "video")

    def _unnamed_frames(self) -> Iterator[Refused]:
        """Frames of v3.0 videos that are in no episode: a recording that was cut before its metadata were written."""
        if self.dataset.version == "v2.1":
            return
        counted: dict[Path, int] = {}
        for index, entry in self.dataset.entries.items():
            for key in (key for key in self.dataset.cameras if self.dataset.features[key]["dtype"] == "video"):
                try:
                    file = self.dataset.video(index, key)[0]
                    counted[file] = counted.get(file, 0) + entry["length"]
                except (ValueError, KeyError, TypeError):
                    continue  # the episode says so
        for file, rows in counted.items():
            try:
                found = len(read_frames(file).stamps)
            except ValueError:
                continue  # its episodes say so
            if found > rows:
                yield Refused(name=self._relative(file),
                              reason=f"{found} frames, meta/episodes names {rows}; cut recording?")

    def _success(self, entry: Mapping[str, Any], streams: Mapping[str, Stream]) -> tuple[Success, str]:
        if entry.get("success") in list(Success):
            return Success(entry["success"]), "meta/episodes: success"
        if SUCCESS not in streams:
            return Success.UNKNOWN, "the set has no success label"
        if not self._labelled:
            return Success.UNKNOWN, f"{SUCCESS} is false throughout the set, so it is not taken for a label"
        return (Success.YES if np.any(streams[SUCCESS].values) else Success.NO), f"column {SUCCESS}"

    def _marks(self, success: Success, streams: Mapping[str, Stream]) -> str:
        """The stream that marks the rows of a success; a mark in every row is the episode's, not the row's."""
        values = streams[SUCCESS].values if SUCCESS in streams else None
        return SUCCESS if success is Success.YES and values is not None and values.any() and not values[0, 0] else ""

    @cached_property
    def _labelled(self) -> bool:
        """Some step of the set is marked a success: many sets carry the column and never fill it."""
        return any(_ever_true(file) for file in {self.dataset.data_file(index) for index in self.dataset.entries})

    def _rows(self, file: Path, index: int) -> pa.Table:
        """Rows of an episode, without its pictures. Raises ``FileNotFoundError`` when there are none at all."""
        if self._open_file is None or self._open_file[0] != file:  # a v3.0 file holds many episodes
            if not file.exists():
                raise FileNotFoundError(file)
            try:
                parquet = pq.ParquetFile(file)
                present = parquet.schema_arrow.names
                if lacking := set(BOOKKEEPING) - {"index"} - set(present):
                    raise _UnusableError(f"{self._relative(file)}: columns missing: {', '.join(sorted(lacking))}")
                self._open_file = file, parquet.read([name for name in present if name not in self.dataset.cameras])
            except (OSError, pa.ArrowException) as error:
                raise _UnusableError(f"{self._relative(file)}: unreadable parquet ({one_line(error)}); half-written?"
                                     ) from error
        table = self._open_file[1].filter(pc.equal(self._open_file[1]["episode_index"], index))
        if table.num_rows == 0 and self.dataset.version == "v3.0":
            raise FileNotFoundError(file)
        return table

    def _sha256(self, index: int, data: Path, videos: Sequence[str]) -> str:
        """Of the bytes of the episode's files and its number."""
        hashes = [file_sha256(data)]
        for key in videos:
            try:
                hashes.append(file_sha256(self.dataset.video(index, key)[0]))
            except (OSError, ValueError):
                hashes.append(f"{key} is missing")
        return hashlib.sha256(" ".join([*hashes, str(index)]).encode()).hexdigest()

    def _relative(self, file: Path) -> str:
        return str(file.relative_to(self.path))


class _Cells:
    """Pictures of one episode, encoded in a column of a parquet file, which is read when the first is asked for."""

    def __init__(self, file: Path, index: int, key: str) -> None:
        self._file, self._index, self._key = file, index, key

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = pq.read_table(self._file, columns=[self._key], filters=[("episode_index", "=", self._index)])
        return [cell["bytes"] for cell in table[self._key].to_pylist()]

    def __getitem__(self, row: int) -> bytes:
        return self._bytes[row]


def sniff(path: Path) -> str | None:
    """``LeRobot`` for the folder of a set, whole or damaged; never raises."""
    return "LeRobot" if is_lerobot(path) else None


def open_log(path: Path) -> LeRobotLog:
    """Open one set. Raises ``UserError`` when it is of no known version, or its metadata are damaged."""
    return LeRobotLog(path)


def _numbers(column: pa.ChunkedArray, size: int) -> Float64[np.ndarray, "r size"]:
    """A column of numbers or of lists of them; what is null is NaN. Raises ``ValueError``."""
    array = column.combine_chunks()
    nested = pa.types.is_nested(array.type)
    if nested and set(pc.list_value_length(array).to_pylist()) - {size}:
        raise ValueError(f"rows that are not {size} numbers")
    flat = (array.flatten() if nested else array).cast(pa.float64()).to_numpy(zero_copy_only=False)
    if len(flat) != len(array) * size:
        raise ValueError(f"rows that are not {size} numbers")
    return flat.reshape(len(array), size)


def _ever_true(file: Path) -> bool:
    try:
        return bool(np.any(_numbers(pq.read_table(file, columns=[SUCCESS])[SUCCESS], 1)))
    except (OSError, ValueError, pa.ArrowException):
        return False
