"""Logs of realistic size, made for measurements: 640 x 480 pictures at 15 Hz, 7 joints, commands."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import yaml
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from data.lerobot_writer import write_lerobot
from data.logs.trajectory import log_trajectory
from data.types import Spec, Statistics, Success

RATE = 15.0
JOINTS = tuple(f"joint_{i}" for i in range(7))
HEIGHT, WIDTH = 480, 640
_PICTURES = 45
"""Different ones; they repeat every 3 s."""
_BEGAN = 1_700_000_000 * 10**9

BAG_MAPPING = {"proprio": [{"stream": "/joint_states.position"}], "action": [{"stream": "/command.position"}],
               "cameras": {"front": {"stream": "/front/compressed"}}, "clock": "header", "rate": RATE,
               "embodiment": "arm", "instruction": "sort the parts"}


def make_bags(folder: Path, episodes: int, seconds: float) -> list[Path]:
    """ROS 2 bags (MCAP), an episode each, with JPEG pictures, and ``mapping.yaml``; returns the files with pictures.

    Kept where they are when they were made before.
    """
    made = folder / "finished"
    if not made.exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "bags").mkdir(parents=True)
        encoded = []
        for picture in _scene():
            content = io.BytesIO()
            Image.fromarray(picture).save(content, "JPEG", quality=90)
            encoded.append(np.frombuffer(content.getvalue(), np.uint8))
        for number in range(episodes):
            _write_bag(folder / f"bags/run_{number:03d}", encoded, round(seconds * RATE), number)
        (folder / "mapping.yaml").write_text(yaml.safe_dump(BAG_MAPPING))
        made.touch()
    return sorted((folder / "bags").glob("*/*.mcap"))


def _write_bag(path: Path, encoded: Sequence[UInt8[np.ndarray, " n"]], rows: int, seed: int) -> None:
    store = get_typestore(Stores.ROS2_HUMBLE)
    types, draw = store.types, np.random.default_rng(seed)
    joints, pictures = "sensor_msgs/msg/JointState", "sensor_msgs/msg/CompressedImage"
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        topics = {topic: writer.add_connection(topic, kind, typestore=store) for topic, kind in (
            ("/joint_states", joints), ("/command", joints), ("/front/compressed", pictures))}
        for row in range(rows):
            stamp = _BEGAN + round(row / RATE * 1e9)
            header = types["std_msgs/msg/Header"](
                stamp=types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9), frame_id="base")
            for topic in ("/joint_states", "/command"):
                message = types[joints](header=header, name=list(JOINTS), position=draw.uniform(-1, 1, len(JOINTS)),
                                        velocity=np.zeros(0), effort=np.zeros(0))
                writer.write(topics[topic], stamp, store.serialize_cdr(message, joints))
            image = types[pictures](header=header, format="jpeg", data=encoded[row % len(encoded)])
            writer.write(topics["/front/compressed"], stamp, store.serialize_cdr(image, pictures))


def make_lerobot(folder: Path, episodes: int, seconds: float) -> list[Path]:
    """A LeRobot set, v2.1, with H.264 video, every episode's the same; returns the videos.

    Kept where it is when it was made before.
    """
    made, path = folder / "finished", folder / "set"
    if not made.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rows = round(seconds * RATE)
        spec = Spec(cameras=("front",), image_size=16, proprio_names=JOINTS, action_names=JOINTS, control_hz=RATE)
        ones = np.ones(len(JOINTS), np.float32)
        statistics = Statistics(action_low=-ones, action_high=ones, proprio_mean=0 * ones, proprio_std=ones)
        write_lerobot(path, [log_trajectory(
            frames={"front": np.zeros((rows, 16, 16, 3), np.uint8)},
            proprio=np.random.default_rng(seed).uniform(-1, 1, (rows, 7)).astype(np.float32),
            action=np.random.default_rng(seed + 1).uniform(-1, 1, (rows, 7)).astype(np.float32),
            shows_success=np.zeros(rows - 1, bool), success=Success.UNKNOWN, timestamp=np.arange(rows) / RATE,
            statistics=statistics, task="sort the parts", instruction="sort the parts", embodiment="arm",
            provenance={}) for seed in range(episodes)], spec=spec, statistics=statistics, fps=RATE)
        info = json.loads((path / "meta/info.json").read_text())
        info["features"]["observation.images.front"]["shape"] = [HEIGHT, WIDTH, 3]
        (path / "meta/info.json").write_text(json.dumps(info))
        _write_video(folder / "video.mp4", rows)
        for file in path.glob("videos/**/*.mp4"):
            shutil.copyfile(folder / "video.mp4", file)
        made.touch()
    return sorted(path.glob("videos/**/*.mp4"))


def _write_video(file: Path, rows: int) -> None:
    pictures = _scene()
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=round(RATE), options={"crf": "23", "preset": "veryfast"})
        stream.pix_fmt, stream.height, stream.width = "yuv420p", HEIGHT, WIDTH
        for row in range(rows):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures[row % len(pictures)], format="rgb24")))
        container.mux(stream.encode())


def _scene() -> list[UInt8[np.ndarray, "h w 3"]]:
    """A block that moves over a table with some grain, as a camera has it."""
    draw = np.random.default_rng(0)
    table = draw.integers(90, 130, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    made = []
    for i in range(_PICTURES):
        picture = Image.fromarray(np.clip(table + draw.normal(0, 3, table.shape), 0, 255).astype(np.uint8))
        angle = 2 * np.pi * i / _PICTURES
        x, y = WIDTH * (0.5 + 0.3 * np.cos(angle)), HEIGHT * (0.5 + 0.3 * np.sin(angle))
        ImageDraw.Draw(picture).rectangle((x - 40, y - 40, x + 40, y + 40), fill=(200, 60, 40))
        made.append(np.asarray(picture))
    return made
