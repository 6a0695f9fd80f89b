"""Faults with a name, and the formats that can have them."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.logs import makers

LEROBOT = ("LeRobot v2.1", "LeRobot v3.0")
BAGS = ("rosbag2 MCAP", "rosbag2 sqlite3")
JOINTS = (*BAGS, "ROS 1")
STAMPED = (*JOINTS, "Foxglove json", "Foxglove protobuf")
ARRAYS = ("HDF5", "Minari")
ZARR = ("Zarr v2 folder", "Zarr v2 zip")
MADE = (*STAMPED, *ARRAYS, *ZARR, "RLDS")
"""Formats in which the faulty recording is simply written; LeRobot's tables are edited."""
GONE = {**dict.fromkeys(LEROBOT, "meta/info.json"), **dict.fromkeys(BAGS, "run_0/metadata.yaml"),
        "Minari": "door/human-v2/data/metadata.json", "Zarr v2 folder": "replay.zarr/data/action/.zarray",
        "RLDS": "features.json"}


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def _put_nan(values: np.ndarray) -> np.ndarray:
    values[4, 0] = np.nan
    return values


def _rewrite(kind: str, source: Path, **fields: Callable[[np.ndarray], np.ndarray]) -> None:
    shutil.rmtree(source)
    makers.write(kind, source, makers.changed(makers.demos(), **fields))


def _edit_table(source: Path, column: str, change: Callable[[list], list]) -> None:
    """In the first episode."""
    for file in sorted(source.glob("data/**/*.parquet"))[:1]:
        table = pq.read_table(file)
        place = table.schema.get_field_index(column)
        values = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
        pq.write_table(table.set_column(place, table.schema.field(column), values), file)


def _nan(kind: str, source: Path) -> None:
    if kind in LEROBOT:
        _edit_table(source, "observation.state", lambda rows: [*rows[:4], [float("nan"), 0.0], *rows[5:]])
    else:
        _rewrite(kind, source, state=_put_nan)


def _backwards(kind: str, source: Path) -> None:
    """Two rows swapped in the file, stamps and all; in a table, whose order is its time, the stamps alone."""
    order = [0, 1, 3, 2, 4, 5, 6, 7, 8, 9]
    if kind in LEROBOT:
        _edit_table(source, "timestamp", lambda rows: [*rows[:2], rows[3], rows[2], *rows[4:]])
    else:
        _rewrite(kind, source, **{name: lambda values: values[order]
                                  for name in ("time", "arrival", "state", "action", "pictures")})


