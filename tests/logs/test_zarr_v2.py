import contextlib
import json
import os
import pickle
import random
import shutil
import sys
import zipfile
from pathlib import Path

import imagecodecs.numcodecs
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from data.logs import zarr_v2
from data.logs.streams import Kind, LogEpisode, Refused
from data.types import UserError
from tests.logs.damage import flipped, well_formed

SHARED = Path(__file__).parents[3] / "shared/logs/derived_conformance"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no sample logs in ../shared/logs beside the repository")
RNG = np.random.default_rng(0)
BLOSC = numcodecs.Blosc("lz4", 5, 1)


def frames(rows):
    """Smooth ones, which lossy codecs keep."""
    level = np.arange(rows)[:, None, None, None] * 8 + np.linspace(0, 60, 16)[None, :, None, None]
    return np.broadcast_to(level + np.array([0, 40, 80]), (rows, 16, 16, 3)).astype(np.uint8)


def put(group, name, values, chunks=None, codec=BLOSC):
    values = np.asarray(values)
    array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks or values.shape,
                               compressors=codec, config={"write_empty_chunks": True})
    array[:] = values
    return values


def write_buffer(path, ends=(3, 8), *, attributes=None, rows=8, **arrays):
    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.attrs.update(attributes or {})
    data = root.create_group("data")
    put(data, "action", RNG.normal(size=(rows, 2)).astype("f4"), (3, 2))
    put(data, "robot0_eef_pos", RNG.normal(size=(rows, 3)))
    put(data, "camera0_rgb", frames(rows), (1, 16, 16, 3))
    for name, values in arrays.items():
        put(data, name, values)
    put(root.create_group("meta"), "episode_ends", np.array(ends, "i8"))
    return path


