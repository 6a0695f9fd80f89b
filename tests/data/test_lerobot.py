import json

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.lerobot import VERSIONS, read_lerobot
from data.lerobot_writer import write_lerobot
from data.logs.lerobot import open_log
from data.logs.streams import LogEpisode, Refused
from data.types import Success, UserError


@pytest.fixture(scope="session")
def smooth_frames():
    """Frames that a video codec keeps: a slow gradient whose brightness says the episode and the step."""

    def make(seed, steps, size=32):
        ramp = np.linspace(0, 40, size)[None, :, None, None]
        level = 20 + 60 * seed + 5 * np.arange(steps + 1)[:, None, None, None]
        return np.broadcast_to(ramp + level, (steps + 1, size, size, 3)).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def big_spec(spec):
    return type(spec)(**(vars(spec) | {"image_size": 32}))


@pytest.fixture(scope="session")
def recorded(make_trajectory, smooth_frames):
    """Three trajectories, of each success label."""
    return [make_trajectory(i, 6 + i, success=success, terminated=success is Success.YES,
                            frames={"front": smooth_frames(i, 6 + i), "wrist": smooth_frames(2 - i, 6 + i)})
            for i, success in enumerate((Success.YES, Success.NO, Success.UNKNOWN))]


@pytest.fixture
def write(tmp_path, big_spec, statistics, recorded):
    def make(version, name="log", trajectories=recorded):
        write_lerobot(tmp_path / name, trajectories, spec=big_spec, statistics=statistics, fps=10, version=version)
        return tmp_path / name

    return make


def read(path):
    """Episodes, and why others are refused."""
    items = list(open_log(path).episodes())
    return ([item for item in items if isinstance(item, LogEpisode)],
            {item.name: item.reason for item in items if isinstance(item, Refused)})


def pictures(episode, camera, numbers=None):
    stream = episode.streams[f"observation.images.{camera}"]
    return np.stack(list(stream.pictures(range(len(stream)) if numbers is None else numbers)))


@pytest.mark.parametrize("version", VERSIONS)
def test_round_trip(write, version, recorded, statistics):
    log = open_log(write(version))
    assert log.format == f"LeRobot {version}"
    assert log.dataset.cameras == ["observation.images.front", "observation.images.wrist"]
    episodes, refused = read(log.path)
    assert refused == {}
    for episode, trajectory in zip(episodes, recorded, strict=True):
        state, action = episode.streams["observation.state"], episode.streams["action"]
        assert (state.names, action.names) == (("row", "y"), ("u", "v", "w"))
        np.testing.assert_array_equal(state.values, trajectory.proprio)
        np.testing.assert_array_equal(action.values[:-1], statistics.denormalise(trajectory.action))
        for stream in episode.streams.values():
            later = 0.1 if stream.name.startswith("next.") else 0
            np.testing.assert_allclose(stream.clocks["nominal"], trajectory.timestamp + later, atol=1e-9)
            assert list(stream.clocks) == ["nominal"]
        assert (episode.instruction, episode.task) == (trajectory.instruction, "push")
        assert episode.success is trajectory.success
        assert episode.facts["recorded"] == trajectory.provenance
        for camera, frames in trajectory.frames.items():
            # Steps differ by 5 levels: one frame off would show.
            assert np.abs(pictures(episode, camera).astype(int) - frames).max() <= 3
            some = [2, 2, 3, 5]  # from inside the video, as a slower control rate asks for them
            assert np.abs(pictures(episode, camera, some).astype(int) - frames[some]).max() <= 3


def test_pictures_in_parquet(write, recorded):
    """Sets recorded without video hold PNG bytes in the parquet file."""
    import io

    from PIL import Image

    path = write("v2.1")
    info = json.loads((path / "meta/info.json").read_text())
    info["features"]["observation.images.front"]["dtype"] = "image"
    (path / "meta/info.json").write_text(json.dumps(info))
    for index, trajectory in enumerate(recorded):
        file = path / f"data/chunk-000/episode_{index:06d}.parquet"
        cells = []
        for frame in trajectory.frames["front"]:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        pq.write_table(pq.read_table(file).append_column("observation.images.front", pa.array(cells)), file)
    for episode, trajectory in zip(read(path)[0], recorded, strict=True):
        np.testing.assert_array_equal(pictures(episode, "front"), trajectory.frames["front"])


