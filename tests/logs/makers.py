"""One small recording, written as a valid log of every format that is read."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import zarr
from PIL import Image

from data.lerobot_writer import write_lerobot
from data.logs.trajectory import log_trajectory
from data.types import Spec, Statistics, Success
from tests.logs import bags
from tests.logs import test_foxglove as foxglove
from tests.logs import test_rlds as rlds
from tests.logs import test_zarr_v2 as zarr_v2

JOINTS, COMMANDS = ("shoulder", "elbow"), ("shoulder", "elbow", "grip")
RATE = 10.0
SENTENCE = "stack the cubes"
SECOND = 10**9
START = 1_700_000_000 * SECOND
DELAY = SECOND // 50
"""Nanoseconds from a header's stamp to the recorder."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What was recorded: ``r`` rows."""

    time: np.ndarray
    """``[r]`` seconds since the beginning: the sensors' stamps."""
    arrival: np.ndarray
    """``[r]`` seconds: when the recorder got the rows, in the order in which they are written."""
    state: np.ndarray
    action: np.ndarray
    pictures: np.ndarray
    names: tuple[str, ...] = JOINTS


def demos(episodes: int = 2, rows: int = 10, size: int = 16) -> list[Demo]:
    """Random numbers, every row another; pictures that H.264 keeps apart."""
    draw = np.random.default_rng(0)
    time = np.arange(rows) / RATE
    level = np.linspace(0, 60, size)[None, :, None, None] + np.arange(rows)[:, None, None, None] * 12
    return [Demo(time=time, arrival=time + DELAY / SECOND, state=draw.normal(size=(rows, 2)).astype("f4").astype("f8"),
                 action=draw.uniform(-1, 1, (rows, 3)).astype("f4").astype("f8"),
                 pictures=np.broadcast_to(level + np.array([0, 20, 40]) + 20 * number, (rows, size, size, 3))
                 .astype(np.uint8)) for number in range(episodes)]


