import multiprocessing
import os
import signal

import numpy as np
import pytest
import zarr

from data import cold
from data.cold import CODECS, compact
from data.layout import field_table, read_attributes
from data.sampler import DecisionSampler, ReplayConfig, StepSampler
from data.store import ReplayStore
from data.types import Behaviour, Source, UserError

ALL = {"quality": 90, "keep_newest": 0}
KILL, POINTS = "kill", ("rename", "link", "unlink", "rmdir", "mkdir")


@pytest.fixture
def filled(tmp_path, make_store, make_trajectory):
    """Three segments: two of ``sim``, one of ``real``, with and without a known behaviour."""
    given = [make_trajectory(0, 20), make_trajectory(1, 3), make_trajectory(2, 40),
             make_trajectory(3, 30, source=Source.REAL, behaviour=Behaviour.UNKNOWN)]
    store = make_store(tmp_path / "s", given[:2])
    store.close()
    store.append(given[2:])
    store.close()
    return tmp_path / "s", given


def batches(path, d):
    store = ReplayStore.open(path)
    steps = StepSampler(store, sources={"sim": 1, "real": 1}, context=2, horizon=5, seed=3)
    capacity = dict.fromkeys(("sim", "real", "imagined"))
    decisions = DecisionSampler(store, ReplayConfig(windows=6, decisions=d, discount=0.9, capacity=capacity, mix={
        "sim": 1, "real": 0, "imagined": 0}), chunk=2, seed=5)
    return [sampler for step in range(6) for sampler in (steps.sample(step, 5), decisions.sample(step))]


def tensors(batch):
    for name, value in vars(batch).items():
        for camera, tensor in value.items() if isinstance(value, dict) else [("", value)]:
            yield f"{name} {camera}", tensor.numpy().tobytes() if hasattr(tensor, "numpy") else tensor


@pytest.mark.parametrize("decisions", [3, 100])
def test_samplers_cannot_tell_hot_from_zstd(filled, decisions):
    path, _ = filled
    hot = batches(path, decisions)
    assert len(compact(path, codec="zstd", **ALL).done) == 3
    for before, after in zip(hot, batches(path, decisions), strict=True):
        assert dict(tensors(before)) == dict(tensors(after))


def test_zarr_opens_a_zstd_segment_as_it_was(filled, spec, assert_same):
    path, given = filled
    names = [segment.name for segment in ReplayStore.open(path).segments]
    groups = {name: zarr.open_group(path / "seg" / name, mode="r") for name in names}
    before = {name: {field: group[field][:] for field in group.array_keys()} for name, group in groups.items()}
    report = compact(path, codec="zstd", **ALL)
    assert [done.segment for done in report.done] == names
    assert all(done.psnr is None for done in report.done)
    for name in names:
        group = zarr.open_group(path / "seg" / name, mode="r")
        assert group.attrs["tier"] == "cold"
        assert group.attrs["codec"] == {"name": "zstd", "level": 3}
        assert group["rgb_front"].chunks == (16, 8, 8, 3)
        assert set(group.array_keys()) == before[name].keys()
        for field, values in before[name].items():
            np.testing.assert_array_equal(group[field][:], values)
            assert group[field].dtype == values.dtype
        assert group["rgb_wrist"].metadata.dimension_names == ("time", "height", "width", "channel")
    for index, trajectory in enumerate(given):
        assert_same(ReplayStore.open(path).trajectory(index), trajectory)


def test_zstd_makes_smooth_frames_smaller(tmp_path, make_store, make_trajectory):
    frames = {camera: np.full((31, 8, 8, 3), 7, np.uint8) for camera in ("front", "wrist")}
    make_store(tmp_path / "s", [make_trajectory(0, 30, frames=frames)]).close()
    (done,) = compact(tmp_path / "s", codec="zstd", **ALL).done
    assert done.after < done.before - 2 * 31 * 8 * 8 * 3 * 0.8
    assert not list((tmp_path / "s/tmp").glob("compacting*"))


def test_jpeg_keeps_what_is_said_of_the_loss(tmp_path, make_store, make_trajectory, spec):
    ramp = np.linspace(0, 255, 8).astype(np.uint8)
    frames = {camera: np.stack([np.broadcast_to(np.roll(ramp, i)[:, None, None], (8, 8, 3)) for i in range(21)])
              for camera in spec.cameras}
    given = [make_trajectory(0, 20, frames=frames), make_trajectory(1, 20, frames=frames)]
    make_store(tmp_path / "s", given).close()
    (done,) = compact(tmp_path / "s", codec="jpeg", **ALL).done
    attributes = read_attributes(tmp_path / "s/seg/00000000")
    assert attributes["codec"] == {"name": "jpeg", "quality": 90, "psnr_db": done.psnr}
    assert attributes["tier"] == "cold"
    assert done.psnr > 25
    store = ReplayStore.open(tmp_path / "s")
    for index, trajectory in enumerate(given):
        read = store.trajectory(index)
        for camera in spec.cameras:
            error = np.square(read.frames[camera].astype(float) - trajectory.frames[camera]).mean()
            assert 10 * np.log10(255**2 / error) > done.psnr - 1
        np.testing.assert_array_equal(read.action, trajectory.action)
    group = zarr.open_group(tmp_path / "s/seg/00000000", mode="r")
    begin, size = group["rgb_front_span"][30]
    assert group["rgb_front_jpeg"][begin : begin + 2].tobytes() == b"\xff\xd8"
    assert group["rgb_front_jpeg"][begin + size - 2 : begin + size].tobytes() == b"\xff\xd9"


