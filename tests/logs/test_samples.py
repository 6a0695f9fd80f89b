"""Every sample log in ``../shared/logs`` through the whole of ``ingest``, against readings without any of our code."""

import bz2
import io
import json
import sqlite3
import struct
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import h5py
import lz4.frame
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
import zarr
from mcap.reader import make_reader
from PIL import Image
from zstandard import ZstdDecompressor

from data.logs.readers import find_logs, open_log
from data.store import ReplayStore
from data.types import Success, UserError
from data.verify import verify
from tests.logs.command import assert_actions, contents, ingest

LOGS = Path(__file__).parents[3] / "shared/logs"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not LOGS.is_dir(), reason="no sample logs in ../shared/logs beside the repository")]
G1 = LOGS / "lerobot_v21_g1_inspire"
BAGS = LOGS / "derived_g1_rosbag2"
MADE = LOGS / "derived_conformance"
G1_MAPPING = {"proprio": [{"stream": "/joint_states.position"}], "action": [{"stream": "/joint_command.position"}],
              "cameras": {"cam_high": {"stream": "/cam_high/image/compressed"}}, "clock": "header", "rate": 30.0,
              "max_gap": 0.2, "embodiment": "g1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Ingest into a fresh store, once; what was printed, and what is in it."""
    tmp_path = tmp_path_factory.mktemp("samples")

    @cache
    def robot():
        return ingested(G1, size=64)

    def ingested(source, mapping=None, size=96):
        name = str(len(list(tmp_path.iterdir())))
        (tmp_path / name).mkdir()
        if mapping is not None:
            (tmp_path / name / "mapping.yaml").write_text(yaml.safe_dump(mapping))
        store = tmp_path / name / "store"
        said = ingest(source=str(source), store=str(store), folder=str(tmp_path / name),
                      logs={"image_size": size, "action_range": "range"},
                      mapping=str(tmp_path / name / "mapping.yaml") if mapping else None, workers=1)
        assert not verify(store, repair=False).damaged
        return said, contents(store), ReplayStore.open(store)

    ingested.robot = robot
    return ingested


def parquet(episode):
    table = pq.read_table(G1 / f"data/chunk-000/episode_{episode:06}.parquet")
    return (np.array(table["observation.state"].to_pylist(), "f4"), np.array(table["action"].to_pylist(), "f4"))


def frames(episode, size):
    """All pictures of an AV1 file, made smaller as the documentation says."""
    with av.open(str(G1 / f"videos/chunk-000/observation.images.cam_high/episode_{episode:06}.mp4")) as video:
        return np.stack([np.asarray(frame.to_image().resize((size, size), Image.Resampling.BILINEAR))
                         for frame in video.decode(video=0)])


REDUCED = 2
"""Levels that a picture of the robot may differ by, decoded at reduced size, as the documentation says."""


def equal(found, expected, tolerance=2e-6, *, near=False):
    """State and frames are the same, actions to the rounding of a scaled float32.

    ``near``: of frames that are made much smaller, as near as the documentation says.
    """
    (state, action, *pictures), (wanted_state, wanted_action, *wanted_pictures) = found, expected
    np.testing.assert_array_equal(state, np.asarray(wanted_state, "f4"))
    scale = max(1.0, np.abs(wanted_action).max())
    assert_actions(action, np.asarray(wanted_action)[:-1], tolerance * scale)
    for mine, theirs in zip(pictures, wanted_pictures, strict=True):
        apart = np.abs(mine.astype(int) - theirs)
        assert apart.max() <= (REDUCED if near else 0)
        assert apart.mean() < 0.3


# A robot's set, and the bags that were made from one of its episodes


def test_lerobot(run):
    said, found, store = run.robot()
    assert [p.name for p in sorted((G1 / "data").rglob("*.parquet"))] == [
        f"episode_{i:06}.parquet" for i in (1, 2, 10)]
    assert json.loads((G1 / "meta/info.json").read_text())["total_episodes"] == 100
    rows = [len(parquet(i)[0]) for i in (1, 2, 10)]
    assert len(found) == 3
    assert f"{sum(rows) - 3} steps" in said
    assert "97" in said  # are missing
    for episode, mine in zip((1, 2, 10), found, strict=True):
        equal(mine, (*parquet(episode), frames(episode, 64)))
    assert {store.trajectory(i).success for i in range(3)} == {Success.UNKNOWN}


def strings(data, at):
    """A CDR string and where it ends."""
    at += -at % 4
    (size,) = struct.unpack_from("<I", data, at)
    return data[at + 4 : at + 3 + size].decode(), at + 4 + size


def joint_state(data):
    """Stamp in ns, names and positions of a CDR JointState, by hand."""
    body = data[4:]
    second, nanosecond = struct.unpack_from("<iI", body)
    _, at = strings(body, 8)
    at += -at % 4
    (count,) = struct.unpack_from("<I", body, at)
    at += 4
    names = []
    for _ in range(count):
        name, at = strings(body, at)
        names.append(name)
    at += -at % 4
    (count,) = struct.unpack_from("<I", body, at)
    at += 4 + -(at + 4) % 8
    return second * 10**9 + nanosecond, names, np.frombuffer(body, "<f8", count, at)


def compressed_image(data):
    """Stamp in ns and the encoded bytes of a CDR CompressedImage."""
    body = data[4:]
    second, nanosecond = struct.unpack_from("<iI", body)
    _, at = strings(body, 8)
    _, at = strings(body, at)
    at += -at % 4
    (count,) = struct.unpack_from("<I", body, at)
    return second * 10**9 + nanosecond, body[at + 4 : at + 4 + count]


def bag_messages(storage):
    """Topic -> (log time in ns, bytes), with sqlite3 or mcap alone."""
    found = defaultdict(list)
    if storage == "sqlite3":
        with sqlite3.connect(f"file:{BAGS}/sqlite3/sqlite3.db3?mode=ro&immutable=1", uri=True) as database:
            for topic, time, data in database.execute(
                    "select name, timestamp, data from messages join topics on topics.id = topic_id "
                    "order by timestamp"):
                found[topic].append((time, data))
    else:
        with (BAGS / "mcap/mcap.mcap").open("rb") as file:
            for _, channel, message in make_reader(file).iter_messages():
                found[channel.topic].append((message.log_time, message.data))
    return found


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_the_bags_hold_the_lerobot_episode(run, storage):
    """By the sensors' stamps the rows are the same; by arrival they are late by the delay that was simulated."""
    messages = bag_messages(storage)
    assert {topic: len(each) for topic, each in messages.items()} == {
        "/joint_states": 290, "/joint_command": 290, "/cam_high/image/compressed": 145}
    state, action = parquet(10)
    decoded = {topic: [joint_state(data) for _, data in messages[topic]]
               for topic in ("/joint_states", "/joint_command")}
    np.testing.assert_array_equal([each[2] for each in decoded["/joint_states"]], state)
    np.testing.assert_array_equal([each[2] for each in decoded["/joint_command"]], action)
    pictures = [compressed_image(data) for _, data in messages["/cam_high/image/compressed"]]
    small = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(
        (64, 64), Image.Resampling.BILINEAR)) for _, data in pictures])

    said, found, store = run(BAGS / storage, G1_MAPPING, size=64)
    first = decoded["/joint_states"][0][0]
    rows = (pictures[-1][0] - first) * 30 // 10**9 + 1  # until the last picture
    assert rows == 289
    assert "added 1 episodes, 288 steps" in said
    seen = np.arange(rows) // 2
    equal(found[0], (state[:rows], action[:rows], small[seen]), near=True)
    assert store.spec.action_names[0] == decoded["/joint_command"][0][1][0] == "kLeftShoulderPitch"

    _, lerobot, _ = run.robot()
    video = lerobot[2][2]
    difference = np.abs(found[0][2].astype(int) - video[2 * seen])
    wrong = np.abs(found[0][2].astype(int) - video[np.minimum(2 * seen + 8, 289)])
    print(f"{storage}: state differs from LeRobot's by {np.abs(found[0][0] - lerobot[2][0][:rows]).max():g}, action by "
          f"{np.nanmax(np.abs(found[0][1] - lerobot[2][1][: rows - 1])):.2g}, pictures by {difference.max()} of 255, "
          f"{difference.mean():.2f} in the mean (0.27 s further on: {wrong.mean():.2f})")
    assert difference.mean() < wrong.mean() / 2
    assert difference.mean(axis=(1, 2, 3)).max() < 3  # JPEG of AV1

    _, late, _ = run(BAGS / storage, {**G1_MAPPING, "clock": "log"}, size=64)
    at = np.array([messages[topic][0][0] for topic in messages]).max() + np.arange(len(late[0][0])) / 30 * 1e9
    worst = {}
    for topic, held in (("/joint_states", state), ("/cam_high/image/compressed", small)):
        log = np.array([time for time, _ in messages[topic]])
        index = np.searchsorted(log, at + 500, side="right") - 1  # to half a microsecond
        stamps = np.array([(joint_state if "joint" in topic else compressed_image)(data)[0]
                           for _, data in messages[topic]])
        if "joint" in topic:
            np.testing.assert_array_equal(late[0][0], held[index])
        else:
            assert np.abs(late[0][2].astype(int) - held[index]).max() <= REDUCED
        worst[topic] = (at - stamps[index]).max() / 1e6
    print(f"{storage}: by arrival the oldest state is {worst['/joint_states']:.0f} ms old, the oldest picture "
          f"{worst['/cam_high/image/compressed']:.0f} ms")
    assert worst["/joint_states"] < 1000 / 30 + 10
    assert worst["/cam_high/image/compressed"] < 1000 / 15 + 50  # a period and the delay