def test_episodes_that_the_metadata_name_and_nobody_copied_are_missing(write):
    path = write("v2.1")
    (path / "data/chunk-000/episode_000001.parquet").unlink()
    episodes, refused = read(path)
    assert [episode.name for episode in episodes] == ["episode 0", "episode 2"]
    assert refused == {"episodes 1": "1 missing of 3 that meta names"}


def test_a_cut_parquet_file_is_refused_by_name(write):
    path = write("v2.1")
    file = path / "data/chunk-000/episode_000001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    episodes, refused = read(path)
    assert [episode.name for episode in episodes] == ["episode 0", "episode 2"]
    assert "episode_000001.parquet: unreadable parquet" in refused["episode 1"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cut_video_is_no_stream_and_named(write, version):
    path = write(version)
    file = open_log(path).dataset.video(2, "observation.images.front")[0]
    content = file.read_bytes()
    for damaged, said in ((content[: len(content) // 2], "cannot be decoded"), (None, "missing")):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        episode = read(path)[0][-1]
        assert "observation.images.front" not in episode.streams
        assert "observation.images.wrist" in episode.streams
        (problem,) = episode.problems
        assert problem.startswith(f"observation.images.front: {file.relative_to(path)}: {said}")


def test_bytes_damaged_inside_a_video_are_found_when_it_is_decoded(write, recorded):
    path = write("v2.1")
    file = path / "videos/chunk-000/observation.images.front/episode_000002.mp4"
    content = bytearray(file.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 400] = bytes(400)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"episode_000002\.mp4: picture \d cannot be decoded"):
        pictures(read(path)[0][2], "front")


@pytest.mark.parametrize(("other", "found"), [(0, "7 frames for 9 rows"), (1, "8 frames for 9 rows")])
def test_a_video_of_another_length_is_refused(write, other, found):
    path = write("v2.1")
    videos = path / "videos/chunk-000/observation.images.front"
    (videos / "episode_000002.mp4").write_bytes((videos / f"episode_{other:06d}.mp4").read_bytes())
    assert found in read(path)[0][2].problems[0]
    (videos / "episode_000000.mp4").write_bytes((path / "videos/chunk-000/observation.images.wrist/episode_000002.mp4"
                                                 ).read_bytes())
    assert "9 frames for 7 rows" in read(path)[0][0].problems[0]


def change_rows(file, **columns):
    table = pq.read_table(file)
    for name, change in columns.items():
        position = table.schema.get_field_index(name)
        table = table.set_column(position, name, pa.array(change(table[name].to_pylist()), table[name].type))
    pq.write_table(table, file)


@pytest.mark.parametrize(("column", "change", "reason"), [
    ("timestamp", lambda rows: rows[::-1], "timestamps do not increase"),
    ("frame_index", lambda rows: [i + 1 for i in rows], "frame_index does not count"),
    ("episode_index", lambda rows: [7] * len(rows), "0 rows, meta says 8"),
    ("task_index", lambda rows: [9] * len(rows), "task_index 9 is not in meta/tasks"),
])
def test_rows_that_contradict_the_metadata_are_refused(write, column, change, reason):
    path = write("v2.1")
    change_rows(path / "data/chunk-000/episode_000001.parquet", **{column: change})
    episodes, refused = read(path)
    assert [episode.name for episode in episodes] == ["episode 0", "episode 2"]
    assert f"episode_000001.parquet: {reason}" in refused["episode 1"]


def test_v3_rows_and_episodes_that_are_not_all_there(write):
    path = write("v3.0")
    file = path / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 7 + 5), file)  # cut inside the second episode
    episodes, refused = read(path)
    assert [episode.name for episode in episodes] == ["episode 0"]
    assert "file-000.parquet: 5 rows, meta says 8" in refused["episode 1"]
    assert "1 missing of 3" in refused["episodes 2"]


def test_frames_that_no_v3_episode_has_are_reported(write):
    """The last episode's entry was never written: its rows and frames are there."""
    path = write("v3.0")
    file = path / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 2), file)
    episodes, refused = read(path)
    assert [len(episode.streams["action"]) for episode in episodes] == [7, 8]
    assert refused["videos/observation.images.wrist/chunk-000/file-000.mp4"] == (
        "24 frames, meta/episodes names 15; cut recording?")
    assert "does not describe it" in refused["episode 2"]


