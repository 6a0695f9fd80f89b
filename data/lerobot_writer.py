"""Write trajectories as a LeRobot data set, format v2.1 or v3.0: what the robot stand-in and the tests record.

A trajectory of ``t`` steps becomes ``t + 1`` rows, one per observation. LeRobot has an action in every row, so the
last row repeats the last action; ``data.logs`` drops it again.

Beyond the format, ``meta/episodes`` carries ``task_name``, ``success`` and ``provenance`` (JSON); other readers
ignore them. ``meta/info.json`` carries the statistics that the actions were normalised by, with their fingerprint.
LeRobot's own statistics are written for state and action, not for pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data.lerobot import ACTION, NORMALISED, STATE, SUCCESS, VERSIONS
from data.outcome import steps_until_decided, success_frames
from data.types import Spec, Statistics, Success, Trajectory, UserError

CAMERA_PREFIX = "observation.images."
_KEYFRAME_EVERY = 10
_QUALITY = {"crf": "14", "preset": "fast"}


def write_lerobot(
    path: str | Path,
    trajectories: Sequence[Trajectory],
    *,
    spec: Spec,
    statistics: Statistics,
    fps: float,
    version: str = "v2.1",
) -> None:
    """Write a new set; actions are written in raw units, ``statistics.denormalise(action)``, video as H.264.

    Raises ``UserError`` when ``path`` exists, when the image size is odd (yuv420p), or for another version.
    """
    path = Path(path)
    if version not in VERSIONS:
        raise UserError(f"LeRobot version: expected {' or '.join(VERSIONS)}, got {version!r}")
    if path.exists():
        raise UserError(f"cannot write a LeRobot set: {path} exists already; choose another folder")
    if spec.image_size % 2:
        raise UserError(f"cannot write a LeRobot set: H.264 needs an even image size, got {spec.image_size}")
    tasks = sorted({t.instruction for t in trajectories})
    tables = []
    offset = 0
    for index, trajectory in enumerate(trajectories):
        task_index = tasks.index(trajectory.instruction)
        tables.append(_rows(trajectory, statistics, fps=fps, index=index, task=task_index, offset=offset))
        offset += len(trajectory) + 1
    described = [_describe(index, trajectory) for index, trajectory in enumerate(trajectories)]
    write = _write_v2 if version == "v2.1" else _write_v3
    write(path, trajectories, tables, described, tasks, spec=spec, fps=fps)
    # Last, so that a set whose writing was cut short has no info.json and is refused.
    info = _info(spec, trajectories[0].embodiment, version, fps=fps, episodes=len(trajectories), frames=offset,
                 tasks=len(tasks)) | {NORMALISED: statistics.to_dict()}
    (path / "meta/info.json").write_text(json.dumps(info, indent=4))


def _write_v2(path: Path, trajectories: Sequence[Trajectory], tables: Sequence[pa.Table],
              described: Sequence[dict[str, Any]], tasks: Sequence[str], *, spec: Spec, fps: float) -> None:
    for index, (trajectory, table) in enumerate(zip(trajectories, tables, strict=True)):
        for camera in spec.cameras:
            _write_video(path / f"videos/chunk-000/{CAMERA_PREFIX}{camera}/episode_{index:06d}.mp4",
                         trajectory.frames[camera], fps)
        _write_table(path / f"data/chunk-000/episode_{index:06d}.parquet", table)
    (path / "meta").mkdir()
    stats = [{"episode_index": i, "stats": _stats([table])} for i, table in enumerate(tables)]
    lines = {"episodes": described, "episodes_stats": stats,
             "tasks": [{"task_index": i, "task": task} for i, task in enumerate(tasks)]}
    for name, rows in lines.items():
        (path / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_v3(path: Path, trajectories: Sequence[Trajectory], tables: Sequence[pa.Table],
              described: Sequence[dict[str, Any]], tasks: Sequence[str], *, spec: Spec, fps: float) -> None:
    for camera in spec.cameras:
        frames = (frame for trajectory in trajectories for frame in trajectory.frames[camera])
        _write_video(path / f"videos/{CAMERA_PREFIX}{camera}/chunk-000/file-000.mp4", frames, fps)
    _write_table(path / "data/chunk-000/file-000.parquet", pa.concat_tables(tables))
    start, rows = 0, []
    for entry in described:
        end = start + entry["length"]
        row = entry | {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": start,
                       "dataset_to_index": end, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for camera in spec.cameras:
            key = f"videos/{CAMERA_PREFIX}{camera}"
            row |= {f"{key}/chunk_index": 0, f"{key}/file_index": 0,
                    f"{key}/from_timestamp": start / fps, f"{key}/to_timestamp": end / fps}
        rows.append(row)
        start = end
    _write_table(path / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows))
    # The package takes a task's sentence from pandas's index: as a plain column it would be lost.
    numbered = pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(tasks, name="task"))
    _write_table(path / "meta/tasks.parquet", pa.Table.from_pandas(numbered))
    (path / "meta/stats.json").write_text(json.dumps(_stats(tables), indent=4))


def _rows(trajectory: Trajectory, statistics: Statistics, *, fps: float, index: int, task: int,
          offset: int) -> pa.Table:
    rows = len(trajectory) + 1
    raw = statistics.denormalise(trajectory.action)
    done = np.arange(rows) >= steps_until_decided(trajectory.terminated) - 1  # also in the row after the last action
    columns = {
        STATE: _vectors(trajectory.proprio),
        ACTION: _vectors(np.concatenate([raw, raw[-1:]])),
        "timestamp": pa.array((np.arange(rows) / fps).astype(np.float32)),
        "frame_index": pa.array(np.arange(rows)),
        "episode_index": pa.array(np.full(rows, index)),
        "index": pa.array(offset + np.arange(rows)),
        "task_index": pa.array(np.full(rows, task)),
        "next.reward": pa.array(np.append(trajectory.reward, np.float32(0))),
        "next.done": pa.array(done),
    }
    if trajectory.success is not Success.UNKNOWN:
        shown = success_frames(trajectory.terminated, trajectory.reward, succeeded=trajectory.success is Success.YES)
        if trajectory.success is Success.YES and not shown.any():
            shown[-1] = True  # at the latest: nobody knows the frame of a success that did not terminate
        columns[SUCCESS] = pa.array(np.append(shown[1:], shown[-1]))
    else:
        columns[SUCCESS] = pa.array(np.zeros(rows, bool))
    return pa.table(columns)


def _describe(index: int, trajectory: Trajectory) -> dict[str, Any]:
    return {"episode_index": index, "tasks": [trajectory.instruction], "length": len(trajectory) + 1,
            "task_name": trajectory.task, "success": trajectory.success.value,
            "provenance": json.dumps(dict(trajectory.provenance))}


def _info(spec: Spec, embodiment: str, version: str, *, fps: float, episodes: int, frames: int,
          tasks: int) -> dict[str, Any]:
    size = spec.image_size
    features: dict[str, Any] = {
        STATE: {"dtype": "float32", "shape": [spec.proprio_dim], "names": list(spec.proprio_names)},
        ACTION: {"dtype": "float32", "shape": [spec.action_dim], "names": list(spec.action_names)},
    }
    for camera in spec.cameras:
        details = {"video.height": size, "video.width": size, "video.codec": "h264", "video.pix_fmt": "yuv420p",
                   "video.is_depth_map": False, "video.fps": fps, "video.channels": 3, "has_audio": False}
        features[CAMERA_PREFIX + camera] = {"dtype": "video", "shape": [size, size, 3],
                                            "names": ["height", "width", "channels"], "info": details}
    scalars = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64",
               "task_index": "int64", "next.reward": "float32", "next.done": "bool", SUCCESS: "bool"}
    features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in scalars.items()}
    info = {"codebase_version": version, "robot_type": embodiment, "total_episodes": episodes,
            "total_frames": frames, "total_tasks": tasks, "chunks_size": 1000,
            "fps": int(fps) if fps == int(fps) else fps, "splits": {"train": f"0:{episodes}"}, "features": features}
    if version == "v2.1":
        name = "chunk-{episode_chunk:03d}/"
        return info | {"total_videos": episodes * len(spec.cameras), "total_chunks": 1,
                       "data_path": f"data/{name}episode_{{episode_index:06d}}.parquet",
                       "video_path": f"videos/{name}{{video_key}}/episode_{{episode_index:06d}}.mp4"}
    name = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    return info | {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
                   "data_path": f"data/{name}.parquet", "video_path": f"videos/{{video_key}}/{name}.mp4"}


def _stats(tables: Sequence[pa.Table]) -> dict[str, Mapping[str, Any]]:
    stats: dict[str, Mapping[str, Any]] = {}
    for name in (STATE, ACTION):
        values = np.array([row for table in tables for row in table[name].to_pylist()], np.float64)
        stats[name] = {"min": values.min(0).tolist(), "max": values.max(0).tolist(), "mean": values.mean(0).tolist(),
                       "std": values.std(0).tolist(), "count": [len(values)]}
    return stats


def _vectors(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _write_table(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def _write_video(file: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Encode ``[h, w, 3]`` uint8 frames."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(10_000)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=_QUALITY)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = _KEYFRAME_EVERY
        stream.codec_context.thread_count = 1  # with more, one encoding in some thousand came out different
        for i, picture in enumerate(frames):
            if i == 0:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
