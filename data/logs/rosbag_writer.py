"""Write trajectories as ROS 2 bags (MCAP), one folder per episode: what the robot stand-in records for tests and docs.

Topics: ``/joint_states`` (sensor_msgs/JointState, proprio as positions), ``/command`` (sensor_msgs/JointState, the raw
action), ``/<camera>/compressed`` (sensor_msgs/CompressedImage, PNG), ``/instruction`` (std_msgs/String), ``/success``
(a JointState too, since it has a header: 1 where the task is done).
Header stamps are those of the trajectory; a message reaches the recorder ``delay`` later, as over a network.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from data.outcome import success_frames
from data.types import Spec, Statistics, Success, Trajectory, UserError

DELAY = 0.02
"""Seconds from a header's stamp to the recorder."""
BEGAN_NS = 1_700_000_000 * 10**9
"""Nanoseconds since 1970 at which a recording claims to begin: its wall clock would make every file different."""


def write_rosbags(
    path: str | Path, trajectories: Sequence[Trajectory], *, spec: Spec, statistics: Statistics
) -> None:
    """Write ``<path>/episode_00000`` and so on. Raises ``UserError`` when the folder holds something already."""
    folder = Path(path)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for number, trajectory in enumerate(trajectories):
        _write(folder / f"episode_{number:05d}", trajectory, spec, statistics)


def _write(path: Path, trajectory: Trajectory, spec: Spec, statistics: Statistics) -> None:
    store = get_typestore(Stores.ROS2_HUMBLE)
    types = store.types
    raw = statistics.denormalise(trajectory.action)
    commands = np.concatenate([raw, raw[-1:]])
    done = success_frames(trajectory.terminated, trajectory.reward, succeeded=trajectory.success is Success.YES)
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        known: dict[str, Any] = {}

        def write(topic: str, kind: str, time: float, **fields: Any) -> None:
            if topic not in known:
                known[topic] = writer.add_connection(topic, kind, typestore=store)
            writer.write(known[topic], BEGAN_NS + round((time + DELAY) * 1e9), store.serialize_cdr(
                types[kind](**fields), kind))

        def header(time: float) -> Any:
            stamp = BEGAN_NS + round(time * 1e9)
            made = types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9)
            return types["std_msgs/msg/Header"](stamp=made, frame_id="base")

        write("/instruction", "std_msgs/msg/String", 0.0, data=trajectory.instruction)
        for row, time in enumerate(trajectory.timestamp.tolist()):
            for topic, names, values in (("/joint_states", spec.proprio_names, trajectory.proprio[row]),
                                         ("/command", spec.action_names, commands[row])):
                write(topic, "sensor_msgs/msg/JointState", time, header=header(time), name=list(names),
                      position=values.astype(np.float64), velocity=np.zeros(0), effort=np.zeros(0))
            for camera in spec.cameras:
                encoded = io.BytesIO()
                Image.fromarray(trajectory.frames[camera][row]).save(encoded, "PNG")
                write(f"/{camera}/compressed", "sensor_msgs/msg/CompressedImage", time, header=header(time),
                      format="png", data=np.frombuffer(encoded.getvalue(), np.uint8))
            if trajectory.success is not Success.UNKNOWN:
                write("/success", "sensor_msgs/msg/JointState", time, header=header(time), name=["done"],
                      position=done[row : row + 1].astype(np.float64), velocity=np.zeros(0), effort=np.zeros(0))