def png(picture: np.ndarray) -> bytes:
    """Encoded."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def _lerobot(version: str) -> Callable[[Path, Sequence[Demo]], None]:
    def write(folder: Path, recorded: Sequence[Demo]) -> None:
        statistics = Statistics(action_low=-np.ones(3, "f4"), action_high=np.ones(3, "f4"),
                                proprio_mean=np.zeros(2, "f4"), proprio_std=np.ones(2, "f4"))
        spec = Spec(cameras=("front",), image_size=recorded[0].pictures.shape[1], proprio_names=JOINTS,
                    action_names=COMMANDS, control_hz=RATE)
        made = [log_trajectory(
            frames={"front": demo.pictures}, proprio=demo.state.astype("f4"), action=demo.action.astype("f4"),
            shows_success=np.zeros(len(demo.time) - 1, bool), success=Success.UNKNOWN, timestamp=demo.time,
            statistics=statistics, task=SENTENCE, instruction=SENTENCE, embodiment="arm", provenance={})
            for demo in recorded]
        folder.rmdir()
        write_lerobot(folder, made, spec=spec, statistics=statistics, fps=RATE, version=version)
    return write


def messages(demo: Demo, store=bags.ROS2):
    """As a recorder would write them: (topic, type, log time, message), row by row."""
    for i in range(len(demo.time)):
        stamp, log = START + round(demo.time[i] * SECOND), START + round(demo.arrival[i] * SECOND)
        for topic, names, values in (("/joint_states", demo.names, demo.state), ("/command", COMMANDS, demo.action)):
            yield (topic, "sensor_msgs/msg/JointState", log, bags.joints(values[i], stamp, names, store))
        yield ("/front/compressed", "sensor_msgs/msg/CompressedImage", log, bags.make(
            "sensor_msgs/msg/CompressedImage", store, header=bags.header(stamp, store), format="png",
            data=np.frombuffer(png(demo.pictures[i]), np.uint8)))


def _mcap(folder: Path, recorded: Sequence[Demo]) -> None:
    """Chunks of some messages, without checksums, as many recorders leave them out."""
    for number, demo in enumerate(recorded):
        bag = folder / f"run_{number}"
        written = list(messages(demo))
        bags.write_bag(bag, written, bags.MCAP)
        (file,) = bag.glob("*.mcap")
        bags.write_mcap(file, written, chunk_size=700, enable_crcs=False)


def _sqlite(folder: Path, recorded: Sequence[Demo]) -> None:
    for number, demo in enumerate(recorded):
        bags.write_bag(folder / f"run_{number}", messages(demo), bags.SQLITE)


def _ros1(folder: Path, recorded: Sequence[Demo]) -> None:
    for number, demo in enumerate(recorded):
        bags.write_bag1(folder / f"run_{number}.bag", messages(demo, bags.ROS1))


def _foxglove(kind: str) -> Callable[[Path, Sequence[Demo]], None]:
    """Chunks of some messages, with the checksums that the library writes."""
    def write(folder: Path, recorded: Sequence[Demo]) -> None:
        for number, demo in enumerate(recorded):
            messages = []
            for i in range(len(demo.time)):
                log = START + round(demo.arrival[i] * SECOND)
                stamp, nanoseconds = divmod(START + round(demo.time[i] * SECOND), SECOND)
                for topic, values in (("/state", demo.state), ("/command", demo.action)):
                    messages.append(_vector(kind, topic, values[i].tolist(), stamp, nanoseconds, log))
                messages.append(_picture(kind, png(demo.pictures[i]), stamp, nanoseconds, log))
            foxglove.write(folder / f"run_{number}.mcap", messages, chunk_size=700)
    return write


def _vector(kind: str, topic: str, values: list[float], stamp: int, nanoseconds: int, log: int):
    if kind == "json":
        return foxglove.js(topic, {"timestamp": {"sec": stamp, "nsec": nanoseconds}, "q": values}, log)
    return foxglove.proto(topic, foxglove.CLASSES["my.State"](q=values, count=0), log)


def _picture(kind: str, data: bytes, stamp: int, nanoseconds: int, log: int):
    if kind == "json":
        value = {"timestamp": {"sec": stamp, "nsec": nanoseconds}, "frame_id": "eye", "format": "png",
                 "data": foxglove.base64.b64encode(data).decode()}
        return foxglove.js("/eye", value, log, name="foxglove.CompressedImage", schema=foxglove.BASE64)
    message = foxglove.CLASSES["foxglove.CompressedImage"](frame_id="eye", format="png", data=data)
    message.timestamp.seconds, message.timestamp.nanos = stamp, nanoseconds
    return foxglove.proto("/eye", message, log)


def _hdf5(folder: Path, recorded: Sequence[Demo]) -> None:
    """The layout of robomimic."""
    with h5py.File(folder / "demos.hdf5", "w") as file:
        group = file.create_group("data")
        group.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": RATE}})
        for number, demo in enumerate(recorded):
            one = group.create_group(f"demo_{number}")
            one.attrs["num_samples"] = len(demo.time)
            one["actions"], one["obs/joints"], one["obs/front_image"] = demo.action, demo.state, demo.pictures


def _minari(folder: Path, recorded: Sequence[Demo]) -> None:
    data = folder / "door/human-v2/data"
    data.mkdir(parents=True)
    with h5py.File(data / "main_data.hdf5", "w", track_order=True) as file:
        for number, demo in enumerate(recorded):
            group, steps = file.create_group(f"episode_{number}"), len(demo.time) - 1
            group.attrs.update({"id": number, "total_steps": steps})
            group["observations/joints"], group["observations/camera"] = demo.state, demo.pictures
            group["actions"], group["rewards"] = demo.action[:-1], np.zeros(steps)
            group["terminations"], group["truncations"] = np.zeros(steps, bool), np.arange(steps) == steps - 1
    (data / "metadata.json").write_text(json.dumps({
        "total_episodes": len(recorded), "total_steps": sum(len(demo.time) - 1 for demo in recorded),
        "data_format": "hdf5", "minari_version": "0.5.4", "dataset_id": "door/human-v2"}))


def _zarr(folder: Path, recorded: Sequence[Demo]) -> None:
    root = zarr.open_group(folder / "replay.zarr", mode="w", zarr_format=2)
    data = root.create_group("data")
    if recorded:
        zarr_v2.put(data, "action", np.concatenate([demo.action for demo in recorded]), (5, 3))
        zarr_v2.put(data, "robot0_joints", np.concatenate([demo.state for demo in recorded]), (5, 2))
        pictures = np.concatenate([demo.pictures for demo in recorded])
        zarr_v2.put(data, "camera0_rgb", pictures, (1, *pictures.shape[1:]))
    ends = np.cumsum([len(demo.time) for demo in recorded]).astype("i8")
    zarr_v2.put(root.create_group("meta"), "episode_ends", ends, chunks=(max(1, len(ends)),))


def _zarr_zip(folder: Path, recorded: Sequence[Demo]) -> None:
    _zarr(folder, recorded)
    zarr_v2.zip_of(folder / "replay.zarr", folder / "replay.zarr.zip")
    shutil.rmtree(folder / "replay.zarr")


def _rlds(folder: Path, recorded: Sequence[Demo]) -> None:
    features = rlds.features_dict(steps={
        "pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset", "sequence": {
            "length": "-1", "feature": rlds.features_dict(
                observation=rlds.features_dict(
                    image={"image": {"shape": {"dimensions": ["16", "16", "3"]}, "dtype": "uint8",
                                     "encodingFormat": "png"}}, state=rlds.tensor("float32", 2)),
                action=rlds.tensor("float32", 3), language_instruction={"text": {}})}})
    rlds.write_set(folder, [[{
        "steps/observation/image": [png(picture) for picture in demo.pictures],
        "steps/observation/state": demo.state.astype("f4"), "steps/action": demo.action.astype("f4"),
        "steps/language_instruction": [SENTENCE.encode()] * len(demo.time)} for demo in recorded]], features=features)


WRITERS: dict[str, Callable[[Path, Sequence[Demo]], None]] = {
    "LeRobot v2.1": _lerobot("v2.1"), "LeRobot v3.0": _lerobot("v3.0"), "rosbag2 MCAP": _mcap,
    "rosbag2 sqlite3": _sqlite, "ROS 1": _ros1, "Foxglove json": _foxglove("json"),
    "Foxglove protobuf": _foxglove("protobuf"), "HDF5": _hdf5, "Minari": _minari, "Zarr v2 folder": _zarr,
    "Zarr v2 zip": _zarr_zip, "RLDS": _rlds}


def write(kind: str, folder: Path, recorded: Sequence[Demo]) -> Path:
    """Write a valid log of this format into a new folder."""
    folder.mkdir(parents=True)
    WRITERS[kind](folder, recorded)
    return folder


def changed(recorded: Sequence[Demo], **fields: Callable[[np.ndarray], np.ndarray]) -> list[Demo]:
    """The recording with some fields computed anew."""
    return [dataclasses.replace(demo, **{name: change(getattr(demo, name).copy()) for name, change in fields.items()})
            for demo in recorded]
