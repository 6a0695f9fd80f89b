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
from wm_rl import cli

G1 = Path(__file__).parents[3] / "shared/logs/lerobot_v21_g1_inspire"
SUCCESSES = (Success.YES, Success.NO, Success.UNKNOWN)


def config(**changes):
    return IngestConfig(**({"image_size": 16, "cameras": None, "embodiment": None, "action_range": "quantile",
                            "clip": False} | changes))


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
        np.testing.assert_allclose(read.action, trajectory.action, atol=1e-6)  # what the float32 of raw units leaves
    assert store.statistics.same_as(statistics)


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


def stop_at_the_second_episode(monkeypatch, path, store):
    """Ingest into ``store`` until Ctrl-C."""
    append, calls = ReplayStore.append, []

    def interrupted(self, trajectories):
        calls.append(trajectories)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return append(self, trajectories)

    monkeypatch.setattr(ReplayStore, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ingest(path, store, config())
    monkeypatch.undo()


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, log, monkeypatch):
    path = log()
    stop_at_the_second_episode(monkeypatch, path, tmp_path / "store")
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


def test_a_store_that_does_not_fit_is_refused_and_untouched(tmp_path, log, statistics, recorded):
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
        (log(name="wide", statistics=wide), config(), "actions do not fit: w .* 18 of its 18 values .* logs.clip=true"),
    ]
    for source, settings, message in cases:
        with pytest.raises(UserError, match=message) as error:
            ingest(source, tmp_path / "store", settings)
        assert "\n" not in str(error.value)
        assert contents(tmp_path / "store") == before
    report = ingest(tmp_path / "wide", tmp_path / "store", config(clip=True))
    raw = np.concatenate([wide.denormalise(t.action) for t in recorded])
    beyond = ((raw < statistics.action_low - 1e-3) | (raw > statistics.action_high + 1e-3)).sum(0)
    assert report.clipped == dict(zip("uvw", beyond.tolist(), strict=True))
    assert f"  w: {len(raw)} values clipped to [0.5, 0.7]" in report.lines()
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
    with pytest.raises(UserError, match=r"sets is no LeRobot set, or not all of it, so its streams need"):
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
    report = ingest(G1, tmp_path / "store", config(image_size=32, action_range="range"))
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
    assert report.clipped == {}


def strange(path):
    """The set as another program would have written it."""
    info = json.loads((path / "meta/info.json").read_text())
    del info["normalised_by"]
    (path / "meta/info.json").write_text(json.dumps(info))
    return path


def test_the_range_of_a_new_store_is_recomputed_and_what_is_clipped_is_counted(tmp_path, log, make_trajectory):
    """Against quantiles by hand; each of the runs after the first finds that its own logs fit."""
    recorded = [make_trajectory(i, 60, size=16) for i in range(4)]
    recorded[1].action[5, 0] = 40.0  # one faulty command
    for trajectory in recorded:
        trajectory.action[:, 2] = np.where(np.arange(60) == 30, 1, -1)  # a gripper that opens once
    path = strange(log(trajectories=recorded))
    report = ingest(path, tmp_path / "store", config())
    files = sorted(path.glob("data/**/*.parquet"))
    raw = np.concatenate([pq.read_table(file)["action"].to_pylist()[:-1] for file in files]).astype("f4")
    assert raw.shape == (240, 3)
    ordered, at = np.sort(raw.astype("f8"), 0), 239 * np.array([0.01, 0.99])
    below = np.floor(at).astype(int)
    expected = ordered[below] + (at - below)[:, None] * (ordered[below + 1] - ordered[below])
    store = ReplayStore.open(tmp_path / "store")
    low, high = store.statistics.action_low, store.statistics.action_high
    np.testing.assert_allclose([low[:2], high[:2]], expected[:, :2], rtol=1e-6)
    assert (low[2], high[2]) == (raw[:, 2].min(), raw[:, 2].max())  # quantiles would have cut the opening off
    assert "  w: the full range, since it has 2 different values" in report.lines()
    slack = 1e-4 * (expected[1] - expected[0])
    counted = ((raw < expected[0] - slack) | (raw > expected[1] + slack)).sum(0)
    assert report.clipped == {"u": counted[0], "v": counted[1]}
    assert 4 <= counted[0] <= 6
    read = np.concatenate([store.trajectory(i).action for i in range(4)])
    np.testing.assert_allclose(read, np.clip(store.statistics.normalise(raw), -1, 1), atol=1e-6)
    assert f"statistics {store.statistics.fingerprint}: 1% and 99% quantiles of the actions" in report.lines()[2]

    before = contents(tmp_path / "store")
    assert ingest(path, tmp_path / "store", config()).already == 4
    assert contents(tmp_path / "store") == before
    report = ingest(path, tmp_path / "again", config(action_range="range"))
    np.testing.assert_array_equal(ReplayStore.open(tmp_path / "again").statistics.action_high, raw.max(0))
    assert report.clipped == {}