def zip_of(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{prefix}{file.relative_to(folder)}")
    return path


def read(path):
    return list(zarr_v2.open_log(path).episodes())


@pytest.mark.parametrize("kind", ["folder", "zip", "zip of a folder"])
def test_episodes(tmp_path, kind):
    folder = write_buffer(tmp_path / "a.zarr")
    path = {"folder": lambda: folder, "zip": lambda: zip_of(folder, tmp_path / "a.zarr.zip"),
            "zip of a folder": lambda: zip_of(folder, tmp_path / "b.zip", "set/replay.zarr/")}[kind]()
    expected = zarr.open_group(folder, mode="r", zarr_format=2)["data"]
    before = sorted(tmp_path.rglob("*"))
    assert zarr_v2.sniff(path) == "Zarr v2 replay buffer"
    first, second = read(path)
    assert (first.name, second.name) == ("episode 0", "episode 1")
    assert (first.facts["rows"], second.facts["first_row"], second.facts["clock"]) == (3, 3, "none")
    for episode, rows in ((first, slice(0, 3)), (second, slice(3, 8))):
        assert set(episode.streams) == {"action", "robot0_eef_pos", "camera0_rgb"}
        for name in ("action", "robot0_eef_pos"):
            np.testing.assert_array_equal(episode.streams[name].values, expected[name][rows])
        camera = episode.streams["camera0_rgb"]
        assert (camera.kind, camera.size) == (Kind.IMAGE, (16, 16))
        np.testing.assert_array_equal(list(camera.pictures([0, 1, 1])), frames(8)[rows][[0, 1, 1]])
        np.testing.assert_array_equal(camera.clocks["index"], np.arange(rows.stop - rows.start))
        with pytest.raises(ValueError, match="camera0_rgb: picture 7 cannot be decoded"):
            list(camera.pictures([7]))
    assert first.sha256 != second.sha256
    assert read(path)[0].sha256 == first.sha256
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures_of_umi(tmp_path):
    """JPEG-XL, a picture to a chunk, with the settings that UMI writes."""
    imagecodecs.numcodecs.register_codecs(["imagecodecs_jpegxl"], verbose=False)
    folder = write_buffer(tmp_path / "a.zarr")
    put(zarr.open_group(folder, zarr_format=2)["data"], "camera1_rgb", frames(8), (1, 16, 16, 3),
        imagecodecs.numcodecs.Jpegxl(level=None, effort=3, distance=0.3, lossless=False, decodingspeed=1))
    first, _ = read(zip_of(folder, tmp_path / "a.zarr.zip"))
    np.testing.assert_allclose(list(first.streams["camera1_rgb"].pictures(range(3))), frames(8)[:3], atol=6)


def test_without_imagecodecs(tmp_path, monkeypatch):
    imagecodecs.numcodecs.register_codecs(["imagecodecs_jpegxl"], verbose=False)
    folder = write_buffer(tmp_path / "a.zarr")
    put(zarr.open_group(folder, zarr_format=2)["data"], "camera1_rgb", frames(8), (1, 16, 16, 3),
        imagecodecs.numcodecs.Jpegxl())
    monkeypatch.setitem(sys.modules, "imagecodecs.numcodecs", None)
    assert read(folder)[0].problems == (
        "camera1_rgb: 1 skipped, in the codec imagecodecs_jpegxl; to read it, type pip install imagecodecs",)


def test_float_pictures_many_to_a_chunk(tmp_path):
    first, second = read(write_buffer(tmp_path / "a.zarr", img=frames(8).astype("f4")))
    np.testing.assert_array_equal(list(first.streams["img"].pictures([2])), frames(8)[[2]])
    np.testing.assert_array_equal(list(second.streams["img"].pictures([0, 4])), frames(8)[[3, 7]])


@pytest.mark.parametrize("codec", [None, numcodecs.Zstd(3), numcodecs.LZ4(), numcodecs.Zlib(1), numcodecs.GZip(1),
                                   numcodecs.BZ2(), numcodecs.LZMA()], ids=str)
def test_codecs(tmp_path, codec):
    folder = write_buffer(tmp_path / "a.zarr")
    values = put(zarr.open_group(folder, zarr_format=2)["data"], "x", RNG.normal(size=(8, 2)), (3, 1), codec)
    np.testing.assert_array_equal(read(folder)[1].streams["x"].values, values[3:])


def test_clocks_and_instruction(tmp_path):
    time = 1.7e9 + np.arange(8) * 0.1
    first, second = read(write_buffer(tmp_path / "a.zarr", timestamp=time))
    np.testing.assert_array_equal(second.streams["action"].clocks["log"], time[3:])
    assert (list(first.streams["action"].clocks), first.facts["clock"]) == (["log"], "timestamp, in seconds")
    (first, _) = read(write_buffer(tmp_path / "b.zarr", attributes={"fps": 5, "language_instruction": "serve"}))
    np.testing.assert_allclose(first.streams["action"].clocks["nominal"], [0, 0.2, 0.4])
    assert (first.instruction, first.success_from) == ("serve", "the log has no success label")


@pytest.mark.parametrize(("ends", "names", "refused"), [
    ((3, 3, 8), ["episode 0", "episode 2"], ["episode 1"]),
    ((5, 3, 8), ["episode 0"], ["episode 1", "episode 2"]),  # whether 5 or 3 is wrong cannot be told
    ((3, 11), ["episode 0"], ["episode 1"]),
    ((-2, 8), [], ["episode 0", "episode 1"]),
    ((3, 6), ["episode 0", "episode 1"], ["rows 6 to 8"])])
def test_ends_that_contradict_the_rows(tmp_path, ends, names, refused):
    episodes = read(write_buffer(tmp_path / "a.zarr", ends))
    assert [each.name for each in episodes if isinstance(each, LogEpisode)] == names
    assert [each.name for each in episodes if isinstance(each, Refused)] == refused
    assert all(len(each.streams["action"]) == each.facts["rows"] for each in episodes if isinstance(each, LogEpisode))
    well_formed(episodes)


@given(st.lists(st.integers(-3, 12), min_size=1, max_size=6))
@settings(max_examples=15)
def test_no_row_is_in_two_episodes(tmp_path_factory, ends):
    folder = tmp_path_factory.mktemp("zarr") / "a.zarr"
    write_buffer(folder, ends, count=np.arange(8.0)[:, None])
    episodes = [each for each in read(folder) if isinstance(each, LogEpisode)]
    rows = [row for each in episodes for row in each.streams["count"].values[:, 0]]
    assert len(rows) == len(set(rows))
    assert rows == sorted(rows)


def test_arrays_that_are_shorter(tmp_path):
    first, second = read(write_buffer(tmp_path / "a.zarr", short=np.zeros((4, 2))))
    assert isinstance(first, LogEpisode)
    assert second.reason == "short has 4 rows, the episode is rows 3 to 8; half-written?"


def test_missing_chunks_are_no_zeros(tmp_path):
    folder = write_buffer(tmp_path / "a.zarr")
    (folder / "data/action/2.0").unlink()  # rows 6 to 9
    first, second = read(folder)
    assert isinstance(first, LogEpisode)
    assert second.reason.startswith("data/action: chunk 2.0 is missing; copy the set again")


def test_damaged_chunks(tmp_path):
    folder = write_buffer(tmp_path / "a.zarr")
    for chunk in ("action/0.0", "camera0_rgb/4.0.0.0"):
        file = folder / "data" / chunk
        content = file.read_bytes()
        file.write_bytes(content[:4] + b"\1\0\0\0" + content[8:])  # the size of its numbers
    first, second = read(folder)
    assert first.reason.startswith("action cannot be read (")
    assert len(second.streams["action"]) == 5  # rows 3 to 8 are in other chunks
    assert len(list(second.streams["camera0_rgb"].pictures([0, 2]))) == 2
    with pytest.raises(ValueError, match=r"camera0_rgb: picture 1 cannot be decoded \([^\n]+\)$"):
        list(second.streams["camera0_rgb"].pictures([0, 1]))


def test_chunks_that_would_grow_without_bound(tmp_path):
    folder = write_buffer(tmp_path / "a.zarr")
    (folder / "data/action/0.0").write_bytes(bytes(5000))
    assert "chunk 0.0 has 5000 bytes, expected at most 4144" in read(folder)[0].reason


def test_cut_chunks(tmp_path):
    """Blosc would make numbers of the memory behind them."""
    folder = write_buffer(tmp_path / "a.zarr")
    chunk = folder / "data/action/1.0"
    whole = chunk.read_bytes()
    for size in range(len(whole)):
        chunk.write_bytes(whole[:size])
        assert [type(episode) for episode in read(folder)] == [LogEpisode, Refused]
        assert f"chunk 1.0 has {size} bytes, its header says" in read(folder)[1].reason


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("change", [
    {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 4}]}, {"dtype": "|O"}, {"dtype": "<U8"},
    {"dtype": "<M8[s]"},
    {"filters": [{"id": "pickle", "protocol": 4}]}, {"compressor": {"id": "pickle", "protocol": 4}},
    {"compressor": {"id": "msgpack2"}}, {"filters": [{"id": "json2"}]}, {"filters": "pickle"}, {"compressor": [1]},
    {"filters": [{"id": ["pickle"]}]}, {"compressor": {}}, {"dtype": [["a", "<f4"]]}, {"dtype": "<f3"}, {"shape": [8]},
    {"shape": [8, -2]}, {"chunks": [0, 2]}, {"chunks": [2**39, 2]}, {"shape": "many"}, {"shape": [], "chunks": []}],
    ids=str)
