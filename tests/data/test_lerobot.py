import json

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.lerobot import VERSIONS, read_lerobot
from data.lerobot_writer import write_lerobot
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


@pytest.mark.parametrize("version", VERSIONS)
def test_round_trip(write, version, recorded, statistics):
    dataset = read_lerobot(write(version))
    assert (dataset.version, dataset.fps) == (version, 10.0)
    assert dataset.state_names == ("row", "y")
    assert dataset.action_names == ("u", "v", "w")
    assert dataset.cameras == ["observation.images.front", "observation.images.wrist"]
    episodes = list(dataset.episodes())
    assert dataset.report.found == [0, 1, 2]
    assert (dataset.report.missing, dataset.report.refused) == ([], {})
    for episode, trajectory in zip(episodes, recorded, strict=True):
        np.testing.assert_array_equal(episode.state, trajectory.proprio)
        np.testing.assert_array_equal(episode.action[:-1], statistics.denormalise(trajectory.action))
        np.testing.assert_allclose(episode.timestamp, trajectory.timestamp, atol=1e-6)
        assert (episode.instruction, episode.task) == (trajectory.instruction, "push")
        assert episode.success is trajectory.success
        assert episode.recorded == trajectory.provenance
        for camera, frames in trajectory.frames.items():
            read = dataset.frames(episode, f"observation.images.{camera}", 32)
            # Steps differ by 5 levels: one frame off would show.
            assert np.abs(read.astype(int) - frames).max() <= 3


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
    dataset = read_lerobot(path)
    for episode, trajectory in zip(dataset.episodes(), recorded, strict=True):
        read = dataset.frames(episode, "observation.images.front", 32)
        np.testing.assert_array_equal(read, trajectory.frames["front"])


def test_episodes_that_the_metadata_name_and_nobody_copied_are_missing(write):
    path = write("v2.1")
    (path / "data/chunk-000/episode_000001.parquet").unlink()
    dataset = read_lerobot(path)
    assert [episode.index for episode in dataset.episodes()] == [0, 2]
    assert (dataset.report.named, dataset.report.missing) == (3, [1])


def test_a_cut_parquet_file_is_refused_by_name(write):
    path = write("v2.1")
    file = path / "data/chunk-000/episode_000001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    dataset = read_lerobot(path)
    assert [episode.index for episode in dataset.episodes()] == [0, 2]
    assert "unreadable parquet" in dataset.report.refused["data/chunk-000/episode_000001.parquet"]
    assert dataset.report.missing == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cut_video_is_refused_by_name(write, version):
    path = write(version)
    dataset = read_lerobot(path)
    *_, episode = dataset.episodes()
    file = dataset.files(2, ["observation.images.front"])[1]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{file.name}: "):
        dataset.frames(episode, "observation.images.front", 32)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name}: missing"):
        dataset.frames(episode, "observation.images.front", 32)


@pytest.mark.parametrize(("other", "found"), [(0, "7 frames for 9 rows"), (1, "8 frames for 9 rows")])
def test_a_video_of_another_length_is_refused(write, other, found):
    path = write("v2.1")
    videos = path / "videos/chunk-000/observation.images.front"
    (videos / "episode_000002.mp4").write_bytes((videos / f"episode_{other:06d}.mp4").read_bytes())
    dataset = read_lerobot(path)
    *_, episode = dataset.episodes()
    with pytest.raises(ValueError, match=found):
        dataset.frames(episode, "observation.images.front", 32)
    (videos / "episode_000000.mp4").write_bytes((path / "videos/chunk-000/observation.images.wrist/episode_000002.mp4"
                                                 ).read_bytes())
    first = next(dataset.episodes())
    with pytest.raises(ValueError, match="more than 7 frames for 7 rows"):
        dataset.frames(first, "observation.images.front", 32)


def change_rows(file, **columns):
    table = pq.read_table(file)
    for name, change in columns.items():
        position = table.schema.get_field_index(name)
        table = table.set_column(position, name, pa.array(change(table[name].to_pylist()), table[name].type))
    pq.write_table(table, file)


@pytest.mark.parametrize(("column", "change", "reason"), [
    ("action", lambda rows: [[np.nan] * 3, *rows[1:]], "action has values that are not finite"),
    ("timestamp", lambda rows: rows[::-1], "timestamps do not increase"),
    ("frame_index", lambda rows: [i + 1 for i in rows], "frame_index does not count"),
    ("episode_index", lambda rows: [7] * len(rows), "0 rows, its metadata say 8"),
    ("task_index", lambda rows: [9] * len(rows), "task_index 9 is not in meta/tasks"),
])
def test_rows_that_contradict_the_metadata_are_refused(write, column, change, reason):
    path = write("v2.1")
    change_rows(path / "data/chunk-000/episode_000001.parquet", **{column: change})
    dataset = read_lerobot(path)
    assert [episode.index for episode in dataset.episodes()] == [0, 2]
    assert reason in dataset.report.refused["data/chunk-000/episode_000001.parquet"]


def test_v3_rows_and_episodes_that_are_not_all_there(write):
    path = write("v3.0")
    file = path / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 7 + 5), file)  # cut inside the second episode
    dataset = read_lerobot(path)
    assert [episode.index for episode in dataset.episodes()] == [0]
    assert "5 rows, its metadata say 8" in dataset.report.refused["data/chunk-000/file-000.parquet episode 1"]
    assert dataset.report.missing == [2]


def drop_labels(path):
    file = path / "meta/episodes.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        del row["success"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_success_has_three_values(write, recorded):
    path = write("v2.1")
    drop_labels(path)
    labels = [(e.success, e.success_from) for e in read_lerobot(path).episodes()]
    column = "column next.success"
    assert labels == [(Success.YES, column), (Success.NO, column), (Success.NO, column)]
    # A column that is never true is no label: sets exist whose flags nobody filled.
    path = write("v2.1", "failures", recorded[1:])
    drop_labels(path)
    assert {e.success for e in read_lerobot(path).episodes()} == {Success.UNKNOWN}


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
    edit_info(path, codebase_version="v2.1", action={"dtype": "float32", "shape": [3], "names": ["u", "v"]})
    refused(path, "action has 3 dimensions but 2 names")
    edit_info(path, action={"dtype": "float32", "names": ["u", "v", "w"]})
    refused(path, "not what a LeRobot set has .KeyError: 'shape'.")
    (path / "meta/info.json").write_text('{"fps": ')
    refused(path, "info.json: half-written")
    for version, name in (("v2.1", "episodes.jsonl"), ("v3.0", "tasks.parquet")):
        path = write(version, version)
        file = path / "meta" / name
        file.write_bytes(file.read_bytes()[:-9])
        refused(path, "meta: half-written or damaged")


@pytest.mark.parametrize(("names", "expected"), [
    ([["u", "v", "w"]], ("u", "v", "w")), ({"motors": ["u", "v", "w"]}, ("u", "v", "w")),
    (None, ("action_0", "action_1", "action_2"))])
def test_names_in_every_nesting_that_occurs(write, names, expected):
    path = write("v2.1")
    edit_info(path, action={"dtype": "float32", "shape": [3], "names": names})
    assert read_lerobot(path).action_names == expected


def test_files_that_the_metadata_do_not_name_are_reported(write):
    path = write("v2.1")
    file = path / "meta/episodes.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:2]))
    dataset = read_lerobot(path)
    assert len(list(dataset.episodes())) == 2
    assert "episodes.jsonl does not name it" in dataset.report.refused["data/chunk-000/episode_000002.parquet"]


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