# Layouts


def by_index(proprio, action, camera=None):
    return {"proprio": [{"stream": proprio}], "action": [{"stream": action}], "clock": "index", "rate": 1.0,
            "cameras": {"eye": {"stream": camera}} if camera else {}}


def test_robomimic(run):
    with h5py.File(MADE / "robomimic_layout.hdf5") as file:
        demos = [file["data"][name] for name in file["data"]]
        expected = [(demo["obs/joint_pos"][:], demo["actions"][:], demo["obs/cam_high_image"][:]) for demo in demos]
        rewards = [demo["rewards"][:] for demo in demos]
    said, found, store = run(MADE / "robomimic_layout.hdf5", by_index("obs/joint_pos", "actions", "obs/cam_high_image"))
    assert f"added {len(expected)} episodes, {sum(len(e[0]) - 1 for e in expected)} steps" in said
    for mine, theirs in zip(found, expected, strict=True):
        equal(mine, theirs)
    assert [store.trajectory(i).success is Success.YES for i in range(len(found))] == [r.any() for r in rewards]


def test_aloha(run):
    with h5py.File(MADE / "aloha_raw_layout.hdf5") as file:
        raw = (file["observations/qpos"][:], file["action"][:], file["observations/images/cam_high"][:])
    with h5py.File(MADE / "aloha_compressed_layout.hdf5") as file:
        encoded, sizes = file["observations/images/cam_high"][:], file["compress_len"][0].astype(int)
        jpeg = (file["observations/qpos"][:], file["action"][:], np.stack([
            np.asarray(Image.open(io.BytesIO(row[:size].tobytes())).convert("RGB"))
            for row, size in zip(encoded, sizes, strict=True)]))
    for name, expected in (("aloha_raw_layout.hdf5", raw), ("aloha_compressed_layout.hdf5", jpeg)):
        said, (found,), _ = run(MADE / name, by_index("observations/qpos", "action", "observations/images/cam_high"))
        assert "added 1 episodes, 23 steps" in said
        equal(found, expected)
    np.testing.assert_array_equal(raw[0], jpeg[0])


