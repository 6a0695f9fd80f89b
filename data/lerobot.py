"""Read LeRobot data sets, format v2.1 and v3.0, with pyarrow and PyAV.

v2.1: one parquet and one mp4 per episode. v3.0: parquet and mp4 files that hold many episodes, found through
``meta/episodes``. Metadata are compared with the files and not trusted: what does not agree is refused, episode by
episode, with a reason. Format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Float64, UInt8
from PIL import Image

from data.types import Success, UserError

VERSIONS = ("v2.1", "v3.0")
STATE, ACTION, SUCCESS = "observation.state", "action", "next.success"


@dataclass(frozen=True, kw_only=True)
class LeRobotEpisode:
    """One episode in the log's own units: ``r`` rows, each an observation and the action commanded from it."""

    index: int
    state: Float32[np.ndarray, "r p"]
    action: Float32[np.ndarray, "r a"]
    timestamp: Float64[np.ndarray, " r"]
    instruction: str
    task: str
    success: Success
    success_from: str
    """What says so, or why it is unknown."""
    shows_success: Bool[np.ndarray, " r"]
    """The observation after this row's shows success; false throughout where rows are not marked one by one."""
    recorded: Mapping[str, Any]
    """Provenance that the writer of the set gave the episode."""
    file: Path
    """The parquet file."""


@dataclass(kw_only=True)
class LeRobotReport:
    """What the metadata promise and what is there. ``missing`` and ``refused`` fill as episodes are read."""

    named: int = 0
    """Episodes that the metadata name."""
    found: list[int] = field(default_factory=list)
    """Episodes that were read whole."""
    missing: list[int] = field(default_factory=list)
    """Episodes without a parquet file or rows."""
    refused: dict[str, str] = field(default_factory=dict)
    """Half-written or damaged: file or episode -> reason."""


class _RefusedError(Exception):
    """An episode that can not be used: its file, relative to the set, and the reason."""


