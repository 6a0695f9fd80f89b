"""Read HDF5 logs with h5py: robomimic, LIBERO, Isaac Lab, ALOHA, DROID raw, and files of unknown layout.

    robomimic, LIBERO, Isaac Lab   data/demo_<i>/{actions, obs/*, rewards, dones, states}: one episode per demo
    ALOHA                          action, observations/{qpos, images/<camera>}: one episode per file
    DROID raw                      action/*, observation/{robot_state, timestamp}/*: one episode per file
    unknown                        the data sets of the most common number of rows: one episode per file

Every file is a log of its own, and the groups that are there tell its layout. A data set that does not fit is skipped
and counted; one that is damaged costs its episode.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from data.lerobot import file_sha256
from data.logs.hdf5_process import Hdf5Rows, list_children, list_series, read_attributes
from data.logs.pictures import (
    MAX_VALUES,
    UnusableError,
    array_stream,
    counted,
    index_clock,
    is_label,
    is_name,
    nominal_clock,
    recorded_clock,
)
from data.logs.streams import LogEpisode, Refused, Stream
from data.text import one_line
from data.types import Success, UserError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
NO_NUMBER = 10**18
"""What is named like no demo comes after all that are."""
SIGNALS = ("action", "actions", "obs", "next_obs", "observation", "observations", "rewards", "dones")
"""Groups of one row per step in every layout: a different number of rows is damage."""
DROID_TIME = "observation/timestamp/control/step_start"
"""Milliseconds at which the step began on the recording computer."""
TIMES = ("timestamp", "timestamps", "time")
INSTRUCTIONS = ("language_instruction", "instruction", "lang", "language", "env_lang", "language_raw", "current_task")
RATES = ("fps", "control_freq", "control_hz", "hz")
TASKS = ("env_name", "problem_name", "task")
NESTED = ("ep_meta", "problem_info", "env_args", "env_kwargs", "sim_args")
"""Attributes that hold a JSON object, and objects in one."""
NOTES = {"LIBERO": "pictures are as LIBERO stores them, upside down",
         "ALOHA": "JPEG colours are taken as the standard says, red first; some recorders swap red and blue"}

Clocks = Callable[[int], Mapping[str, Float64[np.ndarray, " n"]]]
"""The clocks of a stream of so many rows."""


class Hdf5Log:
    """An opened HDF5 file. Use ``open_log``."""

    def __init__(self, path: Path) -> None:
        """List the episodes. Raises ``UserError`` when there is none."""
        self.path = path
        try:
            self._layout, self._groups = _layout(path)
        except (UnusableError, OSError) as error:
            raise UserError(f"{path}: expected episodes in HDF5, found none: {one_line(error)}; check the path, or "
                            "copy the file again") from None
        self.format = f"{self._layout} HDF5"

    def episodes(self) -> Iterator[LogEpisode | Refused]:
        """The demos in the order of their numbers, or the file as one episode."""
        for group in self._groups:
            name = ascii(group.removeprefix("data/"))[1:-1] or self.path.name
            try:
                yield self._episode(name, group)
            except (UnusableError, OSError, ValueError) as error:
                yield Refused(name=name, reason=one_line(error))

    def _episode(self, name: str, group: str) -> LogEpisode:
        file = self.path
        if group and (_number(group.removeprefix("data/")) == NO_NUMBER or not list_children(file, group)):
            raise UnusableError("expected a group data/demo_<number> with data sets in it")
        series, skipped = list_series(file, group)
        rows = _rows(series)
        fitting = {}
        for key, column in series.items():
            if len(column) == rows:
                fitting[key] = column
            elif key.split("/")[0] in SIGNALS and len(column) != 1:
                raise ValueError(f"{key} has {len(column)} rows, expected {rows}; half-written?")
            else:
                skipped[key] = f"not of {rows} rows"
        described = describe(*(read_attributes(file, about) for about in dict.fromkeys((group, "data", ""))))
        clock, clock_from = _clock(fitting, rows, described)
        streams, unusable = read_series(fitting, lambda _: clock)
        success, success_from = self._success(streams, described)
        problems = list(counted(skipped | unusable))
        if self._layout == "DROID raw":
            problems.append("pictures: none in this file, DROID keeps them in mp4 and svo files beside it")
        if described.get("num_samples", rows) != rows:
            problems.append(f"num_samples says {described['num_samples']}, found {rows} rows")
        return LogEpisode(
            name=name, streams=streams, instruction=described_text(described, INSTRUCTIONS) or _sentence(series),
            task=described_text(described, TASKS), success=success, success_from=success_from,
            problems=tuple(problems), sha256=hash_of(file, group),
            facts={"format": self.format, "file": file.name, "rows": rows, "clock": clock_from,
                   **{key: described[key] for key in ("sim", "compress") if isinstance(described.get(key), bool)},
                   **({"note": NOTES[self._layout]} if self._layout in NOTES else {})})

    def _success(self, streams: Mapping[str, Stream], described: Mapping[str, Any]) -> tuple[Success, str]:
        said, failed = (as_flag(described.get(key)) for key in ("success", "failure"))
        if said is not None and said == failed:
            return Success.UNKNOWN, f"attributes success and failure are both {said}"
        if said is not None:
            return (Success.YES if said else Success.NO), "attribute success"
        marks = streams.get(self._label or "")
        if marks is None:
            return Success.UNKNOWN, "no attribute success; rewards and dones are missing, all 0, or no label"
        return (Success.YES if np.any(marks.values) else Success.NO), f"{self._label}: 1 in some step"

    @cached_property
    def _label(self) -> str | None:
        """Which of rewards and dones says success throughout the set, if any.

        Rewards of 0 and 1, unless all are 0. Dones only if some demos have one and some do not: robomimic may also
        write them at the end of every demo, whatever its outcome.
        """
        marks: dict[str, list[np.ndarray]] = {"rewards": [], "dones": []}
        for group in filter(None, self._groups):
            with contextlib.suppress(OSError):  # the episode itself will say so
                series = list_series(self.path, group)[0]
                for key, columns in marks.items():
                    if key in series and series[key].dtype.kind in "biuf" and math.prod(series[key].shape) < MAX_VALUES:
                        columns.append(series[key][:])
        if is_label(marks["rewards"]):
            return "rewards"
        return "dones" if is_label(marks["dones"]) and not all(map(np.any, marks["dones"])) else None


def sniff(path: Path) -> str | None:
    """``<layout> HDF5``, or ``HDF5`` for a file that is cut or has no episode; never raises."""
    if not is_hdf5(path):
        return None
    try:
        return f"{_layout(path)[0]} HDF5"
    except (UnusableError, OSError):
        return "HDF5"


def open_log(path: Path) -> Hdf5Log:
    """Open a file. Raises ``UserError`` when it is cut, damaged or has no episode."""
    return Hdf5Log(path)


def is_hdf5(file: Path) -> bool:
    """The file begins as HDF5 files do, whether or not it can be read."""
    try:
        with file.open("rb") as content:
            return content.read(len(SIGNATURE)) == SIGNATURE
    except OSError:
        return False


def read_series(series: Mapping[str, Hdf5Rows], clocks: Clocks) -> tuple[dict[str, Stream], dict[str, str]]:
    """Streams of data sets, and why others were skipped. Raises ``ValueError``, naming it, when one is damaged."""
    streams: dict[str, Stream] = {}
    skipped: dict[str, str] = {}
    for name, rows in series.items():
        if rows.missing:
            raise ValueError(f"{name}: {rows.missing}; half-written?")
        try:
            if not is_name(name):
                raise UnusableError("with a name that is none")
            streams[name] = array_stream(name, rows, clocks(len(rows)), rows.schema)
        except UnusableError as error:
            skipped[name] = str(error)
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({one_line(error)})") from error
    return streams, skipped


def describe(*attributes: Mapping[str, Any]) -> dict[str, Any]:
    """All that attributes say, also those in JSON; where two say the same, the earlier one counts."""
    described: dict[str, Any] = {}

    def add(values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            described.setdefault(key, value)
        for key in NESTED:
            nested = as_json(values[key]) if isinstance(values.get(key), str) else values.get(key)
            if isinstance(nested, dict):
                add(nested)

    for values in attributes:
        add(values)
    return described


def described_text(described: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The first of these that is a sentence, or a list of words or letters; empty when none is."""
    for key in keys:
        value = described.get(key)
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            value = ("" if all(len(part) <= 1 for part in value) else " ").join(value)
        if isinstance(value, str) and (sentence := " ".join(value.split()).strip('"')):
            return sentence
    return ""