def test_droid(run):
    """It has no pictures, and its own clock: rows are what was known at 15 Hz."""
    with h5py.File(MADE / "droid_raw_layout.h5") as file:
        time = file["observation/timestamp/control/step_start"][:]
        state, action = file["observation/robot_state/joint_position"][:], file["action/joint_velocity"][:]
        sentence = file.attrs["current_task"]
    mapping = {"proprio": [{"stream": "observation/robot_state/joint_position"}], "cameras": {}, "clock": "log",
               "action": [{"stream": "action/joint_velocity"}], "rate": 15.0}
    _, (found,), store = run(MADE / "droid_raw_layout.h5", mapping)
    at = time[0] + np.arange(int((time[-1] - time[0]) / 1000 * 15 + 1e-6) + 1) * 1000 / 15  # ms
    index = np.searchsorted(time, np.round(at, 3), side="right") - 1
    equal(found, (state[index], action[index]))
    assert (store.trajectory(0).instruction, store.trajectory(0).success) == (sentence, Success.YES)


@pytest.mark.parametrize("name", ["dp_replay_buffer.zarr", "dp_replay_buffer.zarr.zip"])
def test_diffusion_policy(run, name):
    buffer = zarr.open_group(MADE / "dp_replay_buffer.zarr", mode="r", zarr_format=2)
    ends = [0, *buffer["meta/episode_ends"][:].tolist()]
    expected = [tuple(buffer[f"data/{key}"][begin:end] for key in ("robot0_joint_pos", "action", "camera0_rgb"))
                for begin, end in pairwise(ends)]
    said, found, _ = run(MADE / name, by_index("robot0_joint_pos", "action", "camera0_rgb"))
    assert f"added {len(expected)} episodes, {ends[-1] - len(expected)} steps" in said
    for mine, theirs in zip(found, expected, strict=True):
        equal(mine, theirs)