def test_rows_that_are_no_numbers_cost_the_stream_not_the_episode(write):
    path = write("v2.1")
    file = path / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(file)
    ragged = pa.array([[1.0, 2.0], *[[1.0, 2.0, 3.0]] * 7])
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", ragged), file)
    episode = read(path)[0][1]
    assert "action" not in episode.streams
    assert episode.problems == ("action: rows that are not 3 numbers",)


def test_a_clock_that_was_recorded_is_offered_beside_the_nominal_one(write):
    path = write("v2.1")
    change_rows(path / "data/chunk-000/episode_000000.parquet", timestamp=lambda rows: [0.13 * i for i in range(7)])
    first, second, _ = read(path)[0]
    np.testing.assert_allclose(first.streams["action"].clocks["log"], 0.13 * np.arange(7), atol=1e-6)
    later = [*0.13 * np.arange(1, 7), 0.13 * 6 + 0.1]
    np.testing.assert_allclose(first.streams["next.success"].clocks["log"], later, atol=1e-6)
    assert first.problems == ("timestamp: up to 0.18 s from frame_index / fps, so it is offered as clock log",)
    assert list(second.streams["action"].clocks) == ["nominal"]


def drop_labels(path):
    file = path / "meta/episodes.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        del row["success"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_success_has_three_values(write, recorded):
    path = write("v2.1")
    drop_labels(path)
    labels = [(e.success, e.success_from) for e in read(path)[0]]
    column = "column next.success"
    assert labels == [(Success.YES, column), (Success.NO, column), (Success.NO, column)]
    # A column that is never true is no label: sets exist whose flags nobody filled.
    path = write("v2.1", "failures", recorded[1:])
    drop_labels(path)
    assert {e.success for e in read(path)[0]} == {Success.UNKNOWN}


def edit_info(path, **changes):
    file = path / "meta/info.json"
    info = json.loads(file.read_text())
    for key, value in changes.items():
        (info["features"] if key in info["features"] else info)[key] = value
    file.write_text(json.dumps(info))


def test_sets_that_cannot_be_read_are_one_line(write, tmp_path):
    def refused(path, match):
        with pytest.raises(UserError, match=match) as error:
            read_lerobot(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "nowhere", "no LeRobot set at")
    path = write("v2.1")
    edit_info(path, codebase_version="v1.6")
    refused(path, r"LeRobot format v1\.6, expected v2\.1 or v3\.0")
    edit_info(path, codebase_version="v2.1", fps=0)
    refused(path, "expected fps above 0, got 0")
    edit_info(path, fps=10, action={"shape": [3], "names": ["u", "v", "w"]})
    refused(path, "not what a LeRobot set has .KeyError: 'dtype'.")
    (path / "meta/info.json").write_text('{"fps": ')
    refused(path, "info.json: half-written")
    for version, name in (("v2.1", "episodes.jsonl"), ("v3.0", "tasks.parquet")):
        path = write(version, version)
        file = path / "meta" / name
        file.write_bytes(file.read_bytes()[:-9])
        refused(path, "meta: half-written or damaged")


@pytest.mark.parametrize(("names", "expected"), [
    ([["u", "v", "w"]], ("u", "v", "w")), ({"motors": ["u", "v", "w"]}, ("u", "v", "w")),
    (None, ()), (["u", "v"], ("u", "v"))])
def test_names_in_every_nesting_that_occurs(write, names, expected):
    path = write("v2.1")
    edit_info(path, action={"dtype": "float32", "shape": [3], "names": names})
    assert read(path)[0][0].streams["action"].names == expected


def test_files_that_the_metadata_do_not_name_are_reported(write):
    path = write("v2.1")
    file = path / "meta/episodes.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:2]))
    episodes, refused = read(path)
    assert len(episodes) == 2
    assert "episodes.jsonl does not name it" in refused["data/chunk-000/episode_000002.parquet"]


def test_the_writer_refuses_what_it_cannot_write(write, tmp_path, recorded, spec, statistics):
    path = write("v2.1")
    with pytest.raises(UserError, match="exists already"):
        write("v2.1")
    with pytest.raises(UserError, match=r"expected v2.1 or v3.0, got 'v2'"):
        write("v2", "other")
    odd = type(spec)(**(vars(spec) | {"image_size": 33}))
    with pytest.raises(UserError, match="even image size, got 33"):
        write_lerobot(tmp_path / "odd", recorded, spec=odd, statistics=statistics, fps=10)
    with av.open(str(path / "videos/chunk-000/observation.images.front/episode_000000.mp4")) as video:
        assert video.streams.video[0].average_rate == 10