def described_rate(described: Mapping[str, Any]) -> float | None:
    """Control steps per second, when an attribute says so."""
    for rate in (described.get(key) for key in RATES):
        if isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < 1e6:
            return float(rate)
    step, decimation = described.get("dt"), described.get("decimation")  # Isaac Lab's sim_args
    if isinstance(step, float) and isinstance(decimation, int) and math.isfinite(step) and step * decimation > 1e-6:
        return 1 / (step * decimation)
    return None


def as_flag(value: Any) -> bool | None:
    """``None`` for what is neither true nor false."""
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def as_json(text: str) -> Any:
    """``None`` for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def hash_of(file: Path, episode: str) -> str:
    """SHA-256 of a file that holds one episode; of the file's and the episode's name where it holds many."""
    whole = file_sha256(file)
    return hashlib.sha256(f"{whole} {episode!a}".encode()).hexdigest() if episode else whole


def _layout(file: Path) -> tuple[str, list[str]]:
    """Layout, and the groups of its episodes; ``[""]`` where the file is one episode.

    Raises ``UnusableError`` when there is none, ``OSError`` when the file is cut, damaged or no HDF5.
    """
    root = list_children(file, "")
    data = list_children(file, "data")
    demos = [key for key in data if key.startswith("demo_")]
    about = read_attributes(file, "data")
    if demos or "env_args" in about:
        if not demos:
            raise UnusableError("no group data/demo_<number>")
        layout = ("LIBERO" if "problem_info" in about else
                  "Isaac Lab" if "initial_state" in list_children(file, f"data/{demos[0]}") else "robomimic")
        return layout, [f"data/{key}" for key in sorted(data, key=lambda key: (_number(key), key))]
    if any(key.startswith("episode_") and "observations" in list_children(file, key) for key in root):
        raise UnusableError("a Minari set")
    if root.get("action") == "dataset" and root.get("observations") == "group":
        return "ALOHA", [""]
    if root.get("action") == "group" and "robot_state" in list_children(file, "observation"):
        return "DROID raw", [""]
    numbered = [key for key, kind in root.items() if kind == "group" and re.search(r"\d$", key)]
    if len(numbered) > 1:
        raise UnusableError(f"{len(numbered)} groups like {numbered[0]!a}: episodes of a layout that is not known")
    if not any(rows.dtype.kind in "biuf" and len(rows) > 1 for rows in list_series(file, "")[0].values()):
        raise UnusableError("no data set with rows of numbers")
    return "unknown", [""]


def _number(demo: str) -> int:
    """Of a group's name; beyond all others where it is no ``demo_<number>``."""
    match = re.fullmatch(r"demo_(\d{1,18})", demo)
    return int(match[1]) if match else NO_NUMBER