def test_minari(run):
    folder = MADE / "minari/derived/tiny-v0"
    with h5py.File(folder / "data/main_data.hdf5") as file:
        expected = [(file[name]["observations"][:], file[name]["actions"][:]) for name in file]
    said, found, _ = run(folder, by_index("observations", "actions"))
    assert f"added {len(expected)} episodes, {sum(len(action) - 1 for _, action in expected)} steps" in said
    for mine, (state, action) in zip(found, expected, strict=True):
        equal(mine, (state[: len(action)], action))


def test_all_layouts_at_once_are_refused_in_a_line(run):
    with pytest.raises(UserError, match=r"^nothing usable was found; [^\n]+$"):
        run(MADE, by_index("no such stream", "action"))


# ROS 1


def records(data):
    """Header and data of every record of a ROS 1 bag."""
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        header, fields, place = data[at + 4 : at + 4 + size], {}, 0
        while place < size:
            (length,) = struct.unpack_from("<I", header, place)
            name, _, value = header[place + 4 : place + 4 + length].partition(b"=")
            fields[name.decode()] = value
            place += 4 + length
        (length,) = struct.unpack_from("<I", data, at + 4 + size)
        at += 8 + size + length
        yield fields, data[at - length : at]


def ros1_messages(path):
    """Topic -> (time in ns, bytes), from the chunks of the file."""
    topics, found = {}, defaultdict(list)
    unpack = {b"none": bytes, b"bz2": bz2.decompress, b"lz4": lz4.frame.decompress}
    for header, content in records(path.read_bytes()[len("#ROSBAG V2.0\n") :]):
        if header["op"] != b"\x05":
            continue
        for fields, data in records(bytes(unpack[header["compression"]](content))):
            number = struct.unpack("<I", fields["conn"])[0]
            if fields["op"] == b"\x07":
                topics[number] = fields["topic"].decode()
            elif fields["op"] == b"\x02":
                second, nanosecond = struct.unpack("<II", fields["time"])
                found[topics[number]].append((second * 10**9 + nanosecond, data))
    return found


