"""Read Minari sets: ``data/main_data.hdf5`` with a group ``episode_<i>`` each, and ``data/metadata.json`` beside it.

An episode has one row more of observations, which may be nested, than of actions, rewards, terminations and
truncations: observation ``i`` is what action ``i`` was taken at, so both have ``i`` on the clock ``index``. Sets in a
folder per namespace are logs of their own. Format: https://minari.farama.org/content/dataset_standards/
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.logs.hdf5 import (
    INSTRUCTIONS,
    as_json,
    describe,
    described_text,
    hash_of,
    is_hdf5,
    read_series,
)
from data.logs.hdf5_process import Hdf5Rows, list_children, list_series, read_attributes
from data.logs.pictures import UnusableError, counted, index_clock, is_label
from data.logs.streams import LogEpisode, Refused, Stream
from data.text import one_line
from data.types import Success, UserError

MAIN = "main_data.hdf5"
ACTED = ("rewards", "actions", "terminations", "truncations")
"""Of one row per step."""
LABELS = ("infos/success", "infos/is_success")
EPISODE = re.compile(r"episode_(\d{1,18})")


class MinariLog:
    """An opened set. Use ``open_log``."""

    format = "Minari"

    def __init__(self, path: Path) -> None:
        """List the episodes. Raises ``UserError`` when there is none."""
        self.path = path
        file = _main_file(path)
        if file is None:
            raise UserError(f"{path}: expected a Minari set with data/{MAIN}, found none; check the path")
        self._file = file
        try:
            groups = list_children(file, "")
        except OSError as error:
            raise UserError(f"{file}: expected a Minari set, found damage: {one_line(error)}; copy the set again"
                            ) from None
        numbers = {int(match[1]): key for key in groups if (match := EPISODE.fullmatch(key))}
        if not numbers:
            raise UserError(f"{file}: expected a Minari set, found no group episode_<number>; record it again")
        self._groups = [numbers[number] for number in sorted(numbers)]
        self._strange = [key for key in groups if key not in self._groups]
        self._metadata = _metadata(file.with_name("metadata.json"))

    def episodes(self) -> Iterator[LogEpisode | Refused]:
        """In the order of their numbers, then what does not fit."""
        for group in self._groups:
            try:
                yield self._episode(group)
            except (UnusableError, OSError, ValueError) as error:
                yield Refused(name=group, reason=one_line(error))
        for key in self._strange:
            yield Refused(name=ascii(key)[1:-1], reason="expected a group episode_<number>")
        promised = self._metadata.get("total_episodes", len(self._groups))
        if promised != len(self._groups):
            yield Refused(name="metadata.json", reason=f"counts {promised} episodes, found {len(self._groups)}")

    def _episode(self, group: str) -> LogEpisode:
        series, skipped = list_series(self._file, group)
        steps = _steps(series)
        for key, rows in list(series.items()):
            root = key.split("/")[0]
            if root in ACTED and len(rows) != steps:
                raise ValueError(f"{key} has {len(rows)} rows, expected {steps} like the others; half-written?")
            if root == "observations" and len(rows) != steps + 1:
                raise ValueError(f"{key} has {len(rows)} rows, expected {steps + 1}: one more than the steps")
            if len(rows) not in (steps, steps + 1):
                skipped[key] = f"not of {steps} or {steps + 1} rows"
                del series[key]
        streams, unusable = read_series(series, index_clock)
        described = describe(read_attributes(self._file, group))
        problems = list(counted(skipped | unusable))
        if described.get("total_steps", steps) != steps:
            problems.append(f"total_steps says {described['total_steps']}, found {steps} rows")
        success, success_from = self._success(streams)
        seed = described.get("seed")
        return LogEpisode(
            name=group, streams=streams, instruction=described_text(described, INSTRUCTIONS), task=self._task,
            success=success, success_from=success_from, problems=tuple(problems), sha256=hash_of(self._file, group),
            facts={"format": self.format, "file": self._file.name, "rows": steps, "clock": "none",
                   **({"seed": seed} if isinstance(seed, int) else {})})

    def _success(self, streams: Mapping[str, Stream]) -> tuple[Success, str]:
        marks = streams.get(self._label or "")
        if marks is None:
            return Success.UNKNOWN, "no label: infos have no success, or it is 0 throughout the set"
        return (Success.YES if np.any(marks.values) else Success.NO), f"{self._label}: 1 in some step"

    @cached_property
    def _label(self) -> str | None:
        """Which of ``LABELS`` says success throughout the set, if any: of 0 and 1, unless all are 0."""
        marks: dict[str, list[np.ndarray]] = {key: [] for key in LABELS}
        for group in self._groups:
            with contextlib.suppress(OSError):  # the episode itself will say so
                series = list_series(self._file, group)[0]
                for key, columns in marks.items():
                    if key in series and series[key].dtype.kind in "biuf" and len(series[key].shape) == 1:
                        columns.append(series[key][:])
        return next((key for key, columns in marks.items() if is_label(columns)), None)

    @property
    def _task(self) -> str:
        """Name of the environment, or else of the set."""
        spec = self._metadata.get("env_spec")
        spec = as_json(spec) if isinstance(spec, str) else spec
        names = (spec.get("id") if isinstance(spec, dict) else None, self._metadata.get("dataset_id"))
        return next((name for name in names if isinstance(name, str)), "")


def sniff(path: Path) -> str | None:
    """``Minari`` for the folder of a set, its ``data`` folder or its HDF5 file; never raises."""
    file = _main_file(path)
    if file is None or not is_hdf5(file):
        return None
    try:
        groups = list_children(file, "")
        is_set = any(EPISODE.fullmatch(key) and "observations" in list_children(file, key) for key in groups)
    except OSError:
        is_set = False
    return "Minari" if is_set or file.name == MAIN else None


def open_log(path: Path) -> MinariLog:
    """Open one set. Raises ``UserError`` when it is none, damaged or without episodes."""
    return MinariLog(path)


def _main_file(path: Path) -> Path | None:
    return next((file for file in (path, path / MAIN, path / "data" / MAIN) if file.is_file()), None)


def _metadata(file: Path) -> dict[str, Any]:
    """What ``metadata.json`` says; nothing when it is missing or damaged."""
    try:
        found = as_json(file.read_text(errors="replace"))
    except OSError:
        return {}
    return found if isinstance(found, dict) else {}


def _steps(series: Mapping[str, Hdf5Rows]) -> int:
    """Of an episode. Raises ``ValueError`` when it has none."""
    lengths = [len(rows) for key in ACTED for name, rows in series.items() if name.split("/")[0] == key]
    if not lengths or lengths[0] == 0:
        raise ValueError("no rows of rewards or actions; an episode needs at least one step")
    return lengths[0]