def test_only_numbers_are_opened(tmp_path, monkeypatch, change):
    """An array of objects would run what is in it."""
    monkeypatch.chdir(tmp_path)
    folder = write_buffer(tmp_path / "a.zarr", objects=np.zeros((8, 2)))
    file = folder / "data/objects/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (folder / "data/objects/0.0").write_bytes(pickle.dumps(np.array([Evil()] * 16, object)))
    for path in (folder, zip_of(folder, tmp_path / "a.zarr.zip")):
        (first, _) = read(path)
        assert "objects" not in first.streams
        assert first.problems[0].startswith("objects: 1 skipped, ")
        assert len(first.problems) == 1
    assert not (tmp_path / "pwned").exists()


def test_ends_of_objects(tmp_path):
    folder = write_buffer(tmp_path / "a.zarr")
    file = folder / "meta/episode_ends/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "|O", "filters": [{"id": "pickle"}]}))
    with pytest.raises(UserError, match=r"of type '\|O', which is not read"):
        zarr_v2.open_log(folder)


def test_hostile_names_in_a_zip(tmp_path):
    path = zip_of(write_buffer(tmp_path / "in/a.zarr"), tmp_path / "in/a.zarr.zip")
    about = (tmp_path / "in/a.zarr/data/robot0_eef_pos/.zarray").read_text()
    chunk = (tmp_path / "in/a.zarr/data/robot0_eef_pos/0.0").read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("data/../../../out/x", "data//etc/x", "data/a\nb", "/data/y"):
            archive.writestr(f"{name}/.zarray", about)
            archive.writestr(f"{name}/0.0", chunk)
        archive.writestr("../evil.txt", "evil")
        archive.writestr("/tmp/evil-wm-rl.txt", "evil")
    shutil.rmtree(tmp_path / "in/a.zarr")
    episodes = read(path)
    assert [set(episode.streams) for episode in episodes] == [{"action", "robot0_eef_pos", "camera0_rgb"}] * 2
    well_formed(episodes)
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == ["a.zarr.zip"]
    assert not Path("/tmp/evil-wm-rl.txt").exists()