def _rows(series: Mapping[str, Hdf5Rows]) -> int:
    """Steps of an episode: of its actions, or else of most data sets. Raises ``ValueError`` when it has none."""
    actions = series.get("actions", series.get("action"))
    lengths = Counter(len(column) for column in series.values() if len(column) > 1)
    rows = max(lengths, key=lambda rows: (lengths[rows], rows), default=0) if actions is None else len(actions)
    if rows == 0:
        raise ValueError("no rows; an episode needs at least one step")
    return rows


def _clock(series: Mapping[str, Hdf5Rows], rows: int, described: Mapping[str, Any]
           ) -> tuple[Mapping[str, Float64[np.ndarray, " n"]], str]:
    """Clocks of every stream of an episode, and what they come from."""
    if DROID_TIME in series and series[DROID_TIME].shape == (rows,) and series[DROID_TIME].dtype.kind in "iuf":
        return {"log": series[DROID_TIME][:].astype(np.float64) / 1000}, f"{DROID_TIME}, in milliseconds"
    for key in TIMES:
        if key in series and series[key].shape in ((rows,), (rows, 1)) and series[key].dtype.kind == "f":
            clock = recorded_clock(series[key][:])
            if clock is not None:
                return clock, f"{key}, in seconds"
    rate = described_rate(described)
    return (index_clock(rows), "none") if rate is None else (nominal_clock(rows, rate), f"declared, {rate:g} Hz")


def _sentence(streams: Mapping[str, Hdf5Rows]) -> str:
    """An instruction that is kept as a data set of texts."""
    for key in INSTRUCTIONS:
        if key in streams and streams[key].dtype.kind == "S":
            return " ".join(streams[key][0].decode(errors="replace").split())
    return ""
