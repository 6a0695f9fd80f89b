import contextlib
import io
import json
import os
import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from data.logs import hdf5, hdf5_process
from data.logs.streams import Kind, LogEpisode, Refused
from data.types import Success, UserError
from tests.logs.damage import flipped, well_formed

SHARED = Path(__file__).parents[3] / "shared/logs/derived_conformance"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no sample logs in ../shared/logs beside the repository")
RNG = np.random.default_rng(0)


def pictures(rows, size=8):
    """Smooth ones, which JPEG keeps."""
    level = np.arange(rows)[:, None, None, None] * 20 + np.linspace(0, 60, size)[None, :, None, None]
    return np.broadcast_to(level + np.array([0, 40, 80]), (rows, size, size, 3)).astype(np.uint8)


def encode(frame, kind="JPEG"):
    content = io.BytesIO()
    Image.fromarray(frame).save(content, kind)
    return content.getvalue()


def padded(files):
    width = max(map(len, files)) + 7
    return np.stack([np.frombuffer(file.ljust(width, b"\0"), np.uint8) for file in files])


def write_demos(path, demos=3, rows=4, *, rewards=None, dones=None, data=None, attributes=None, **more):
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {}})
        for key, value in (data or {}).items():
            group.attrs[key] = value
        for number in range(demos):
            demo = group.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = rows
            for key, value in (attributes or {}).items():
                demo.attrs[key] = value[number] if isinstance(value, list) else value
            demo["actions"] = np.arange(rows * 3).reshape(rows, 3) + 100.0 * number
            demo["obs/eef_pos"] = RNG.normal(size=(rows, 2)).astype("f4")
            demo["obs/agentview_image"] = pictures(rows) + np.uint8(number)
            if rewards is not None:
                demo["rewards"] = rewards[number]
            if dones is not None:
                demo["dones"] = np.array(dones[number], "i8")
            for key, value in more.items():
                demo[key.replace("__", "/")] = value
    return path


def read(path):
    return list(hdf5.open_log(path).episodes())


def test_robomimic(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=11, rewards=[[0, 0, 0, 1.0]] * 11)
    assert hdf5.sniff(path) == "robomimic HDF5"
    log = hdf5.open_log(path)
    assert (log.format, log.path) == ("robomimic HDF5", path)
    episodes = list(log.episodes())
    assert [episode.name for episode in episodes] == [f"demo_{number}" for number in range(11)]  # 2 before 10
    with h5py.File(path) as file:
        for episode in episodes:
            demo = file["data"][episode.name]
            assert set(episode.streams) == {"actions", "rewards", "obs/eef_pos", "obs/agentview_image"}
            for name in ("actions", "obs/eef_pos"):
                np.testing.assert_array_equal(episode.streams[name].values, demo[name][:])
            np.testing.assert_array_equal(episode.streams["rewards"].values, demo["rewards"][:][:, None])
            camera = episode.streams["obs/agentview_image"]
            assert (camera.kind, camera.size, camera.schema) == (Kind.IMAGE, (8, 8), "uint8 [8, 8, 3]")
            np.testing.assert_array_equal(list(camera.pictures([0, 0, 2])), demo["obs/agentview_image"][:][[0, 0, 2]])
            np.testing.assert_array_equal(episode.streams["actions"].clocks["index"], np.arange(4))
    assert len({episode.sha256 for episode in episodes}) == 11
    assert (episodes[0].task, episodes[0].instruction, episodes[0].problems) == ("Lift", "", ())
    assert episodes[0].facts == {"format": "robomimic HDF5", "file": "a.hdf5", "rows": 4, "clock": "none"}
    well_formed(episodes)


@pytest.mark.parametrize(("rewards", "dones", "expected"), [
    ([[0, 1], [0, 0]], [[0, 1], [0, 1]], ["yes", "no"]),  # rewards of 0 and 1 count before dones
    ([[0, 0], [0, 0]], [[0, 1], [0, 0]], ["yes", "no"]),
    ([[0, 0], [0, 0]], [[0, 1], [0, 1]], ["unknown"] * 2),  # dones that only mark the end
    ([[0, 0], [0, 0]], [[0, 0], [0, 0]], ["unknown"] * 2),
    ([[0.2, 1], [0, 0.3]], [[0, 1], [0, 1]], ["unknown"] * 2),  # shaped rewards
    ([[0, np.nan], [0, 1]], None, ["unknown"] * 2),
    (None, None, ["unknown"] * 2)])