@pytest.mark.parametrize("name", ["example.bag", "example-lz4.bag", "example-bz2.bag"])
def test_ros1(run, name):
    """The turtle is commanded now and then: rows are where pose and command are at most 0.3 s old."""
    messages = ros1_messages(LOGS / "ros1_foxglove_fixtures" / name)
    (episode,) = open_log(*find_logs(LOGS / "ros1_foxglove_fixtures" / name)[0]).episodes()
    counts = Counter({topic: len(each) for topic, each in messages.items()})
    read = Counter()
    for stream in episode.streams:  # transforms are a stream per frame
        read[stream.split(".")[0]] += len(episode.streams[stream])
    assert read == counts
    assert counts.total() == 8647
    pose = [(time, struct.unpack("<5f", data)) for time, data in messages["/turtle1/pose"]]
    twist = [(time, struct.unpack("<6d", data)) for time, data in messages["/turtle1/cmd_vel"]]
    times = [np.array([time for time, _ in each]) for each in (pose, twist)]
    values = [np.array([value for _, value in each]) for each in (pose, twist)]
    first, last = max(time[0] for time in times), min(time[-1] for time in times)
    at = first + np.arange(int((last - first) / 1e8 + 1e-6) + 1) * 10**8
    index = [np.searchsorted(time, at + 500, side="right") - 1 for time in times]
    good = np.all([at - time[i] <= 0.3e9 for time, i in zip(times, index, strict=True)], axis=0)
    cuts = np.flatnonzero(np.diff(np.concatenate([[0], good, [0]])))
    expected = [tuple(value[i[begin:end]] for value, i in zip(values, index, strict=True))
                for begin, end in zip(cuts[::2], cuts[1::2], strict=True) if end - begin > 1]
    mapping = {"proprio": [{"stream": "/turtle1/pose"}], "action": [{"stream": "/turtle1/cmd_vel"}], "cameras": {},
               "clock": "log", "rate": 10.0, "max_gap": 0.3, "instruction": "draw"}
    said, found, _ = run(LOGS / "ros1_foxglove_fixtures" / name, mapping)
    assert f"added {len(expected)} episodes, {sum(len(each[0]) - 1 for each in expected)} steps" in said
    assert len(expected) > 1
    for mine, theirs in zip(found, expected, strict=True):
        equal(mine, theirs)


def test_a_bag_without_messages(run):
    with pytest.raises(UserError, match=r"^nothing usable was found; no-messages.bag: no messages[^\n]+$"):
        run(LOGS / "ros1_foxglove_fixtures/no-messages.bag", by_index("/turtle1/pose", "/turtle1/cmd_vel"))


# One of 13 parts of a bag, each message compressed on its own


def test_one_part_of_a_bag_without_commands(run):
    with (LOGS / "amber_soccer/soccer_goal_12.mcap").open("rb") as file:
        data = [ZstdDecompressor().decompress(message.data, max_output_size=2**24)
                for _, _, message in make_reader(file).iter_messages()]
    (episode,) = open_log(*find_logs(LOGS / "amber_soccer")[0]).episodes()
    camera = episode.streams["/camera/image_raw"]
    assert len(camera) == len(data) == 2
    for picture, message in zip(camera.pictures([0, 1]), data, strict=True):
        body = message[4:]
        _, at = strings(body, 8)
        at += -at % 4
        height, width = struct.unpack_from("<II", body, at)
        encoding, at = strings(body, at + 8)
        pixels = np.frombuffer(body[-height * width * 3 :], np.uint8).reshape(height, width, 3)
        np.testing.assert_array_equal(picture, pixels if encoding == "rgb8" else pixels[..., ::-1])
    with pytest.raises(UserError, match=r"^nothing usable was found; [^\n]*no vector stream '/odom'[^\n]+$"):
        run(LOGS / "amber_soccer", by_index("/odom", "/cmd_vel", "/camera/image_raw"))
