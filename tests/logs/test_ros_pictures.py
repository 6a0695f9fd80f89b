"""Pictures in bags."""

import io

import numpy as np
import pytest
from PIL import Image
from rosbags import rosbag1
from rosbags.rosbag2 import CompressionMode

from data.logs.streams import Kind, Refused
from tests.logs.bags import (
    MCAP,
    RGB,
    ROS1,
    START,
    STORAGES,
    compressed,
    header,
    joint_messages,
    make,
    one,
    png,
    read,
    write_bag,
    write_bag1,
    write_mcap,
)


def raw(encoding, pixels, padding=0):
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)), constant_values=99)
    return make("sensor_msgs/msg/Image", header=header(START), height=height, width=width, encoding=encoding,
                step=rows.shape[1], data=rows.reshape(-1))


ALPHA = np.full((3, 4, 1), 7, np.uint8)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("encoding", "pixels"), [
    ("rgb8", RGB), ("bgr8", RGB[:, :, ::-1]), ("rgba8", np.concatenate([RGB, ALPHA], 2)),
    ("bgra8", np.concatenate([RGB[:, :, ::-1], ALPHA], 2)), ("mono8", RGB[:, :, :1])])
def test_raw_pictures(tmp_path, encoding, pixels, padding):
    stream = one(tmp_path, "sensor_msgs/msg/Image", raw(encoding, pixels, padding)).streams["/t"]
    assert (stream.kind, stream.size, len(stream)) == (Kind.IMAGE, (3, 4), 1)
    (picture,) = stream.pictures([0])
    np.testing.assert_array_equal(picture, RGB[:, :, :1].repeat(3, 2) if encoding == "mono8" else RGB)
    picture[:] = 0  # the caller's to change


def test_yuv_pictures(tmp_path):
    """BT.601, limited range: Y 81, U 90, V 240 is red."""
    yuyv = np.tile(np.array([[81, 90], [81, 240]], np.uint8), (2, 2, 1))
    for encoding, pixels in (("yuv422_yuy2", yuyv), ("yuyv", yuyv), ("yuv422", yuyv[:, :, ::-1]),
                             ("uyvy", yuyv[:, :, ::-1])):
        path = tmp_path / encoding
        path.mkdir()
        (picture,) = one(path, "sensor_msgs/msg/Image", raw(encoding, pixels)).streams["/t"].pictures([0])
        assert np.abs(picture.astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize(("plugin", "mode"), STORAGES, ids=lambda value: value.name)
def test_pictures_on_demand(tmp_path, plugin, mode):
    """In any file, chosen ones, repeated ones, and after the log object is gone."""
    frames = [np.full((2, 3, 3), 10 * i, np.uint8) for i in range(5)]
    messages = [("/t", "sensor_msgs/msg/CompressedImage", START + i, compressed(png(frame)))
                for i, frame in enumerate(frames)]
    stream = read(write_bag(tmp_path / "bag", messages, plugin, mode)).streams["/t"]
    assert stream.size == (2, 3)
    shown = [picture[0, 0, 0] for picture in stream.pictures([0, 0, 2, 4, 4])]
    assert shown == [0, 0, 20, 40, 40]
    assert list(stream.pictures([])) == []


def test_pictures_of_a_ros1_bag(tmp_path):
    message = make("sensor_msgs/msg/CompressedImage", ROS1, format="png", data=np.frombuffer(png(RGB), np.uint8))
    path = write_bag1(tmp_path / "a.bag", [("/t", "sensor_msgs/msg/CompressedImage", START + i, message)
                                           for i in range(3)], rosbag1.Writer.CompressionFormat.LZ4)
    for picture in read(path).streams["/t"].pictures([0, 2]):
        np.testing.assert_array_equal(picture, RGB)


def test_pictures_of_split_files(tmp_path):
    messages = [("/t", "sensor_msgs/msg/CompressedImage", START + i, compressed(png(np.full((2, 2, 3), i, np.uint8))))
                for i in range(4)]
    (tmp_path / "run").mkdir()
    write_mcap(tmp_path / "run/run_0.mcap", messages[:2])
    write_mcap(tmp_path / "run/run_1.mcap", messages[2:], use_chunking=False)
    stream = read(tmp_path / "run").streams["/t"]
    assert [picture[0, 0, 0] for picture in stream.pictures([0, 1, 2, 3])] == [0, 1, 2, 3]
    (tmp_path / "run/run_1.mcap").unlink()
    assert len(list(stream.pictures([0, 1]))) == 2
    with pytest.raises(ValueError, match="/t: message 2 cannot be decoded"):
        list(stream.pictures([2]))


def test_pictures_that_differ_in_size(tmp_path):
    episode = one(tmp_path, "sensor_msgs/msg/CompressedImage", compressed(png(RGB)), compressed(png(RGB[:2])))
    assert episode.streams["/t"].size is None
    assert [picture.shape for picture in episode.streams["/t"].pictures([0, 1])] == [(3, 4, 3), (2, 4, 3)]


def test_a_picture_that_cannot_be_decoded_says_so(tmp_path):
    whole = png(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    episode = one(tmp_path, "sensor_msgs/msg/CompressedImage", compressed(whole), compressed(whole[:200]))
    pictures = episode.streams["/t"].pictures([0, 1])
    assert next(pictures).shape == (16, 16, 3)
    with pytest.raises(ValueError, match="/t: message 1 cannot be decoded"):
        next(pictures)


def test_depth_is_no_picture(tmp_path):
    depth = Image.fromarray(np.full((4, 4), 1000, np.uint16))
    buffer = io.BytesIO()
    depth.save(buffer, "PNG")
    refused = one(tmp_path, "sensor_msgs/msg/CompressedImage", compressed(buffer.getvalue()))
    assert "with depth, not colour" in refused.reason


def test_a_file_that_is_compressed_and_cut(tmp_path):
    path = write_bag(tmp_path / "bag", joint_messages(20_0), MCAP, CompressionMode.FILE)
    (file,) = path.glob("*.zstd")
    file.write_bytes(file.read_bytes()[:-200])
    episode = read(path)
    assert isinstance(episode, Refused) or not episode.whole