def test_success_of_rewards_and_dones(tmp_path, rewards, dones, expected):
    episodes = read(write_demos(tmp_path / "a.hdf5", demos=2, rows=2, rewards=rewards, dones=dones))
    assert [str(episode.success) for episode in episodes] == expected
    assert all(episode.success_from for episode in episodes)


def test_success_attribute_counts_first(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=3, rows=2, rewards=[[0, 1]] * 3,
                       attributes={"success": [np.bool_(False), np.bool_(True), "maybe"]})
    episodes = read(path)
    assert [episode.success for episode in episodes] == [Success.NO, Success.YES, Success.YES]
    assert [episode.success_from for episode in episodes] == ["attribute success"] * 2 + ["rewards: 1 in some step"]


def test_libero(tmp_path):
    path = write_demos(tmp_path / "pick_demo.hdf5", demos=1, rewards=[[0, 0, 0, 1]], data={
        "problem_info": json.dumps({"problem_name": "Libero_Kitchen", "language_instruction": "open the drawer"}),
        "env_args": json.dumps({"env_name": "Libero_Kitchen", "env_kwargs": {"control_freq": 20}})})
    (episode,) = read(path)
    assert episode.facts["format"] == hdf5.sniff(path) == "LIBERO HDF5"
    assert episode.instruction == "open the drawer"
    assert episode.task == "Libero_Kitchen"
    assert "upside down" in episode.facts["note"]
    np.testing.assert_allclose(episode.streams["actions"].clocks["nominal"], np.arange(4) / 20)
    assert list(episode.streams["actions"].clocks) == ["nominal"]
    with h5py.File(path) as file:  # and not corrected
        np.testing.assert_array_equal(next(episode.streams["obs/agentview_image"].pictures([0])),
                                      file["data/demo_0/obs/agentview_image"][0])


@pytest.mark.parametrize(("attribute", "expected"), [
    ({"problem_info": json.dumps({"language_instruction": list("go on")})}, "go on"),
    ({"problem_info": json.dumps({"language_instruction": ["go", "on"]})}, "go on"),
    ({"problem_info": '{"language_instruction": "\\"go\\n on\\""}'}, "go on"),
    ({"problem_info": "{not JSON"}, ""),
    ({"ep_meta": json.dumps({"lang": "go on"})}, "go on"),
    ({"problem_info": "[" * 100_000}, ""),
    ({"problem_info": json.dumps({"language_instruction": 5})}, "")])
def test_instructions(tmp_path, attribute, expected):
    assert read(write_demos(tmp_path / "a.hdf5", demos=1, data=attribute))[0].instruction == expected


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), True, "20", None, [20]])
def test_rates_that_are_none(tmp_path, rate):
    data = {"env_args": json.dumps({"env_kwargs": {"control_freq": rate}})}
    assert list(read(write_demos(tmp_path / "a.hdf5", demos=1, data=data))[0].streams["actions"].clocks) == ["index"]


def test_isaac_lab(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=2, attributes={"success": [np.bool_(True), np.bool_(False)]}, data={
        "env_args": json.dumps({"env_name": "Stack", "type": 2, "sim_args": {"dt": 0.01, "decimation": 5}})},
        initial_state__articulation__robot__root_pose=np.zeros((1, 7)),
        initial_state__articulation__robot__joint_position=np.zeros((1, 9)),
        states__articulation__robot__joint_position=np.ones((4, 9)), obs__datagen_info__eef_pose=np.ones((4, 4, 4)))
    first, second = read(path)
    assert hdf5.sniff(path) == "Isaac Lab HDF5"
    assert (first.success, second.success) == (Success.YES, Success.NO)
    assert first.streams["states/articulation/robot/joint_position"].values.shape == (4, 9)
    assert first.streams["obs/datagen_info/eef_pose"].values.shape == (4, 16)
    np.testing.assert_allclose(first.streams["actions"].clocks["nominal"], np.arange(4) * 0.05)
    assert first.problems == ("initial_state/articulation/robot/joint_position, "
                              "initial_state/articulation/robot/root_pose: 2 skipped, not of 4 rows",)


