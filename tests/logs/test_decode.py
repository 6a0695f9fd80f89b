"""Pictures on their way from the survey to the store: handed on, decoded at reduced size, made small."""

import io
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from data.logs import decode
from data.logs.commit import ingest_logs
from data.logs.inspect import inspect, propose
from data.logs.pictures import encoded_picture
from data.logs.streams import Kind, LogEpisode
from data.logs.survey import episodes_of
from data.store import ReplayStore
from data.types import UserError
from tests.logs import makers


def jpeg(pixels, quality=90):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=quality)
    return content.getvalue()


def scene(height, width, seed=0):
    """Edges, gradients and the grain of a camera."""
    draw = np.random.default_rng(seed)
    slope = np.linspace(40, 180, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None] * [1, 0, -1]
    picture = Image.fromarray(np.clip(slope + draw.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8))
    paint = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y = draw.integers(0, width), draw.integers(0, height)
        paint.rectangle((x, y, x + width // 7, y + height // 6), fill=tuple(draw.integers(0, 256, 3).tolist()))
    return np.asarray(picture)


def apart(pictures, size=64, crop=(0.0, 0.0, 1.0, 1.0)):
    """Levels between what ingestion makes of pictures, or of JPEG files, and whole decoding with bilinear alone."""
    whole = [encoded_picture(picture) if isinstance(picture, bytes) else picture for picture in pictures]

    def given(numbers, least=None):
        return (encoded_picture(each, least) if isinstance(each, bytes) else each
                for each in (pictures[number] for number in numbers))

    found = decode._squares(given, np.arange(len(pictures)), decode.Camera(stream="front", crop=crop), size)
    for picture, square in zip(whole, found, strict=True):
        height, width = picture.shape[:2]
        box = tuple(share * side for share, side in zip(crop, (width, height, width, height), strict=True))
        exact = Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box=box)
        yield np.abs(square.astype(int) - np.asarray(exact))


@pytest.mark.parametrize("crop", [(0.0, 0.0, 1.0, 1.0), (0.2, 0.1, 0.9, 0.8)])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (720, 1280), (481, 643), (400, 400), (384, 512)])
def test_reduced_decoding_is_near_whole_decoding(height, width, crop):
    levels = np.array(list(apart([jpeg(scene(height, width, seed)) for seed in range(3)], crop=crop)))
    assert levels.max() <= 6
    assert (levels > 2).mean() < 0.01
    assert levels.mean() < 0.3


def test_reduced_decoding_of_noise():
    (levels,) = apart([jpeg(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))])
    assert levels.max() <= 6


def test_a_picture_is_turned_and_then_cropped():
    picture = scene(64, 64)
    (turned,) = decode._squares(lambda numbers, least=None: [picture], np.arange(1), decode.Camera(
        stream="front", crop=(0.5, 0.0, 1.0, 0.5), turned=True), 32)
    np.testing.assert_array_equal(turned, picture[32:, :32][::-1, ::-1])


def test_what_is_small_already_or_no_jpeg_is_decoded_whole():
    for levels in apart([jpeg(scene(120, 160)), scene(480, 640)]):
        assert levels.max() == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 8, 16]), st.integers(1, 99), st.integers(1, 99))
def test_reduced_pictures_are_no_smaller_than_asked(height, width, times, least_height, least_width):
    height, width = height * times, width * times
    file = jpeg(np.zeros((height, width, 3), np.uint8), 50)
    found = encoded_picture(file, (least_height, least_width)).shape
    factor = height // found[0]
    assert factor in (1, 2, 4, 8)
    assert (found[0] * factor, found[1] * factor, found[2]) == (height, width, 3)
    assert found[0] >= min(height, least_height)
    assert found[1] >= min(width, least_width)


def bag(folder, kind):
    makers.write(kind, folder, makers.demos())
    (found,) = [episode for _, episode in inspect(folder, None).episodes][:1]
    return propose(found)


@pytest.mark.parametrize("kind", ["rosbag2 MCAP", "rosbag2 sqlite3", "ROS 1", "Foxglove json", "LeRobot v3.0"])
def test_the_survey_hands_pictures_on(kind, tmp_path, monkeypatch):
    mapping = bag(tmp_path / "log", kind)
    ingest_logs(tmp_path / "log", tmp_path / "one", mapping, image_size=16)
    monkeypatch.setattr(decode, "episodes_of", lambda *_: pytest.fail("a log was read again"))
    ingest_logs(tmp_path / "log", tmp_path / "two", mapping, image_size=16)
    one, two = (ReplayStore.open(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) > 0
    for i in range(len(one)):
        for camera, frames in one.trajectory(i).frames.items():
            np.testing.assert_array_equal(frames, two.trajectory(i).frames[camera])


@pytest.mark.parametrize("kind", ["rosbag2 MCAP", "rosbag2 sqlite3", "ROS 1", "Foxglove protobuf", "LeRobot v2.1"])
def test_pictures_can_be_pickled_and_notice_a_changed_file(kind, tmp_path):
    bag(tmp_path / "log", kind)
    found = [(path, stream) for path, episode in _episodes(tmp_path / "log")
             for stream in episode.streams.values() if stream.kind is Kind.IMAGE]
    assert found
    for _, stream in found:
        copy = pickle.loads(pickle.dumps(stream.pictures))
        numbers = [0, 1, 1, len(stream) - 1]
        np.testing.assert_array_equal(list(copy(numbers)), list(stream.pictures(numbers)))
    for file in (tmp_path / "log").rglob("*"):
        os.utime(file, (1, 1))
    with pytest.raises(ValueError, match="has changed since it was read"):
        list(found[0][1].pictures([0]))


def _episodes(folder):
    from data.logs.readers import find_logs

    for family, path in find_logs(folder):
        for episode in episodes_of(family, path):
            assert isinstance(episode, LogEpisode)
            yield path, episode


@pytest.mark.parametrize("kind", ["HDF5", "RLDS"])
def test_a_log_that_changes_between_survey_and_decoding_is_refused(kind, tmp_path, monkeypatch):
    mapping = bag(tmp_path / "log", kind)

    def other(family, path):
        for episode in episodes_of(family, path):
            episode.sha256 = "another"
            yield episode

    monkeypatch.setattr(decode, "episodes_of", other)
    with pytest.raises(UserError, match="changed since it was read"):
        ingest_logs(tmp_path / "log", tmp_path / "store", mapping, image_size=16)