def _bursts(kind: str, source: Path) -> None:
    """The recorder gets rows three at a time, 0.7 ms apart."""
    _rewrite(kind, source, arrival=lambda time: time[np.minimum(np.arange(10) // 3 * 3 + 2, 9)]
             + np.arange(10) % 3 * 0.0007)


def _names(kind: str, source: Path) -> None:
    """A name more than dimensions."""
    if kind in LEROBOT:
        file = source / "meta/info.json"
        info = json.loads(file.read_text())
        info["features"]["observation.state"]["names"].append("wrist")
        file.write_text(json.dumps(info))
    else:
        import dataclasses

        recorded = [dataclasses.replace(demo, names=(*demo.names, "wrist")) for demo in makers.demos()]
        shutil.rmtree(source)
        makers.write(kind, source, recorded)


def _video_folder(kind: str, source: Path) -> None:
    (source / "videos").rename(source / "movies")


def _metadata(kind: str, source: Path) -> None:
    if kind == "Zarr v2 zip":
        _rewrite_zip(source, lambda name, data: None if name == "data/action/.zarray" else data)
    elif kind == "HDF5":
        with h5py.File(source / "demos.hdf5", "a") as file:
            del file["data"].attrs["env_args"]
    elif kind in GONE:
        (source / GONE[kind]).unlink()
    else:  # an MCAP without schemas, a bag without definitions
        for file in source.rglob("run_*"):
            if file.is_file():
                content = re.sub(rb"(string name|float64\[\] position|uint8\[\] data|\"properties\")",
                                 lambda m: b"#" * len(m[0]), file.read_bytes())
                file.write_bytes(content)


def _none(kind: str, source: Path) -> None:
    if kind in LEROBOT:
        for file in [*source.glob("data/**/*.parquet"), *source.glob("meta/episodes/**/*.parquet")]:
            pq.write_table(pq.read_table(file).slice(0, 0), file)
        if (source / "meta/episodes.jsonl").exists():
            (source / "meta/episodes.jsonl").write_text("")
    elif kind in STAMPED:
        shutil.rmtree(source)
        makers.write(kind, source, makers.changed(makers.demos(), **dict.fromkeys(
            ("time", "arrival", "state", "action", "pictures"), lambda values: values[:0])))
    else:
        shutil.rmtree(source)
        makers.write(kind, source, [])


def _outside(kind: str, source: Path) -> None:
    """Names that lead out of the folder."""
    if kind in BAGS:
        file = source / "run_0/metadata.yaml"
        about = yaml.safe_load(file.read_text())
        about["rosbag2_bagfile_information"]["relative_file_paths"] = ["../../../../outside.mcap", "/outside.db3"]
        file.write_text(yaml.safe_dump(about))
    elif kind == "Zarr v2 zip":
        with zipfile.ZipFile(source / "replay.zarr.zip", "a") as archive:
            for name in ("../evil.txt", "../../../evil.txt", "data/../../evil/.zarray", "/tmp/wm-rl-evil.txt"):
                archive.writestr(name, "{}")
    elif kind in ARRAYS:
        with h5py.File(next(source.rglob("*.hdf5")), "a") as file:
            group = file["data/demo_0"] if kind == "HDF5" else file["episode_0"]
            group["away"] = h5py.ExternalLink("../../../outside.hdf5", "/x")
            group.create_dataset("raw", shape=(10,), dtype="f8", external=[("../../../outside.raw", 0, 80)])
    elif kind == "Zarr v2 folder":
        shutil.rmtree(source / "replay.zarr/data/action")
        (source / "replay.zarr/data/action").symlink_to("/tmp")
    else:
        file = source / "meta/info.json"
        info = json.loads(file.read_text())
        info["data_path"] = "../../../" + info["data_path"]
        file.write_text(json.dumps(info))


def _pickle(kind: str, source: Path) -> None:
    evil = pickle.dumps(np.array([Evil()] * 10, object))
    if kind in ARRAYS:
        with h5py.File(next(source.rglob("*.hdf5")), "a") as file:
            group = file["data/demo_0"] if kind == "HDF5" else file["episode_0"]
            group.attrs["pickled"] = np.void(evil)
            group["object"] = np.array([np.void(evil)] * 10)
            del group["actions"]
            group["actions"] = np.array([np.void(evil)] * 10)
    elif kind == "Zarr v2 folder":
        array = source / "replay.zarr/data/action"
        about = json.loads((array / ".zarray").read_text())
        (array / ".zarray").write_text(json.dumps(
            about | {"dtype": "|O", "compressor": None, "filters": [{"id": "pickle", "protocol": 4}]}))
        for chunk in array.glob("[0-9]*"):
            chunk.write_bytes(evil)
    else:
        def change(name: str, data: bytes) -> bytes:
            if name == "data/action/.zarray":
                return json.dumps(json.loads(data) | {
                    "dtype": "|O", "compressor": None, "filters": [{"id": "pickle", "protocol": 4}]}).encode()
            return evil if re.fullmatch(r"data/action/\d.*", name) else data
        _rewrite_zip(source, change)


def _rewrite_zip(source: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    path = source / "replay.zarr.zip"
    with zipfile.ZipFile(path) as archive:
        entries = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if data is not None:
                archive.writestr(name, data)


FAULTS: dict[str, tuple[Callable[[str, Path], None], tuple[str, ...]]] = {
    "no metadata": (_metadata, tuple(makers.WRITERS)),
    "a value that is NaN": (_nan, tuple(kind for kind in makers.WRITERS)),
    "rows out of order": (_backwards, (*LEROBOT, *STAMPED)),
    "arrival in bursts": (_bursts, STAMPED),
    "a name too many": (_names, (*LEROBOT, *JOINTS)),
    "videos in another folder": (_video_folder, LEROBOT),
    "no episodes": (_none, tuple(makers.WRITERS)),
    "paths that lead outside": (_outside, (*LEROBOT, *BAGS, *ARRAYS, *ZARR)),
    "a pickled object": (_pickle, (*ARRAYS, *ZARR)),
}


def faults(kind: str) -> list[str]:
    """Those of a format."""
    return [name for name, (_, kinds) in FAULTS.items() if kind in kinds]


def damage(kind: str, source: Path, fault: str) -> None:
    """Do it to a copy of the log."""
    FAULTS[fault][0](kind, source)


def around(source: Path) -> list[str]:
    """What lies in the case's folder outside of the log, but for the store, and what a hostile log might make."""
    box = source.parents[2]
    found = [str(path) for path in sorted(box.rglob("*"))
             if not path.is_relative_to(source) and not path.is_relative_to(box / "store")]
    return found + [str(path) for path in (Path("/tmp/wm-rl-evil.txt"), box / "pwned") if path.exists()]