def test_aloha_raw(tmp_path):
    frames = pictures(5)
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:
        file.attrs["sim"] = False
        file["action"] = RNG.normal(size=(5, 14))
        file["observations/qpos"] = RNG.normal(size=(5, 14)).astype("f4")
        file["observations/images/cam_high"] = frames
        file["observations/images/cam_chw"] = frames.transpose(0, 3, 1, 2)
        file["language_instruction"] = ["fold the shirt"]
    (episode,) = read(tmp_path / "episode_0.hdf5")
    assert (episode.name, episode.instruction) == ("episode_0.hdf5", "fold the shirt")
    assert (episode.facts["format"], episode.facts["sim"]) == ("ALOHA HDF5", False)
    assert (episode.success, list(episode.streams["action"].clocks)) == (Success.UNKNOWN, ["index"])
    for camera in ("cam_high", "cam_chw"):
        stream = episode.streams[f"observations/images/{camera}"]
        assert stream.size == (8, 8)
        np.testing.assert_array_equal(list(stream.pictures(range(5))), frames)
    assert episode.problems == ("language_instruction: 1 skipped, not of 5 rows",)


@pytest.mark.parametrize("kind", ["padded", "fixed", "variable"])
@pytest.mark.parametrize("codec", ["JPEG", "PNG"])
def test_encoded_pictures(tmp_path, kind, codec):
    files = [encode(frame, codec) for frame in pictures(4, 16)]
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["action"] = np.zeros((4, 2))
        file["compress_len"] = np.array([[len(content) for content in files]])
        name = "observations/images/cam"
        if kind == "padded":
            file[name] = padded(files)
        elif kind == "fixed":
            file[name] = np.array(files)
        else:
            rows = file.create_dataset(name, (4,), h5py.vlen_dtype(np.uint8))
            for number, content in enumerate(files):
                rows[number] = np.frombuffer(content, np.uint8)
    (episode,) = read(tmp_path / "a.hdf5")
    stream = episode.streams[name]
    assert (stream.kind, stream.size) == (Kind.IMAGE, (16, 16))
    expected = [np.asarray(Image.open(io.BytesIO(content))) for content in files]
    np.testing.assert_array_equal(list(stream.pictures(range(4))), expected)
    np.testing.assert_allclose(expected, pictures(4, 16), atol=8)