def test_what_is_no_replay_buffer(tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    shutil.rmtree(write_buffer(tmp_path / "zero.zarr") / "data")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    (tmp_path / "text").write_text("hello")
    for name in ("empty.zarr", "other.zip", "text", "missing"):
        assert zarr_v2.sniff(tmp_path / name) is None
        with pytest.raises(UserError, match=r"expected a Zarr v2 replay buffer with episodes, found none: [^\n]+$"):
            zarr_v2.open_log(tmp_path / name)
    with pytest.raises(UserError, match="expected arrays of numbers in data/, found none"):
        zarr_v2.open_log(tmp_path / "zero.zarr")
    whole = zip_of(write_buffer(tmp_path / "a.zarr"), tmp_path / "a.zarr.zip").read_bytes()
    (tmp_path / "cut.zarr.zip").write_bytes(whole[: len(whole) // 2])
    assert zarr_v2.sniff(tmp_path / "cut.zarr.zip") == "Zarr v2 replay buffer"
    with pytest.raises(UserError, match="copy it again"):
        zarr_v2.open_log(tmp_path / "cut.zarr.zip")


def test_no_episodes_is_an_error(tmp_path):
    folder = write_buffer(tmp_path / "a.zarr")
    put(zarr.open_group(folder, zarr_format=2)["meta"], "x", np.zeros(1))
    file = folder / "meta/episode_ends/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [0]}))
    with pytest.raises(UserError, match=r"meta/episode_ends has shape \[0\]"):
        zarr_v2.open_log(folder)


def test_damage(tmp_path):
    """The zip cut anywhere, or with any bits flipped; any file of the folder likewise."""
    imagecodecs.numcodecs.register_codecs(["imagecodecs_jpegxl"], verbose=False)
    folder = tmp_path / "a.zarr"
    root = zarr.open_group(folder, mode="w", zarr_format=2)
    put(root.create_group("data"), "action", RNG.normal(size=(4, 2)), (2, 2))
    put(root["data"], "img", frames(4).astype("f4"), (4, 16, 16, 3))
    put(root["data"], "rgb", frames(4), (2, 16, 16, 3), imagecodecs.numcodecs.Jpegxl(lossless=False, distance=1.0))
    put(root.create_group("meta"), "episode_ends", np.array([2, 4]))
    archive = zip_of(folder, tmp_path / "a.zarr.zip")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    random_state = random.Random(0)
    whole = archive.read_bytes()
    trials = [(archive, archive, whole[: len(whole) * part // 50]) for part in range(50)]
    for number in range(150):
        file, opened = (files[number % len(files)], folder) if number % 3 else (archive, archive)
        trials.append((file, opened, flipped(file.read_bytes(), random_state)))
    for file, opened, content in trials:
        intact = file.read_bytes()
        file.write_bytes(content)
        zarr_v2.sniff(opened)
        with contextlib.suppress(UserError):
            well_formed(read(opened))
        file.write_bytes(intact)
    assert all(isinstance(episode, LogEpisode) and len(episode.streams) == 3 for episode in read(folder))


@needs_shared
def test_samples():
    """Against zarr."""
    expected = zarr.open_group(SHARED / "dp_replay_buffer.zarr", mode="r", zarr_format=2)
    for name in ("dp_replay_buffer.zarr", "dp_replay_buffer.zarr.zip"):
        assert zarr_v2.sniff(SHARED / name) == "Zarr v2 replay buffer"
        begin = 0
        for episode, end in zip(read(SHARED / name), expected["meta/episode_ends"][:], strict=True):
            for key in ("action", "robot0_joint_pos"):
                np.testing.assert_array_equal(episode.streams[key].values, expected["data"][key][begin:end])
            found = np.stack(list(episode.streams["camera0_rgb"].pictures(range(end - begin))))
            np.testing.assert_array_equal(found, expected["data/camera0_rgb"][begin:end])
            begin = end
