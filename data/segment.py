"""One sealed segment of a replay store: the episodes of one append, as a plain Zarr v3 group.

Every array has one uncompressed chunk, whose file is the array's bytes in C order. So any Zarr reader opens a
segment, and this module reads it with ``np.memmap`` and ``np.fromfile`` without the Zarr library.

An episode of ``t`` control steps takes ``t + 1`` rows; its last row holds the final observation and no action.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.types import NOT_OURS, UNKNOWN_TOKEN, Behaviour, Source, Spec, Success, Trajectory, UserError

SCHEMA_VERSION = 1

OBSERVED = {"proprio": "<f4", "timestamp": "<f8"}
"""Columns with a value in every row, and their dtype on disk."""

ACTED = {"action": "<f4", "action_token": "<i2", "log_prob": "<f4", "reward": "<f4", "terminated": "|b1",
         "truncated": "|b1", "decision": "|b1", "policy_version": "<i8", "uncertainty": "<f4"}
"""Columns of control steps; an episode's last row holds their ``FINAL`` value."""

FINAL = {"action": 0, "action_token": UNKNOWN_TOKEN, "log_prob": np.nan, "reward": 0, "terminated": False,
         "truncated": False, "decision": False, "policy_version": NOT_OURS, "uncertainty": 0}

UNITS = {"timestamp": "s since the episode began", "action": "normalised to [-1, 1] by the store's statistics",
         "action_token": f"bin; {UNKNOWN_TOKEN}: nobody tokenised", "log_prob": "nat; NaN: unknown",
         "policy_version": f"gradient updates; {NOT_OURS}: not one of ours"}

_ZARR_TYPES = {"|u1": "uint8", "|b1": "bool", "<i2": "int16", "<i8": "int64", "<f4": "float32", "<f8": "float64"}


def field_table(spec: Spec) -> dict[str, dict[str, Any]]:
    """Every per-row array of a segment: shape of one row, dtype, dimension names, unit. Stored as an attribute."""
    axes: dict[str, tuple[list[int], list[str]]] = {"proprio": ([spec.proprio_dim], ["proprio_name"])}
    axes |= {name: ([spec.action_dim], ["action_name"]) for name in ("action", "action_token", "log_prob")}
    table = {}
    for name, dtype in (OBSERVED | ACTED).items():
        shape, dimensions = axes.get(name, ([], []))
        table[name] = {"shape": shape, "dtype": dtype, "dimensions": ["time", *dimensions],
                       "unit": UNITS.get(name, "")}
    size = spec.image_size
    for camera in spec.cameras:
        table[f"rgb_{camera}"] = {"shape": [size, size, 3], "dtype": "|u1", "unit": "RGB",
                                  "dimensions": ["time", "height", "width", "channel"]}
    return table


def write_group(path: Path, attributes: Mapping[str, Any]) -> None:
    """Make the folder a Zarr v3 group."""
    path.mkdir(parents=True, exist_ok=True)
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (path / "zarr.json").write_text(json.dumps(metadata, indent=1, allow_nan=False))


