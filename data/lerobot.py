"""Metadata and files of LeRobot data sets, format v2.1 and v3.0.

v2.1: one parquet and one mp4 per episode. v3.0: parquet and mp4 files that hold many episodes, found through
``meta/episodes``. ``data.logs.lerobot`` compares what they say with the files; nothing here is trusted.
Format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.text import one_line
from data.types import Statistics, UserError

VERSIONS = ("v2.1", "v3.0")
STATE, ACTION, SUCCESS = "observation.state", "action", "next.success"
NORMALISED = "normalised_by"
"""Key of ``meta/info.json`` under which our own exports keep the statistics of the store that they are from."""
PICTURES = ("video", "image")
"""Dtypes of cameras."""


class LeRobotDataset:
    """An opened set. Use ``read_lerobot``."""

    def __init__(self, path: Path) -> None:
        """Read the metadata. Raises ``UserError`` when this is no LeRobot set of a known version."""
        self.path = path
        self.info = _read_info(path)
        self.version: str = self.info["codebase_version"]
        self.fps = float(self.info["fps"])
        self.features: Mapping[str, Mapping[str, Any]] = self.info["features"]
        self.cameras = [key for key, feature in self.features.items() if feature["dtype"] in PICTURES]
        self.statistics: Statistics | None = None
        """What the set was normalised by before it was exported, where it says so."""
        if NORMALISED in self.info:
            self.statistics = Statistics.from_dict(self.info[NORMALISED])
        videos = any(feature["dtype"] == "video" for feature in self.features.values())
        for name in ("data_path", *(["video_path"] if videos else [])):  # raises where a template is damaged
            self.info[name].format(episode_chunk=0, episode_index=0, chunk_index=0, file_index=0, video_key="")
        self.unlisted: dict[str, str] = {}
        """Files and episodes that only one part of the metadata knows, and why they are not read."""
        read = self._read_index_v2 if self.version == "v2.1" else self._read_index_v3
        try:
            self.tasks, self.entries = read()
            wanted = {"length", *(["data/chunk_index", "data/file_index"] if self.version == "v3.0" else [])}
            if lacking := {name for entry in self.entries.values() for name in wanted - set(entry)}:
                raise ValueError(f"episodes lack {', '.join(sorted(lacking))}")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{path}/meta: half-written or damaged ({one_line(error)}); copy the set again") from error
        for index in range(int(self.info["total_episodes"])):
            if index not in self.entries:
                self.unlisted[f"episode {index}"] = "meta/info.json counts it, meta/episodes does not describe it"

    def names(self, key: str) -> tuple[str, ...]:
        """What the metadata call the dimensions of a feature, in whatever nesting; perhaps none, or too few."""
        names = self.features[key].get("names")
        names = [name for group in names.values() for name in group] if isinstance(names, Mapping) else names or []
        return tuple(str(name) for item in names for name in (item if isinstance(item, list) else [item]))

    def data_file(self, index: int) -> Path:
        """The parquet file of an episode."""
        entry = self.entries[index]
        if self.version == "v2.1":
            return self.path / self.info["data_path"].format(
                episode_chunk=index // self.info["chunks_size"], episode_index=index)
        return self.path / self.info["data_path"].format(
            chunk_index=entry["data/chunk_index"], file_index=entry["data/file_index"])

    def video(self, index: int, key: str) -> tuple[Path, float, float]:
        """The video file of an episode and the seconds at which the episode begins and ends in it.

        A v2.1 file is all of one episode: 0 and infinity. Raises ``ValueError`` when the metadata do not say, or
        contradict the number of rows.
        """
        entry = self.entries[index]
        if self.version == "v2.1":
            return self.path / self.info["video_path"].format(
                episode_chunk=index // self.info["chunks_size"], video_key=key, episode_index=index), 0.0, float("inf")
        try:
            chunk, number = entry[f"videos/{key}/chunk_index"], entry[f"videos/{key}/file_index"]
            first, last = entry[f"videos/{key}/from_timestamp"], entry[f"videos/{key}/to_timestamp"]
        except KeyError as error:
            raise ValueError(f"meta/episodes has no column {error}") from error
        if round((last - first) * self.fps) != entry["length"]:
            raise ValueError(f"meta/episodes: {last - first:.3f} s of {key} at {self.fps:g} Hz for {entry['length']} "
                             "rows")
        file = self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=number)
        return self.path / file, first, last

    def _read_index_v2(self) -> tuple[dict[int, str], dict[int, dict[str, Any]]]:
        tasks = {row["task_index"]: row["task"] for row in _read_lines(self.path / "meta/tasks.jsonl")}
        entries = {row["episode_index"]: row for row in _read_lines(self.path / "meta/episodes.jsonl")}
        for file in sorted(self.path.glob("data/**/episode_*.parquet")):
            match = re.fullmatch(r"episode_(\d+)", file.stem)
            if match and int(match[1]) not in entries:
                self.unlisted[str(file.relative_to(self.path))] = "meta/episodes.jsonl does not name it"
        return tasks, entries

    def _read_index_v3(self) -> tuple[dict[int, str], dict[int, dict[str, Any]]]:
        table = pq.read_table(self.path / "meta/tasks.parquet").to_pydict()
        # Written by pandas with the sentence as its index, whose column has this name.
        sentences = next((table[name] for name in ("task", "__index_level_0__") if name in table), None)
        if sentences is None:
            raise ValueError("tasks.parquet has no column task")
        tasks = dict(zip(table["task_index"], sentences, strict=True))
        entries = {}
        for file in sorted(self.path.glob("meta/episodes/chunk-*/file-*.parquet")):
            schema = pq.read_schema(file)
            wanted = [name for name in schema.names if not name.startswith("stats/")]
            for row in pq.read_table(file, columns=wanted).to_pylist():
                entries[row["episode_index"]] = row
        return tasks, entries


def is_lerobot(path: Path) -> bool:
    """Whether the folder looks like a LeRobot set, whole or damaged."""
    return (path / "meta/info.json").is_file()


def read_lerobot(path: str | Path) -> LeRobotDataset:
    """Open a LeRobot set, v2.1 or v3.0. Raises ``UserError`` when there is none or its metadata are damaged."""
    try:
        return LeRobotDataset(Path(path))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{path}/meta: not what a LeRobot set has ({type(error).__name__}: {one_line(error)}); "
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
        raise UserError(f"{file}: half-written or damaged ({one_line(error)}); copy the set again") from error
    wanted = {"codebase_version", "fps", "features", "total_episodes", "data_path"}
    if not isinstance(info, dict) or wanted - set(info):
        lacking = ", ".join(sorted(wanted - set(info)))
        raise UserError(f"{file}: expected the keys of a LeRobot set, {lacking} missing; check source=<folder>")
    if info["codebase_version"] not in VERSIONS:
        raise UserError(f"{file}: LeRobot format {info['codebase_version']}, expected {' or '.join(VERSIONS)}; "
                        f"convert the set with LeRobot's own converter")
    if not float(info["fps"]) > 0:
        raise UserError(f"{file}: expected fps above 0, got {info['fps']}; copy the set again")
    return info


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
