import dataclasses
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.lerobot import VERSIONS, read_lerobot
from data.lerobot_writer import write_lerobot
from data.logs.ingest import IngestConfig, ingest, mapping_of
from data.logs.lerobot import open_log
from data.logs.mapping import Part, to_yaml
from data.logs.streams import Refused
from data.logs.survey import episodes_of
from data.store import ReplayStore
from data.types import Behaviour, Source, Statistics, Success, UserError

G1 = Path(__file__).parents[3] / "shared/logs/lerobot_v21_g1_inspire"
SUCCESSES = (Success.YES, Success.NO, Success.UNKNOWN)


def config(**changes):
    return IngestConfig(**({"image_size": 16, "cameras": None, "embodiment": None, "clip": False} | changes))


@pytest.fixture
def recorded(make_trajectory):
    return [make_trajectory(i, 5 + i, success=success, size=16, terminated=success is Success.YES)
            for i, success in enumerate(SUCCESSES)]


@pytest.fixture
def log(tmp_path, spec, statistics, recorded):
    def make(version="v2.1", name="log", trajectories=recorded, statistics=statistics, **changes):
        changed = type(spec)(**(vars(spec) | {"image_size": 16} | changes))
        write_lerobot(tmp_path / name, trajectories, spec=changed, statistics=statistics, fps=10, version=version)
        return tmp_path / name

    return make


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_log_becomes_real_trajectories(tmp_path, log, version, recorded, statistics):
    report = ingest(log(version), tmp_path / "store", config())
    assert (report.added, report.refused) == (3, {})
    assert report.steps == 5 + 6 + 7
    assert report.success == {"yes": 1, "no": 1, "unknown": 1}
    store = ReplayStore.open(tmp_path / "store")
    assert store.embodiment == "arm"
    assert store.spec.cameras == ("front", "wrist")
    assert store.spec.control_hz == 10
    assert store.position == {"00000000": 3}
    for index, trajectory in enumerate(recorded):
        read = store.trajectory(index)
        assert (read.source, read.behaviour, read.success) == (Source.REAL, Behaviour.UNKNOWN, SUCCESSES[index])
        np.testing.assert_array_equal(read.proprio, trajectory.proprio)
        np.testing.assert_array_equal(read.timestamp, trajectory.timestamp)
        raw = statistics.denormalise(trajectory.action)
        np.testing.assert_allclose(store.statistics.denormalise(read.action), raw, atol=1e-5)
        assert np.abs(read.action).max() <= 1
        assert (read.action_token == -1).all()
        assert np.isnan(read.log_prob).all()
        assert not read.decision.any()
        assert (read.policy_version == -1).all()
        ended = read.success is Success.YES
        assert read.reward.tolist() == [0.0] * (len(read) - 1) + [float(ended)]
        assert read.terminated.tolist() == [False] * (len(read) - 1) + [ended]
        assert read.truncated.tolist() == [False] * (len(read) - 1) + [not ended]
        assert read.provenance["recorded"] == trajectory.provenance
        assert str(tmp_path) not in json.dumps(read.provenance)
    actions = np.concatenate([store.trajectory(i).action for i in range(3)])
    assert actions.max(0) == pytest.approx(1, abs=0.2)  # the range is the log's own, its last rows included


def test_the_store_of_another_source_takes_a_log_without_loss(tmp_path, log, recorded, make_store, statistics, spec):
    """What the robot stand-in does: logs in the units of the simulator, into the simulator's store."""
    changed = type(spec)(**(vars(spec) | {"image_size": 16}))
    ReplayStore.create(tmp_path / "store", spec=changed, statistics=statistics, embodiment="arm").append(recorded)
    report = ingest(log("v3.0"), tmp_path / "store", config())
    assert report.added == 3
    store = ReplayStore.open(tmp_path / "store")
    for index, trajectory in enumerate(recorded):
        np.testing.assert_allclose(store.trajectory(3 + index).action, trajectory.action, atol=1e-5)
        assert store.trajectory(3 + index).task == "push"