def read_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a group."""
    return json.loads((path / "zarr.json").read_text())["attributes"]


def write_array(path: Path, parts: Iterable[np.ndarray], *, dtype: str, dimensions: Sequence[str]) -> None:
    """Write ``parts``, concatenated along their first axis, as a Zarr v3 array of one uncompressed chunk."""
    path.mkdir()
    rows, row_shape = 0, ()
    with (path / _chunk_name(len(dimensions))).open("wb") as file:
        for part in parts:
            part = np.ascontiguousarray(part, dtype)
            rows, row_shape = rows + len(part), part.shape[1:]
            file.write(part.data)
    shape = [rows, *row_shape]
    kind = _ZARR_TYPES[dtype]
    metadata = {
        "zarr_format": 3, "node_type": "array", "shape": shape, "data_type": kind,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": False if kind == "bool" else 0, "attributes": {}, "dimension_names": list(dimensions),
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    (path / "zarr.json").write_text(json.dumps(metadata))


def write_segment(path: Path, trajectories: Sequence[Trajectory], spec: Spec) -> None:
    """Write the group ``path``. Nothing else may read it before it is moved to where readers look."""
    write_group(path, {"schema_version": SCHEMA_VERSION, "episodes": [_describe(t) for t in trajectories]})
    for name, field in field_table(spec).items():
        write_array(path / name, (_rows(t, name) for t in trajectories),
                    dtype=field["dtype"], dimensions=field["dimensions"])
    lengths = np.array([len(t) for t in trajectories])
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    write_array(path / "ep_start", [starts], dtype="<i8", dimensions=["episode"])
    write_array(path / "ep_len", [lengths], dtype="<i8", dimensions=["episode"])


class Segment:
    """A segment on disk. Small columns are read into memory once; frames stay mapped files.

    ``columns`` are the rows as recorded, except where an ``overlay`` group (see ``ReplayStore.label_behaviour``)
    gives episodes of unknown behaviour a cloned one.
    """

    def __init__(self, path: Path, spec: Spec, overlay: Path | None) -> None:
        """Raises ``UserError`` when a file is missing or not as long as the segment's rows say."""
        self.name = path.name
        attributes = read_attributes(path)
        self.episodes: list[dict[str, Any]] = attributes["episodes"]
        self.lengths = _read(path / "ep_len", "<i8", (len(self.episodes),))
        self.starts = _read(path / "ep_start", "<i8", (len(self.episodes),))
        self.rows = int(self.starts[-1] + self.lengths[-1] + 1)
        self.columns: dict[str, np.ndarray] = {}
        for name, field in field_table(spec).items():
            read = _map if name.startswith("rgb_") else _read
            self.columns[name] = read(path / name, field["dtype"], (self.rows, *field["shape"]))
        self.behaviours = [Behaviour(episode["behaviour"]) for episode in self.episodes]
        if overlay is not None:
            self._lay_over(overlay)

    def _lay_over(self, overlay: Path) -> None:
        unknown = self.unknown_rows()
        for name in ("action_token", "log_prob", "decision"):
            column = self.columns[name]
            column[unknown] = _read(overlay / name, ACTED[name], column.shape)[unknown]
        self.behaviours = [Behaviour.CLONED if b is Behaviour.UNKNOWN else b for b in self.behaviours]

    def unknown_rows(self) -> np.ndarray:
        """``[rows]`` bool: control steps of episodes whose recorded behaviour is unknown."""
        mask = np.zeros(self.rows, bool)
        for start, length, episode in zip(self.starts, self.lengths, self.episodes, strict=True):
            mask[start : start + length] = episode["behaviour"] == Behaviour.UNKNOWN
        return mask

    @cached_property
    def decisions(self) -> list[np.ndarray]:
        """Per episode, the rows of this segment at which its policy decided."""
        rows = np.flatnonzero(self.columns["decision"])
        return [rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + length)]
                for start, length in zip(self.starts, self.lengths, strict=True)]

    def trajectory(self, row: int, cameras: Sequence[str]) -> Trajectory:
        """Episode ``row``, copied out of the segment."""
        start, steps = self.starts[row], self.lengths[row]
        episode = self.episodes[row]
        values: dict[str, Any] = {name: self.columns[name][start : start + steps].copy() for name in ACTED}
        values |= {name: self.columns[name][start : start + steps + 1].copy() for name in OBSERVED}
        frames = {camera: self.columns[f"rgb_{camera}"][start : start + steps + 1].copy() for camera in cameras}
        return Trajectory(
            frames=frames, **values, source=Source(episode["source"]), success=Success(episode["success"]),
            behaviour=self.behaviours[row],
            **{name: episode[name] for name in ("task", "instruction", "embodiment", "world_model_version",
                                                "provenance")})


def _describe(trajectory: Trajectory) -> dict[str, Any]:
    names = ("source", "task", "instruction", "success", "behaviour", "embodiment", "world_model_version")
    return {**{name: getattr(trajectory, name) for name in names}, "provenance": dict(trajectory.provenance)}


def _rows(trajectory: Trajectory, name: str) -> np.ndarray:
    if name.startswith("rgb_"):
        return trajectory.frames[name.removeprefix("rgb_")]
    values = getattr(trajectory, name)
    if name in OBSERVED:
        return values
    return np.concatenate([values, np.full((1, *values.shape[1:]), FINAL[name], values.dtype)])


def _chunk_name(dimensions: int) -> str:
    return "c" + ".0" * dimensions


def _read(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.fromfile(_checked(path, dtype, shape), dtype).reshape(shape)


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    # A plain ndarray over the mapping: np.memmap's own __getitem__ costs microseconds per slice.
    return np.memmap(_checked(path, dtype, shape), dtype, "r", shape=shape).view(np.ndarray)


def _checked(path: Path, dtype: str, shape: tuple[int, ...]) -> Path:
    """The chunk's file. Zarr reads a missing or short one as fill values without an error, so its size is compared."""
    file = path / _chunk_name(len(shape))
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    found = file.stat().st_size if file.exists() else 0
    if found != expected:
        raise UserError(f"damaged segment: {file} should have {expected} bytes, found {found}; "
                        f"restore it, or move the folder {path.parent} out of the store")
    return file