class LeRobotDataset:
    """An opened set. Use ``read_lerobot``."""

    def __init__(self, path: Path) -> None:
        """Read the metadata. Raises ``UserError`` when this is no LeRobot set of a known version."""
        self.path = path
        self.info = _read_info(path)
        self.version: str = self.info["codebase_version"]
        self.fps = float(self.info["fps"])
        features = self.info["features"]
        self.cameras = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
        self.state_names = self._names(STATE)
        self.action_names = self._names(ACTION)
        self.report = LeRobotReport()
        self._columns = [STATE, ACTION, "timestamp", "task_index", "episode_index", "frame_index"]
        self._columns += [SUCCESS] if SUCCESS in features else []
        self._open_file: tuple[Path, pa.Table] | None = None
        for name in ("data_path", *(["video_path"] if any(f["dtype"] == "video" for f in features.values()) else [])):
            self.info[name].format(episode_chunk=0, episode_index=0, chunk_index=0, file_index=0, video_key="")
        self._read_index()

    def episodes(self) -> Iterator[LeRobotEpisode]:
        """Yield the numbers of every episode whose parquet rows are whole; frames are read with ``frames``.

        ``report`` starts anew, and is complete once all episodes were taken.
        """
        self.report.found, self.report.missing = [], []
        self.report.refused = dict(self._unlisted)
        for index, entry in sorted(self._entries.items()):
            try:
                episode = self._episode(index, entry)
            except FileNotFoundError:
                self.report.missing.append(index)
            except _RefusedError as reason:
                self.refuse(*reason.args)
            else:
                self.report.found.append(index)
                yield episode

    def refuse(self, name: str, reason: str, *, index: int | None = None) -> None:
        """Report a file or an episode as unusable."""
        self.report.refused[name] = reason
        if index in self.report.found:
            self.report.found.remove(index)

    def frames(self, episode: LeRobotEpisode, key: str, size: int) -> UInt8[np.ndarray, "r size size 3"]:
        """Every frame of a camera, scaled to a square of ``size`` pixels without a crop (PIL, bilinear).

        Raises ``ValueError``, naming the file, when the frames can not be decoded or are not as many as the rows.
        """
        rows = len(episode.action)
        if self.info["features"][key]["dtype"] == "image":
            return self._images(episode, key, size)
        file, first = self._video(episode.index, key)
        frames = np.empty((rows, size, size, 3), np.uint8)
        count = 0
        name = file.relative_to(self.path)
        # v2.1 has the whole file to itself, so a frame too many is a mismatch there.
        limit = rows if self.version == "v3.0" else rows + 1
        try:
            for image in _decode(file, first, self.fps, limit):
                if count < rows:
                    frames[count] = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
                count += 1
        except FileNotFoundError as error:
            raise ValueError(f"{name}: missing") from error
        except (OSError, av.FFmpegError, IndexError) as error:  # IndexError: no video in it
            raise ValueError(f"{name}: cannot be decoded ({type(error).__name__}), half-written?") from error
        if count != rows:
            found = f"more than {rows}" if count > rows else str(count)
            raise ValueError(f"{name}: {found} frames for {rows} rows of episode {episode.index}")
        return frames

    def files(self, index: int, cameras: Sequence[str]) -> tuple[Path, ...]:
        """The files that hold an episode: its parquet, then a video per camera that has one."""
        videos = [key for key in cameras if self.info["features"][key]["dtype"] == "video"]
        return (self._data_file(index), *(self._video(index, key)[0] for key in videos))

    def _names(self, key: str) -> tuple[str, ...]:
        if key not in self.info["features"]:
            raise UserError(f"{self.path}/meta/info.json: expected the feature {key!r}, found "
                            f"{', '.join(map(ascii, self.info['features']))}; this set can not be ingested")
        feature = self.info["features"][key]
        if len(feature["shape"]) != 1:
            raise UserError(f"{self.path}/meta/info.json: expected {key} to be a vector, got shape {feature['shape']}")
        size = feature["shape"][0]
        names = feature["names"]
        names = [name for group in names.values() for name in group] if isinstance(names, Mapping) else names or []
        flat = [str(name) for item in names for name in (item if isinstance(item, list) else [item])]
        if not flat:
            return tuple(f"{key.split('.')[-1]}_{i}" for i in range(size))
        if len(flat) != size:
            raise UserError(f"{self.path}/meta/info.json: {key} has {size} dimensions but {len(flat)} names; "
                            f"correct the names")
        return tuple(flat)

    def _read_index(self) -> None:
        """``_entries``: what the metadata say of each episode; ``_unlisted``: files that they do not name."""
        self._unlisted: dict[str, str] = {}
        read = self._read_index_v2 if self.version == "v2.1" else self._read_index_v3
        try:
            self._tasks, self._entries = read()
            wanted = {"length", *(["data/chunk_index", "data/file_index"] if self.version == "v3.0" else [])}
            if lacking := {name for entry in self._entries.values() for name in wanted - set(entry)}:
                raise ValueError(f"episodes lack {', '.join(sorted(lacking))}")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{self.path}/meta: half-written or damaged ({_one_line(error)}); copy the set again"
                            ) from error
        self.report.named = len(self._entries)
        for index in range(int(self.info["total_episodes"])):
            if index not in self._entries:
                self._unlisted[f"episode {index}"] = "meta/info.json counts it, meta/episodes does not describe it"

    def _read_index_v2(self) -> tuple[dict[int, str], dict[int, dict[str, Any]]]:
        tasks = {row["task_index"]: row["task"] for row in _read_lines(self.path / "meta/tasks.jsonl")}
        entries = {row["episode_index"]: row for row in _read_lines(self.path / "meta/episodes.jsonl")}
        for file in sorted(self.path.glob("data/**/episode_*.parquet")):
            match = re.fullmatch(r"episode_(\d+)", file.stem)
            if match and int(match[1]) not in entries:
                self._unlisted[str(file.relative_to(self.path))] = "meta/episodes.jsonl does not name it"
        return tasks, entries

    def _read_index_v3(self) -> tuple[dict[int, str], dict[int, dict[str, Any]]]:
        table = pq.read_table(self.path / "meta/tasks.parquet").to_pydict()
        # Written by pandas with the sentence as its index, whose column has this name.
        sentences = next(table[name] for name in ("task", "__index_level_0__") if name in table)
        tasks = dict(zip(table["task_index"], sentences, strict=True))
        entries = {}
        for file in sorted(self.path.glob("meta/episodes/chunk-*/file-*.parquet")):
            schema = pq.read_schema(file)
            wanted = [name for name in schema.names if not name.startswith("stats/")]
            for row in pq.read_table(file, columns=wanted).to_pylist():
                entries[row["episode_index"]] = row
        return tasks, entries

    def _data_file(self, index: int) -> Path:
        entry = self._entries[index]
        if self.version == "v2.1":
            return self.path / self.info["data_path"].format(
                episode_chunk=index // self.info["chunks_size"], episode_index=index)
        return self.path / self.info["data_path"].format(
            chunk_index=entry["data/chunk_index"], file_index=entry["data/file_index"])

    def _video(self, index: int, key: str) -> tuple[Path, float]:
        """The video file of an episode and the time in seconds at which the episode begins in it.

        Raises ``ValueError`` when the metadata do not say, or contradict the number of rows.
        """
        entry = self._entries[index]
        if self.version == "v2.1":
            return self.path / self.info["video_path"].format(
                episode_chunk=index // self.info["chunks_size"], video_key=key, episode_index=index), 0.0
        try:
            chunk, number = entry[f"videos/{key}/chunk_index"], entry[f"videos/{key}/file_index"]
            first, last = entry[f"videos/{key}/from_timestamp"], entry[f"videos/{key}/to_timestamp"]
        except KeyError as error:
            raise ValueError(f"episode {index}: meta/episodes has no column {error}") from error
        if round((last - first) * self.fps) != entry["length"]:
            raise ValueError(f"episode {index}: {last - first:.3f} s of {key} at {self.fps:g} Hz for "
                             f"{entry['length']} rows")
        return self.path / self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=number), first

    def _episode(self, index: int, entry: Mapping[str, Any]) -> LeRobotEpisode:
        file = self._data_file(index)
        name = str(file.relative_to(self.path))
        if self._open_file is None or self._open_file[0] != file:  # a v3.0 file holds many episodes
            self._open_file = file, _read_rows(file, name, self._columns)
        table = _of_episode(self._open_file[1], index)
        rows = table.num_rows
        label = f"{name} episode {index}" if self.version == "v3.0" else name
        if rows == 0 and self.version == "v3.0":
            raise FileNotFoundError(file)
        if rows != entry["length"]:
            raise _RefusedError(label, f"{rows} rows, its metadata say {entry['length']}; half-written?")
        if rows < 2:
            raise _RefusedError(label, f"{rows} rows, an episode needs 2: an action and what it led to")
        state = _matrix(table[STATE], len(self.state_names), label, STATE)
        action = _matrix(table[ACTION], len(self.action_names), label, ACTION)
        time = _flat(table["timestamp"]).astype(np.float64)
        if not (np.diff(time) > 0).all():
            raise _RefusedError(label, "timestamps do not increase")
        if table["frame_index"].to_pylist() != list(range(rows)):
            raise _RefusedError(label, "frame_index does not count from 0 in steps of 1")
        sentence = self._tasks.get(table["task_index"][0].as_py())
        if sentence is None:
            raise _RefusedError(label, f"task_index {table['task_index'][0]} is not in meta/tasks")
        success, origin = self._success(entry, table)
        return LeRobotEpisode(
            index=index, state=state, action=action, timestamp=time - time[0], instruction=sentence,
            task=entry["task_name"] if entry.get("task_name") else sentence, success=success, success_from=origin,
            shows_success=self._shows_success(success, table),
            recorded=json.loads(entry["provenance"]) if entry.get("provenance") else {}, file=file)

    def _success(self, entry: Mapping[str, Any], table: pa.Table) -> tuple[Success, str]:
        if entry.get("success") in list(Success):
            return Success(entry["success"]), "meta/episodes: success"
        if SUCCESS not in self.info["features"]:
            return Success.UNKNOWN, "the set has no success label"
        if not self._labelled:
            return Success.UNKNOWN, f"{SUCCESS} is false throughout the set, so it is not taken for a label"
        done = bool(np.any(_flat(table[SUCCESS])))
        return (Success.YES if done else Success.NO), f"column {SUCCESS}"

    def _shows_success(self, success: Success, table: pa.Table) -> Bool[np.ndarray, " r"]:
        marked = np.zeros(table.num_rows, bool)
        if success is Success.YES and SUCCESS in self.info["features"]:
            marked = _flat(table[SUCCESS]).astype(bool)
        return marked & ~marked[0]  # a mark in every row is the episode's, not the row's

    @cached_property
    def _labelled(self) -> bool:
        """Some step of the set is marked a success: many sets carry the column and never fill it."""
        files = {self._data_file(index) for index in self._entries}
        return any(_ever_true(file) for file in files)

    def _images(self, episode: LeRobotEpisode, key: str, size: int) -> UInt8[np.ndarray, "r size size 3"]:
        """Frames that are stored as encoded pictures in the parquet file."""
        name = str(episode.file.relative_to(self.path))
        try:
            table = _of_episode(_read_rows(episode.file, name, ["episode_index", key]), episode.index)
            pictures = [Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in table[key].to_pylist()]
        except (OSError, TypeError, KeyError, _RefusedError) as error:
            raise ValueError(f"{name}: pictures of {key} cannot be read ({_one_line(error)})") from error
        return np.stack([np.asarray(p.resize((size, size), Image.Resampling.BILINEAR)) for p in pictures])


def is_lerobot(path: Path) -> bool:
    """Whether the folder looks like a LeRobot set, whole or damaged."""
    return (path / "meta/info.json").is_file()


def read_lerobot(path: str | Path) -> LeRobotDataset:
    """Open a LeRobot set, v2.1 or v3.0. Raises ``UserError`` when there is none or its metadata are damaged."""
    try:
        return LeRobotDataset(Path(path))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{path}/meta: not what a LeRobot set has ({type(error).__name__}: {_one_line(error)}); "
                        f"copy the set again") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Remembered: a v3.0 file is asked for once per episode."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_info(path: Path) -> dict[str, Any]:
    file = path / "meta/info.json"
    try:
        info = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"no LeRobot set at {path}: expected {file}; check source=<folder>") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: half-written or damaged ({_one_line(error)}); copy the set again") from error
    wanted = {"codebase_version", "fps", "features", "total_episodes", "data_path"}
    if not isinstance(info, dict) or wanted - set(info):
        lacking = ", ".join(sorted(wanted - set(info)))
        raise UserError(f"{file}: expected the keys of a LeRobot set, {lacking} missing; check source=<folder>")
    if info["codebase_version"] not in VERSIONS:
        raise UserError(f"{file}: LeRobot format {info['codebase_version']}, expected {' or '.join(VERSIONS)}; "
                        f"convert the set with LeRobot's own converter")
    return info


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _read_rows(file: Path, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a parquet file. Raises ``_RefusedError``, or ``FileNotFoundError`` when there is none."""
    if not file.exists():
        raise FileNotFoundError(file)
    try:
        parquet = pq.ParquetFile(file)
        lacking = set(columns) - set(parquet.schema_arrow.names)
        if lacking:
            raise _RefusedError(name, f"columns missing: {', '.join(sorted(lacking))}")
        return parquet.read(columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise _RefusedError(name, f"unreadable parquet ({_one_line(error)}); half-written?") from error


def _of_episode(table: pa.Table, index: int) -> pa.Table:
    return table.filter(pc.equal(table["episode_index"], index))


def _ever_true(file: Path) -> bool:
    try:
        return bool(np.any(_flat(pq.read_table(file, columns=[SUCCESS])[SUCCESS])))
    except (OSError, pa.ArrowException):
        return False


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """A column of scalars or of one-element lists, ``[r]``."""
    return np.array([value[0] if isinstance(value, list) else value for value in column.to_pylist()])


def _matrix(column: pa.ChunkedArray, size: int, label: str, name: str) -> Float32[np.ndarray, "r size"]:
    rows = column.to_pylist()
    if any(row is None or len(row) != size for row in rows):
        raise _RefusedError(label, f"{name} has rows that are not {size} numbers")
    matrix = np.array(rows, np.float32)
    if not np.isfinite(matrix).all():
        raise _RefusedError(label, f"{name} has values that are not finite")
    return matrix


def _decode(file: Path, first: float, fps: float, limit: int) -> Iterator[Image.Image]:
    """Up to ``limit`` frames from the time ``first`` (seconds) on."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        assert stream.time_base is not None
        if first > 0:
            container.seek(math.floor(first / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time < first - 0.5 / fps:
                continue
            if limit == 0:
                return
            limit -= 1
            yield frame.to_image()


def _one_line(error: Exception) -> str:
    text = "".join(c for c in " ".join(str(error).split()) if c.isprintable())
    return text[:120] or type(error).__name__