def test_a_column_that_is_compressed_indexes_as_an_array(filled):
    path, given = filled
    compact(path, codec="zstd", **ALL)
    column = ReplayStore.open(path).segments[1].columns["rgb_front"]
    expected = given[2].frames["front"]
    assert (column.shape, column.dtype, len(column)) == (expected.shape, expected.dtype, len(expected))
    for rows in (0, np.int64(17), -1, slice(None), slice(14, 19), slice(30, 5, -7), slice(3, 3), [5, 5, 40],
                 np.array([[0, 16], [32, 1]]), slice(-3, None), np.array([], int)):
        np.testing.assert_array_equal(column[rows], expected[rows])
    out = np.empty((3, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(column.take([-4, 2, 99], axis=0, out=out, mode="clip"), expected[[0, 2, 40]])
    with pytest.raises(IndexError):
        column[41]
    with pytest.raises(ValueError, match="read-only"):
        column._chunk(0)[0] = 0


def test_the_newest_of_each_source_stay_hot(filled):
    path, _ = filled
    assert [done.segment for done in compact(path, codec="zstd", quality=90, keep_newest=1).done] == ["00000000"]
    tiers = {segment.name: segment.tier for segment in ReplayStore.open(path).segments}
    assert tiers == {"00000000": "cold", "00000001": "hot", "00000002": "hot"}
    told = []
    report = compact(path, codec="jpeg", **ALL, progress=lambda done, total: told.append((done, total)))
    assert [done.segment for done in report.done] == ["00000001", "00000002"]
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_readers_keep_what_they_mapped_and_overlays_stay(filled, assert_same):
    path, given = filled
    reader = ReplayStore.open(path)
    rows = reader.segments[2].rows
    reader.label_behaviour("00000002", action_token=np.ones((rows, 3), "i2"), log_prob=np.zeros((rows, 3), "f4"),
                           decision=np.ones(rows, bool), model="clone")
    compact(path, codec="zstd", **ALL)
    assert reader.segments[0].tier == "hot"
    assert_same(reader.trajectory(0), given[0])
    reader.refresh()
    assert_same(reader.trajectory(2), given[2])
    assert ReplayStore.open(path).trajectory(3).behaviour is Behaviour.CLONED


def test_a_damaged_segment_is_left_alone(filled):
    path, _ = filled
    file = path / "seg/00000001/proprio/c.0.0"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    report = compact(path, codec="zstd", **ALL)
    assert report.skipped == ["00000001"]
    assert len(report.done) == 2


def test_a_damaged_chunk_is_an_error_of_one_line(filled):
    path, _ = filled
    compact(path, codec="zstd", **ALL)
    file = path / "seg/00000001/rgb_front/c.0.0.0.0"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    store = ReplayStore.open(path)
    with pytest.raises(UserError, match=r"damaged segment: .*rgb_front.* action=verify repair=true store=.*/s$"):
        store.trajectory(2)
    file.write_bytes(content[:-3])
    with pytest.raises(UserError, match="damaged segment"):
        ReplayStore.open(path)


@pytest.mark.parametrize(("setting", "said"), [
    ({"codec": "gzip"}, "codec: expected zstd or jpeg, got 'gzip'; type codec=zstd"),
    ({"quality": 0}, "quality: expected 1 to 95, got 0"), ({"keep_newest": -1}, "keep_newest: expected 0 or more")])
def test_bad_settings_are_one_line(filled, setting, said):
    with pytest.raises(UserError, match=said):
        compact(filled[0], **(ALL | {"codec": "zstd"} | setting))


def kill_at(path, codec, number):
    """Compact in this process, and die just before or just after the ``number``-th change of a name or folder."""
    calls = iter(range(10**6))

    def dying(real):
        def call(*arguments, **options):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in POINTS:
        setattr(os, name, dying(getattr(os, name)))
    cold.exchange = dying(cold.exchange)
    compact(path, codec=codec, **ALL)


@pytest.mark.parametrize("codec", CODECS)
def test_a_kill_at_any_rename_leaves_whole_segments(tmp_path, make_store, make_trajectory, codec, assert_same, spec):
    given = [make_trajectory(0, 4), make_trajectory(1, 18)]
    make_store(tmp_path / "s", given).close()
    context = multiprocessing.get_context("fork")
    tiers, lossy = set(), codec == "jpeg"
    for number in range(10**3):
        child = context.Process(target=kill_at, args=(tmp_path / "s", codec, number))
        child.start()
        child.join()
        store = ReplayStore.open(tmp_path / "s")
        assert len(store) == 2
        tiers.add(tier := store.segments[0].tier)
        for index, trajectory in enumerate(given):
            read = store.trajectory(index)
            assert read.frames["front"].shape == trajectory.frames["front"].shape
            frames = trajectory.frames if lossy and tier == "cold" else read.frames
            assert_same(type(read)(**(vars(read) | {"frames": frames})), trajectory)
        if tier == "cold":
            break
        assert child.exitcode == -signal.SIGKILL
    assert number > 40
    assert tiers == {"hot", "cold"}
    assert compact(tmp_path / "s", codec=codec, **ALL).done == []
    assert not list((tmp_path / "s/tmp").glob("compacting*"))
    group = zarr.open_group(tmp_path / "s/seg/00000000", mode="r")
    assert ("rgb_front" in group) == (not lossy)
    assert field_table(spec).keys() >= {"rgb_front"}