@pytest.mark.parametrize("version", VERSIONS)
def test_twice_is_once(tmp_path, log, version):
    path = log(version)
    ingest(path, tmp_path / "store", config())
    before = contents(tmp_path / "store")
    report = ingest(path, tmp_path / "store", config())
    assert (report.added, report.already) == (0, 3)
    assert "3 were in the store already" in "\n".join(report.lines())
    assert contents(tmp_path / "store") == before


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, log, monkeypatch):
    path, append, calls = log(), ReplayStore.append, []

    def stop_at_the_second(self, trajectories):
        calls.append(trajectories)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return append(self, trajectories)

    monkeypatch.setattr(ReplayStore, "append", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ingest(path, tmp_path / "store", config())
    monkeypatch.undo()
    report = ingest(path, tmp_path / "store", config())
    assert (report.already, report.added) == (1, 2)


def test_half_written_episodes_are_refused_and_the_others_added(tmp_path, log):
    path = log()
    parquet = path / "data/chunk-000/episode_000000.parquet"
    parquet.write_bytes(parquet.read_bytes()[:50])
    video = path / "videos/chunk-000/observation.images.wrist/episode_000002.mp4"
    video.write_bytes(video.read_bytes()[:200])
    report = ingest(path, tmp_path / "store", config())
    assert report.added == 1
    assert set(report.refused) == {"log episode 0", "log episode 2"}
    assert f"{video.relative_to(path)}: cannot be decoded" in report.refused["log episode 2"]
    assert len(ReplayStore.open(tmp_path / "store")) == 1
    text = "\n".join(report.lines())
    assert "refused log episode 0: data/chunk-000/episode_000000.parquet: unreadable parquet" in text


def test_nothing_whole_is_an_error_and_makes_no_store(tmp_path, log):
    path = log()
    for video in path.glob("videos/**/*.mp4"):
        video.unlink()
    with pytest.raises(UserError, match=r"nothing usable.*; log episode 0: .*missing.* \(2 more were refused\)"):
        ingest(path, tmp_path / "store", config())
    for parquet in path.glob("data/**/*.parquet"):
        parquet.unlink()
    with pytest.raises(UserError, match=r"nothing usable .*episodes 0-2: 3 missing of 3 that meta names"):
        ingest(path, tmp_path / "store", config())
    assert not (tmp_path / "store").exists()


def test_a_store_that_does_not_fit_is_refused_and_untouched(tmp_path, log, statistics, make_trajectory):
    path = log()
    ingest(path, tmp_path / "store", config())
    before = contents(tmp_path / "store")
    wide = Statistics(action_low=statistics.action_low * 3, action_high=statistics.action_high * 3,
                      proprio_mean=statistics.proprio_mean, proprio_std=statistics.proprio_std)
    cases = [
        (path, config(embodiment="leg"), "embodiment does not match: .* arm, the logs leg; type logs.embodiment="),
        (path, config(image_size=8), "image_size does not match: .* 16, the logs 8; type logs.image_size=16"),
        (path, config(cameras={"front": "observation.images.front"}), "cameras does not match"),
        (path, config(cameras={"front": "observation.images.fornt"}), "has no 'observation.images.fornt'"),
        (log(name="names", action_names=("u", "v", "x")), config(), "action does not match"),
        (log(name="states", proprio_names=("row", "z")), config(), "proprio does not match"),
        (log(name="wide", statistics=wide), config(), "actions do not fit: u .* type logs.clip=true"),
    ]
    for source, settings, message in cases:
        with pytest.raises(UserError, match=message) as error:
            ingest(source, tmp_path / "store", settings)
        assert "\n" not in str(error.value)
        assert contents(tmp_path / "store") == before
    report = ingest(tmp_path / "wide", tmp_path / "store", config(clip=True))
    assert report.added == 3
    store = ReplayStore.open(tmp_path / "store")
    assert max(np.abs(store.trajectory(i).action).max() for i in range(len(store))) == 1


def test_cameras_can_be_chosen_and_named(tmp_path, log):
    ingest(log(), tmp_path / "store", config(cameras={"main": "observation.images.wrist"}, image_size=8))
    store = ReplayStore.open(tmp_path / "store")
    assert store.spec.cameras == ("main",)
    assert store.trajectory(0).frames["main"].shape == (6, 8, 8, 3)


def test_a_value_that_is_not_finite_cuts_a_log_as_it_does_any_other(tmp_path, log, recorded):
    path = log()
    file = path / "data/chunk-000/episode_000002.parquet"
    table = pq.read_table(file)
    rows = table["action"].to_pylist()
    rows[3] = [1.0, float("nan"), 0.6]
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", pa.array(rows)), file)
    report = ingest(path, tmp_path / "store", config())
    assert report.of("log").masked == {"action: values that are not finite": 1}
    store = ReplayStore.open(tmp_path / "store")
    assert [store.trajectory(i).provenance["episode"] for i in range(len(store))] == [
        "episode 0", "episode 1", "episode 2#0", "episode 2#1"]
    for part, first, last in ((2, 0, 3), (3, 4, 8)):
        np.testing.assert_array_equal(store.trajectory(part).proprio, recorded[2].proprio[first:last])
        np.testing.assert_array_equal(
            store.trajectory(part).frames["front"], store_of_whole(tmp_path, log).frames["front"][first:last])


def store_of_whole(tmp_path, log):
    if not (tmp_path / "whole").exists():
        ingest(log(name="undamaged"), tmp_path / "whole", config())
    return ReplayStore.open(tmp_path / "whole").trajectory(2)


def test_a_dry_run_commits_nothing_and_finds_what_a_run_finds(tmp_path, log):
    path = log()
    report = ingest(path, tmp_path / "store", config(), dry_run=True)
    assert (report.added, report.steps) == (3, 18)
    assert not (tmp_path / "store").exists()
    for video in path.glob("videos/**/*.mp4"):
        video.write_bytes(video.read_bytes()[:-1000])
    with pytest.raises(UserError, match="nothing usable was found"):
        ingest(path, tmp_path / "store", config(), dry_run=True)


def test_a_log_is_resampled_by_a_mapping_and_the_one_of_inspect_changes_nothing(tmp_path, log, recorded):
    path = log("v3.0")
    ingest(path, tmp_path / "store", config())
    own = mapping_of(read_lerobot(path), None, None)
    (tmp_path / "own.yaml").write_text(to_yaml(own))
    assert ingest(path, tmp_path / "store", config(), mapping=tmp_path / "own.yaml").already == 3
    slow = dataclasses.replace(own, rate=5.0, proprio=(Part(stream="observation.state", dims=("y",)),))
    (tmp_path / "slow.yaml").write_text(to_yaml(slow))
    report = ingest(path, tmp_path / "slow", config(), mapping=tmp_path / "slow.yaml", workers=2)
    assert (report.added, report.refused) == (3, {})
    fast = ReplayStore.open(tmp_path / "store")
    for index, trajectory in enumerate(recorded):
        read = ReplayStore.open(tmp_path / "slow").trajectory(index)
        np.testing.assert_array_equal(read.proprio, trajectory.proprio[::2, 1:])
        np.testing.assert_array_equal(read.frames["wrist"], fast.trajectory(index).frames["wrist"][::2])
        np.testing.assert_allclose(read.timestamp, trajectory.timestamp[::2])
        assert read.success is trajectory.success
    with pytest.raises(UserError, match="are for LeRobot sets without a mapping"):
        ingest(path, tmp_path / "slow", config(embodiment="leg"), mapping=tmp_path / "slow.yaml")


def test_several_sets_are_one_ingest_and_processes_do_not_matter(tmp_path, log, recorded):
    log("v3.0", name="sets/a", trajectories=recorded[:2])
    log("v2.1", name="sets/b")
    for workers in (1, 3):
        report = ingest(tmp_path / "sets", tmp_path / f"store_{workers}", config(), workers=workers)
        assert {name: each.episodes for name, each in report.files.items()} == {"a": 2, "b": 3}
    alone, beside = (ReplayStore.open(tmp_path / f"store_{workers}") for workers in (1, 3))
    for i in range(5):
        for name, value in vars(alone.trajectory(i)).items():
            np.testing.assert_equal(getattr(beside.trajectory(i), name), value)
    (tmp_path / "sets" / "c.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(UserError, match=r"c\.h5 is no LeRobot set, so its streams need a mapping"):
        ingest(tmp_path / "sets", tmp_path / "store", config())


@pytest.mark.parametrize("version", VERSIONS)
def test_no_damage_is_a_traceback(tmp_path, log, version):
    """Every file of a set cut at some places, and with flipped bits: an episode is refused or whole, never an error."""
    path, draw = log(version), np.random.default_rng(0)
    expected = [(e.name, e.streams["action"].values.tobytes()) for e in open_log(path).episodes()]
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        for place in draw.integers(0, 8 * len(whole), 20):
            flipped[place // 8] ^= 1 << place % 8
        for damaged in [bytes(flipped), *(whole[: int(share * len(whole))] for share in (0, 0.1, 0.5, 0.9, 0.999))]:
            file.write_bytes(damaged)
            for item in episodes_of("lerobot", path):
                if isinstance(item, Refused):
                    assert "\n" not in item.reason
                elif "action" in item.streams and len(damaged) < len(whole):
                    assert (item.name, item.streams["action"].values.tobytes()) in expected
        file.write_bytes(whole)


@pytest.mark.skipif(not G1.exists(), reason="the Unitree G1 sample log is not on this machine")
def test_the_unitree_g1_sample(tmp_path):
    report = ingest(G1, tmp_path / "store", config(image_size=32))
    assert report.added == 3
    assert "episodes 0, 3-9, 11-99: 97 missing of 100 that meta names" in "\n".join(report.lines())
    store = ReplayStore.open(tmp_path / "store")
    assert store.spec.action_dim == store.spec.proprio_dim == 26
    assert store.spec.action_names[3] == "kLeftElbow"
    for index, number in enumerate((1, 2, 10)):
        table = pq.read_table(G1 / f"data/chunk-000/episode_{number:06d}.parquet")
        action, state = (np.array(table[key].to_pylist(), "f4") for key in ("action", "observation.state"))
        trajectory = store.trajectory(index)
        assert len(trajectory) == len(action) - 1
        assert trajectory.success is Success.UNKNOWN
        np.testing.assert_allclose(store.statistics.denormalise(trajectory.action), action[:-1], atol=1e-5)
        np.testing.assert_array_equal(trajectory.proprio, state)
        assert trajectory.instruction == "Pick up the yellow bottle on the table."
    video = G1 / "videos/chunk-000/observation.images.cam_high/episode_000001.mp4"
    with av.open(str(video)) as container:
        frames = [np.asarray(Image.fromarray(frame.to_ndarray(format="rgb24")).resize((32, 32), Image.BILINEAR))
                  for frame in container.decode(video=0)]
    np.testing.assert_array_equal(store.trajectory(0).frames["cam_high"], np.stack(frames))