def test_a_run_that_was_cut_is_not_refused_by_the_range_that_it_made(tmp_path, log, make_trajectory, monkeypatch):
    recorded = [make_trajectory(i, 30, size=16) for i in range(4)]
    recorded[3].action[:, 0] *= 30  # all of what is beyond the quantiles is in the last
    path = strange(log(trajectories=recorded))
    stop_at_the_second_episode(monkeypatch, path, tmp_path / "store")
    report = ingest(path, tmp_path / "store", config())
    assert (report.already, report.added) == (1, 3)
    with pytest.raises(UserError, match=r"actions do not fit: u .* lie outside the range of the store"):
        ingest(strange(log(name="last", trajectories=recorded[3:])), tmp_path / "store", config())
    with pytest.raises(UserError, match=r"expected quantile or range, got 'quantiles'"):
        config(action_range="quantiles")


def test_statistics_of_an_export_that_were_changed_or_do_not_fit_are_not_used(tmp_path, log, statistics):
    path = log()
    file = path / "meta/info.json"
    info = json.loads(file.read_text())
    assert info["normalised_by"]["fingerprint"] == statistics.fingerprint
    info["normalised_by"]["action_high"][1] = 7.0
    file.write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"have changed since they were written"):
        ingest(path, tmp_path / "store", config())
    narrow = dataclasses.replace(statistics, action_high=statistics.action_high - 0.1)
    file.write_text(json.dumps(info | {"normalised_by": narrow.to_dict()}))
    report = ingest(path, tmp_path / "store", config())
    assert report.fitted.origin == "1% and 99% quantiles of the actions"


def test_the_command_writes_a_report_and_says_by_its_exit_code_whether_something_was_usable(
    tmp_path, log, monkeypatch, capsys
):
    path = log()
    (path / "data/chunk-000/episode_000001.parquet").write_bytes(b"PAR1")

    def run(*words):
        argv = ["main.py", "ingest", f"source={path}", "store=s", "workers=1", "hydra.run.dir=run",
                "logs.image_size=16", *words]
        monkeypatch.setattr("sys.argv", argv)
        code = cli.run(argv)
        return code, json.loads((tmp_path / "run/report.json").read_text()), capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, report, _ = run("dry_run=true")
    assert (code, report["totals"]["episodes"], (tmp_path / "s").exists()) == (0, 2, False)
    code, report, said = run()
    assert code == 0
    assert report["totals"] == {"files": 1, "episodes": 2, "steps": 12, "idle": 0, "already": 0, "masked_rows": 0,
                                "refused": 1, "success": {"yes": 1, "unknown": 1}}
    assert report["files"]["log"]["refused"].keys() == {"episode 1"}
    assert report["statistics"]["fingerprint"] == ReplayStore.open(tmp_path / "s").statistics.fingerprint
    assert "read" in said.out
    assert "decode" in said.out
    assert run()[1]["totals"]["already"] == 2
    for file in path.glob("data/**/*.parquet"):
        file.write_bytes(b"PAR1")
    for words in ((), ("dry_run=true",)):
        code, report, said = run(*words)
        assert (code, report["totals"]["episodes"], report["totals"]["refused"]) == (2, 0, 3)
        assert len(said.err.strip().splitlines()) == 1
        assert "nothing usable was found" in said.err