def test_damaged_pictures_are_named(tmp_path):
    files = [encode(frame) for frame in pictures(4, 64)]
    files[1] = files[1][: len(files[1]) // 2]  # a cut file: padding must not hide it
    files[2] = b"nothing"
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["action"] = np.zeros((4, 2))
        file["observations/images/cam"] = padded(files)
    (episode,) = read(tmp_path / "a.hdf5")
    stream = episode.streams["observations/images/cam"]
    for number in (1, 2, 4):
        with pytest.raises(ValueError, match=rf"^observations/images/cam: picture {number} cannot be decoded \(.+\)$"):
            list(stream.pictures([0, number]))
    assert len(list(stream.pictures([0, 3]))) == 2
    (tmp_path / "a.hdf5").unlink()
    with pytest.raises(ValueError, match="picture 0 cannot be decoded"):
        list(stream.pictures([0]))


def test_what_is_no_rgb_picture(tmp_path):
    depth = io.BytesIO()
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(depth, "PNG")
    levels = pictures(2, 16).astype("f4")
    path = write_demos(tmp_path / "a.hdf5", demos=1, rows=2, obs__levels=levels, obs__unit=levels / 255,
                       obs__depth=np.zeros((2, 80, 80), "u2"), obs__stack=np.zeros((2, 4, 64, 64, 3), "u1"),
                       obs__points=np.ones((2, 4, 5, 3)), obs__png_depth=padded([depth.getvalue()] * 2))
    (episode,) = read(path)
    np.testing.assert_array_equal(list(episode.streams["obs/levels"].pictures([0, 1])), pictures(2, 16))
    assert episode.streams["obs/points"].values.shape == (2, 60)
    assert set(episode.streams) == {"actions", "obs/agentview_image", "obs/eef_pos", "obs/levels", "obs/points"}
    assert "obs/unit: 1 skipped, of floats that are no levels from 0 to 255" in episode.problems
    assert "obs/png_depth: 1 skipped, of pictures in mode I;16, not in colours of 8 bits" in episode.problems
    assert len(episode.problems) == 4


def test_float_levels_out_of_range(tmp_path):
    levels = pictures(3, 16).astype("f4")
    levels[1, 0, 0, 0], levels[2, 0, 0, 0] = 300, np.nan
    (episode,) = read(write_demos(tmp_path / "a.hdf5", demos=1, rows=3, obs__levels=levels))
    for number in (1, 2):
        with pytest.raises(ValueError, match=f"picture {number} cannot be decoded \\(expected levels from 0 to 255"):
            list(episode.streams["obs/levels"].pictures([number]))


def write_droid(path, **attributes):
    rows = 6
    with h5py.File(path, "w") as file:
        file.attrs.update({"current_task": "Put the block\nin the bowl", "user": "Somebody", "time": "now",
                           **attributes})
        file["action/joint_position"] = RNG.normal(size=(rows, 7))
        file["action/gripper_position"] = RNG.random(rows)
        file["observation/robot_state/joint_positions"] = RNG.normal(size=(rows, 7))
        file["observation/timestamp/control/step_start"] = 1_700_000_000_000 + np.array([0, 66, 133, 120, 266, 333])
        file["observation/controller_info/movement_enabled"] = np.ones(rows, bool)
    return path


def test_droid(tmp_path):
    (episode,) = read(write_droid(tmp_path / "trajectory.h5", success=np.bool_(False), failure=np.bool_(True)))
    assert episode.facts["format"] == "DROID raw HDF5"
    assert episode.instruction == "Put the block in the bowl"
    assert (episode.success, episode.success_from) == (Success.NO, "attribute success")
    clock = episode.streams["action/joint_position"].clocks
    assert list(clock) == ["log"]
    np.testing.assert_array_equal(clock["log"], 1_700_000_000 + np.array([0, 0.066, 0.133, 0.120, 0.266, 0.333]))
    assert episode.streams["observation/controller_info/movement_enabled"].values.tolist() == [[1.0]] * 6
    assert any(problem.startswith("pictures: none in this file") for problem in episode.problems)
    assert "Somebody" not in json.dumps(episode.facts)


def test_droid_that_contradicts_itself(tmp_path):
    (episode,) = read(write_droid(tmp_path / "trajectory.h5", success=np.bool_(True), failure=np.bool_(True)))
    assert (episode.success, episode.success_from) == (Success.UNKNOWN, "attributes success and failure are both True")


def test_unknown_layout(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["arm/q"] = np.arange(12.0).reshape(6, 2)
        file["gripper"] = np.arange(6)
        file["mode"] = ["idle", "run", "run", "run", "stop", "ünd"]
        file["calibration"] = np.eye(4)
        file["instruction"] = "wave"
        file.attrs["fps"] = 30
    (episode,) = read(tmp_path / "a.h5")
    assert (episode.name, episode.facts["format"]) == ("a.h5", "unknown HDF5")
    np.testing.assert_array_equal(episode.streams["arm/q"].values, np.arange(12.0).reshape(6, 2))
    assert (episode.streams["mode"].kind, episode.streams["mode"].texts[-1]) == (Kind.TEXT, "ünd")
    np.testing.assert_allclose(episode.streams["gripper"].clocks["nominal"], np.arange(6) / 30)
    assert episode.problems == ("calibration, instruction: 2 skipped, not of 6 rows",)
    assert episode.instruction == "wave"


@pytest.mark.parametrize(("stamps", "expected"), [
    (np.array([5, 5.1, 5.05, 5.3]), "log"), (np.array([0.0, 33, 66, 99]), "index"),
    (np.array([0, 1, 2, 3]), "index"), (np.array([0, 0.1, np.nan, 0.3]), "index")])
def test_a_column_of_time(tmp_path, stamps, expected):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["q"], file["timestamp"] = np.ones((4, 2)), stamps
    (episode,) = read(tmp_path / "a.h5")
    assert list(episode.streams["q"].clocks) == [expected]
    if expected == "log":
        np.testing.assert_array_equal(episode.streams["q"].clocks["log"], stamps)  # not put in order


def test_types_that_are_not_read(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"]
        demo["compound"] = np.zeros(4, [("a", "f4"), ("b", "i4")])
        demo["complex"] = np.zeros(4, complex)
        demo["opaque"] = np.array([b"abcd"] * 4, "V4")
        references = demo.create_dataset("references", (4,), h5py.ref_dtype)
        references[:] = [demo["actions"].ref] * 4
        ragged = demo.create_dataset("ragged", (4,), h5py.vlen_dtype(np.float64))
        ragged[0] = [1.0, 2.0]
        blobs = demo.create_dataset("blobs", (4,), h5py.vlen_dtype(np.uint8))
        blobs[0] = np.frombuffer(b"\x80\x04\x95\xff pickle", np.uint8)
    (episode,) = read(path)
    assert set(episode.streams) == {"actions", "obs/eef_pos", "obs/agentview_image"}
    assert sum(int(problem.split(": ")[-1].split()[0]) for problem in episode.problems) == 6
    assert "blobs: 1 skipped, of bytes that are neither a picture nor a text" in episode.problems


def test_nothing_outside_the_file_is_read(tmp_path):
    (tmp_path / "secret.bin").write_bytes(np.full(4, 4242.0).tobytes())
    with h5py.File(tmp_path / "secret.hdf5", "w") as file:
        file["data/demo_9/actions"] = np.full(4, 4242.0)
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"]
        demo["external_link"] = h5py.ExternalLink("secret.hdf5", "data/demo_9/actions")
        demo["soft_link"] = h5py.SoftLink("/data/demo_0/actions")
        demo["loop"] = demo  # a hard link to its own group
        demo.create_dataset("external", (4,), "f8", external=[("secret.bin", 0, 32)])
        virtual = h5py.VirtualLayout((4,), "f8")
        virtual[:] = h5py.VirtualSource("secret.hdf5", "data/demo_9/actions", (4,))
        demo.create_virtual_dataset("virtual", virtual)
        file["data/demo_1"] = h5py.ExternalLink("secret.hdf5", "data/demo_9")
    before = os.listdir(tmp_path)
    first, second = read(path)
    assert set(first.streams) == {"actions", "obs/eef_pos", "obs/agentview_image"}
    assert set(first.problems) == {"external_link, soft_link: 2 skipped, links, which are not followed",
                                   "external, virtual: 2 skipped, with values in another file"}
    assert second == Refused(name="demo_1", reason="expected a group data/demo_<number> with data sets in it")
    assert os.listdir(tmp_path) == before


def test_hostile_names(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file.create_group("data/demo_../x")
        for name in (b"..", b"a\nb", "\u202etxt".encode()):
            space = h5py.h5s.create_simple((4,))  # to HDF5, names are bytes
            h5py.h5d.create(file["data/demo_0"].id, name, h5py.h5t.NATIVE_DOUBLE, space).write(
                h5py.h5s.ALL, h5py.h5s.ALL, np.ones(4))
    first, second = read(path)
    assert set(first.streams) == {"actions", "obs/eef_pos", "obs/agentview_image"}
    assert "3 skipped, with a name that is none" in first.problems[0]
    assert first.problems[0].isprintable()
    assert isinstance(second, Refused)
    with h5py.File(path, "a") as file:
        h5py.h5d.create(file["data/demo_0"].id, b"\xff\xfe", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((4,)))
    assert "a name that is not UTF-8" in read(path)[0].reason


def test_rows_that_do_not_line_up_are_refused(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=3)
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/eef_pos"]
        file["data/demo_1/obs/eef_pos"] = np.zeros((3, 2))
        file["data/demo_0"].attrs["num_samples"] = 9
        file["data/demo_2/extra"] = np.zeros((3, 2))
    first, second, third = read(path)
    assert first.problems == ("num_samples says 9, found 4 rows",)
    assert second == Refused(name="demo_1", reason="obs/eef_pos has 3 rows, expected 4; half-written?")
    assert third.problems == ("extra: 1 skipped, not of 4 rows",)


def test_rows_that_were_never_written_are_refused(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=3)
    with h5py.File(path, "a") as file:
        file["data/demo_0"].create_dataset("contiguous", (4, 2), "f8")  # would be read as zeros
        chunked = file["data/demo_1"].create_dataset("chunked", (4, 2), "f8", chunks=(1, 2))
        chunked[:3] = 1
    first, second, third = read(path)
    assert first.reason == "contiguous: 1 of 1 chunks were never written; half-written?"
    assert second.reason == "chunked: 1 of 4 chunks were never written; half-written?"
    assert isinstance(third, LogEpisode)


def test_episodes_without_rows_are_refused(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data/demo_1/actions"] = np.zeros((0, 7))
        file.create_group("data/demo_2")
        file["data/other"] = np.zeros(3)
    _, *refused = read(path)
    assert [each.name for each in refused] == ["demo_1", "demo_2", "other"]
    assert refused[0].reason == "no rows; an episode needs at least one step"


@pytest.mark.parametrize("content", ["nothing", "no demos", "many groups", "no rows", "text"])
def test_no_episodes_is_an_error(tmp_path, content):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        if content == "no demos":
            file.create_group("data").attrs["env_args"] = "{}"
        elif content == "many groups":
            file["traj_0/actions"] = file["traj_1/actions"] = np.zeros((3, 2))
        elif content == "no rows":
            file["x"] = 5.0
        elif content == "text":
            file["x"] = ["a", "b"]
    assert hdf5.sniff(path) == "HDF5"
    with pytest.raises(UserError, match=r"expected episodes in HDF5, found none: [^\n]+; check the path"):
        hdf5.open_log(path)


def test_what_is_no_hdf5(tmp_path):
    for name, content in (("empty", b""), ("text.hdf5", b"hello"), ("short.h5", b"\x89HDF")):
        (tmp_path / name).write_bytes(content)
        assert hdf5.sniff(tmp_path / name) is None
    assert hdf5.sniff(tmp_path) is None
    assert hdf5.sniff(tmp_path / "missing") is None
    with pytest.raises(UserError, match="found none"):
        hdf5.open_log(tmp_path / "missing")


def test_a_minari_set_is_left_to_its_own_reader(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["episode_0/observations"] = np.zeros((3, 2))
    with pytest.raises(UserError, match="a Minari set"):
        hdf5.open_log(tmp_path / "a.hdf5")


def test_a_process_that_dies_or_hangs_is_replaced(tmp_path, monkeypatch):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    log = hdf5.open_log(path)
    hdf5_process._process._child.kill()
    (refused,) = log.episodes()
    assert refused == Refused(name="demo_0", reason="the HDF5 library crashed on it; damaged?")
    (episode,) = log.episodes()
    monkeypatch.setattr(hdf5_process, "WAIT_S", -1.0)
    (refused,) = log.episodes()
    assert "gave no answer" in refused.reason
    monkeypatch.undo()
    assert len(list(episode.streams["obs/agentview_image"].pictures(range(4)))) == 4


def test_an_interrupted_question_is_not_answered_later(tmp_path, monkeypatch):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    assert hdf5_process.list_children(path, "data") == {"demo_0": "group"}

    def interrupted(wait):
        raise KeyboardInterrupt

    monkeypatch.setattr(hdf5_process._process._pipe, "poll", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        hdf5_process.read_attributes(path, "data")
    assert hdf5_process.list_children(path, "data") == {"demo_0": "group"}


def test_a_file_that_is_still_written(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        with pytest.raises(UserError, match="unable to lock file"):
            hdf5.open_log(path)
        file["data/demo_1/actions"] = np.ones((2, 3))
    first, second = read(path)
    with h5py.File(path, "a") as file:  # having read it does not lock it
        file["data/demo_0/more"] = np.ones((4, 3))
    assert len(list(first.streams["obs/agentview_image"].pictures(range(4)))) == 4
    assert len(second.streams) == 1


def test_a_forked_process_asks_its_own(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    assert len(read(path)) == 1
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if isinstance(read(path)[0], LogEpisode) else 1)
        finally:
            os._exit(2)
    assert len(read(path)) == 1
    assert os.waitpid(child, 0)[1] == 0


@given(values=hnp.arrays(
    st.sampled_from(["f2", "f4", "f8", ">f8", "i1", "u1", "i4", "u4", ">i2", "?"]),
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=2, max_side=5)))
@settings(max_examples=30)
def test_numbers_survive(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("h5") / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = values
    (episode,) = read(path)
    np.testing.assert_array_equal(episode.streams["x"].values,
                                  values.astype("f8").reshape(len(values), -1))  # NaN and infinities too
    assert len(episode.streams["x"]) == len(values)


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_damage(tmp_path, monkeypatch, version):
    """Cut anywhere, or with any bits flipped: libhdf5 has been seen to crash and to hang on such files."""
    monkeypatch.setattr(hdf5_process, "WAIT_S", 5.0)
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w", libver=version) as file:
        for number in range(2):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["success"] = True
            demo.create_dataset("actions", data=RNG.normal(size=(3, 2)), compression="gzip", chunks=(2, 2))
            demo["obs/cam"] = pictures(3, 4)
            demo["obs/jpeg"] = padded([encode(frame) for frame in pictures(3, 4)])
            demo.create_dataset("mode", data=["a", "b", "c"], dtype=h5py.string_dtype())
    whole = path.read_bytes()
    random_state = random.Random(0)
    damaged = [whole[: len(whole) * part // 50] for part in range(50)]
    for _ in range(130):
        damaged.append(flipped(whole, random_state))
    for content in damaged:
        path.write_bytes(content)
        hdf5.sniff(path)
        with contextlib.suppress(UserError):
            well_formed(read(path))
    path.write_bytes(whole)
    monkeypatch.undo()
    assert all(isinstance(episode, LogEpisode) and len(episode.streams) == 4 for episode in read(path))


@needs_shared
def test_samples():
    """Against h5py."""
    with h5py.File(SHARED / "robomimic_layout.hdf5") as file:
        episodes = read(SHARED / "robomimic_layout.hdf5")
        assert [episode.name for episode in episodes] == list(file["data"])
        for episode in episodes:
            demo = file["data"][episode.name]
            for name in ("actions", "obs/joint_pos"):
                np.testing.assert_array_equal(episode.streams[name].values, demo[name][:])
            np.testing.assert_array_equal(list(episode.streams["obs/cam_high_image"].pictures(range(24))),
                                          demo["obs/cam_high_image"][:])
            assert episode.problems == ("states: 1 skipped, without numbers in a row",)
    with h5py.File(SHARED / "aloha_raw_layout.hdf5") as file:
        (raw,) = read(SHARED / "aloha_raw_layout.hdf5")
        frames = file["observations/images/cam_high"][:]
        np.testing.assert_array_equal(list(raw.streams["observations/images/cam_high"].pictures(range(24))), frames)
        np.testing.assert_array_equal(raw.streams["observations/qpos"].values, file["observations/qpos"][:])
    with h5py.File(SHARED / "aloha_compressed_layout.hdf5") as file:
        (compressed,) = read(SHARED / "aloha_compressed_layout.hdf5")
        found = list(compressed.streams["observations/images/cam_high"].pictures(range(24)))
        for picture, row, length in zip(found, file["observations/images/cam_high"], file["compress_len"][0],
                                        strict=True):
            expected = Image.open(io.BytesIO(row[:length].tobytes())).convert("RGB")
            np.testing.assert_array_equal(picture, np.asarray(expected))
        np.testing.assert_allclose(np.mean(found), np.mean(frames), atol=3)
    with h5py.File(SHARED / "droid_raw_layout.h5") as file:
        (droid,) = read(SHARED / "droid_raw_layout.h5")
        assert droid.instruction == file.attrs["current_task"]
        assert droid.success is Success.YES
        np.testing.assert_array_equal(droid.streams["action/joint_velocity"].values, file["action/joint_velocity"][:])
        np.testing.assert_array_equal(droid.streams["action/gripper_position"].clocks["log"],
                                      file["observation/timestamp/control/step_start"][:] / 1000)
