"""The world model's two benchmarks on real Meta-World, small, one after the other as a user would run them."""

import json
from contextlib import closing
from functools import partial

import pytest

from data.budget import StoreConfig
from data.sampler import DecisionSampler, ReplayConfig
from data.store import ReplayStore
from data.types import Behaviour, UserError
from sim.expert import ExpertConfig
from sim.metaworld import MetaWorldConfig
from sim.vector import VectorEnv
from tests.examples import LEARNER
from wm_rl import data_efficiency
from wm_rl.cloning import CloningConfig
from wm_rl.commands.benchmark_imagination import _row, _summary, benchmark_imagination
from wm_rl.commands.benchmark_world_model import Recording, benchmark_world_model
from wm_rl.data_efficiency import Arm, Experiment, steps_to
from wm_rl.objectives import Gipo
from wm_rl.policy import TinyVLAConfig
from wm_rl.ranking import rank_correlation
from wm_rl.trust import Trust
from world_model.config import ImaginationConfig, WorldModelConfig

TINY = WorldModelConfig(widths=(16, 24), batch=4, success_batch=8, warmup=2, steps=3, success_windows=4,
                        sources={"sim": 1.0})
ENV = partial(VectorEnv, tasks=["drawer-close-v3"], num_envs=2, workers=0, source="sim",
              config=MetaWorldConfig(camera="workspace", image_size=32, action_repeat=3, max_episode_steps=12))
POLICY = TinyVLAConfig(chunk=2, bins=5, width=32, layers=1, channels=(8, 16, 16), vocabulary=256, words=24)
REPLAY = {"windows": 4, "decisions": 4, "discount": 0.97, "capacity": {"sim": None, "real": None, "imagined": None}}


def world_models(folder, **changes):
    def recording(store, seed, unseen=False):
        return Recording(store=store, episodes=4, seed=seed, unseen=unseen, expert=ExpertConfig())

    played = Recording(store="recorded", episodes=2, seed=3, policy=4)
    given = {
        "folder": str(folder), "seeds": [0, 1], "env": ENV, "unseen_env": partial(ENV, tasks=["reach-v3"]),
        "recordings": [played, recording("recorded", 0), recording("held_out", 1), recording("unseen", 2, unseen=True)],
        "storage": StoreConfig(), "variants": {"ours": TINY, "rival": TINY}, "policy": POLICY,
        "cloning": CloningConfig(steps=4, batch=8, learning_rate=1e-3, sources={"sim": 1.0, "real": 0.0}),
        "policies": [2, 4], "trials_per_task": 2, "first_seed": 100, "starts": 4,
        "imagination": ImaginationConfig(), "compiled": False, "jobs": 2}
    return benchmark_world_model(**{**given, **changes})


def experiment(level):
    return Experiment(
        updates_per_iteration=1, evaluate_every=1, trials=2, first_seed=200, level=level, learner=LEARNER,
        objective=Gipo(beta=0.5), trust=Trust(), refit={"steps": 0},
        imagination=ImaginationConfig(horizon=3, micro_batch=2, sources=("sim",)))


def imagination(folder, made, *, level, **changes):
    given = {
        "folder": str(folder), "world_models": str(made), "model": "ours", "warm_start": 4,
        "tasks": ["drawer-close-v3"], "seeds": [0], "env": ENV, "jobs": 2,
        "experiment": experiment(level),
        "arms": {
            "with": Arm(iterations=2, simulate_every=2, episodes=2, branches=3, refit_steps=2, recordings=3,
                        replay=ReplayConfig(**REPLAY, mix={"sim": 0.5, "real": 0.0, "imagined": 0.5})),
            "without": Arm(iterations=2, simulate_every=1, episodes=2, branches=0, refit_steps=0, recordings=0,
                           replay=ReplayConfig(**REPLAY, mix={"sim": 1.0, "real": 0.0, "imagined": 0.0}))}}
    return benchmark_imagination(**{**given, **changes})


@pytest.mark.sim
@pytest.mark.slow
def test_models_are_made_measured_and_used(tmp_path, capsys, monkeypatch):
    made, used = tmp_path / "made", tmp_path / "used"
    made.mkdir()
    assert world_models(made) == 0
    assert "- / -" not in capsys.readouterr().out  # every row of the tables was measured
    quality = json.loads((made / "quality.json").read_text())
    assert [len(quality[name]) for name in ("model", "ours", "rival") if name in quality] == [2, 2]
    first = quality["model"][0]
    assert set(quality["simulated"]) == {str(made / "policies" / "2"), str(made / "policies" / "4")}
    assert all(0 <= value <= 1 for row in quality["imagined"] for value in row.values())
    assert first["denoising_share"] > 0
    assert 0 <= first["claims_agree"] <= 1
    assert first["imagined_fps"] > 0
    assert first["simulated_fps"] > 0
    assert (made / "ranking.png").is_file()
    with closing(ReplayStore.open(made / "recorded.zarr")) as recorded:  # the policy was cloned before it recorded
        assert list(recorded.episodes.behaviour) == [Behaviour.UNKNOWN] * 4 + [Behaviour.LOGGED] * 2
    stamps = {path: path.stat().st_mtime_ns for path in made.glob("models/*/fit.json")}
    assert len(stamps) == 4
    assert world_models(made) == 0  # goes on: nothing is fitted again, and the measures are the same
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    again = json.loads((made / "quality.json").read_text())["model"][0]
    assert all(again[key] == value for key, value in first.items() if key.startswith(("psnr", "ssim", "success")))

    used.mkdir()
    assert imagination(used, made, level=1.5) == 0  # never reached
    rows = json.loads((used / "results.json").read_text())["rows"]
    assert [(row["arm"], row["reached"]) for row in rows] == [("with", False), ("without", False)]
    cells = {path.name: json.loads(path.read_text())["curve"] for path in (used / "cells").iterdir()}
    with_, without = cells["with-drawer-close-v3-0.json"], cells["without-drawer-close-v3-0.json"]
    assert with_[0]["success"] == without[0]["success"]  # the same warm start on the same trials
    assert [point["imagined"] > 0 for point in with_] == [False, True, True]
    assert with_[1]["simulated"] == with_[2]["simulated"] > 0  # simulated once in two iterations
    assert 0 == without[0]["simulated"] < without[1]["simulated"] < without[2]["simulated"]
    assert without[2]["imagined"] == without[2]["claimed"] == without[2]["dreamt"] == 0
    assert all(0 <= point[name] <= 2 for point in with_ for name in ("claimed", "true"))  # of two audited episodes
    assert (rows[0]["claimed"], rows[0]["true"]) == (with_[2]["claimed"], with_[2]["true"])
    assert (used / "curves.png").stat().st_size > 5000
    with pytest.raises(UserError, match=r"run python main\.py benchmark suite=world_model"):
        imagination(used, made, level=1.5, warm_start=3)
    easy = tmp_path / "easy"
    easy.mkdir()
    assert imagination(easy, made, level=0.0) == 0
    assert all(row["reached"] for row in json.loads((easy / "results.json").read_text())["rows"])
    curves = [json.loads(path.read_text())["curve"] for path in (easy / "cells").iterdir()]
    assert [len(curve) for curve in curves] == [2, 2]  # then it stops

    sizes = []

    class Watched(DecisionSampler):
        def sample(self, *args, **kwargs):
            sizes.append(len(self.store))
            return super().sample(*args, **kwargs)

    monkeypatch.setattr(data_efficiency, "DecisionSampler", Watched)
    for recordings in (0, 3):  # also without a model an arm begins with them
        arm = Arm(iterations=1, simulate_every=1, episodes=2, branches=0, refit_steps=0, recordings=recordings,
                  replay=ReplayConfig(**REPLAY, mix={"sim": 1.0, "real": 0.0, "imagined": 0.0}))
        data_efficiency.learn(
            experiment(1.5), arm, make_env=ENV, task="drawer-close-v3", seed=0, warm_start=made / "policies" / "4",
            world_model=made / "none", recorded=made / "recorded.zarr", scratch=tmp_path)
    assert sizes == [2, 5]


@pytest.mark.parametrize(("who", "message"), [
    ({}, "either an expert's or a policy's, got expert=None and policy=None"),
    ({"expert": ExpertConfig(), "policy": 4}, "either an expert's or a policy's"),
])
def test_a_recording_has_one_actor(who, message):
    with pytest.raises(UserError, match=message):
        Recording(store="recorded", episodes=1, seed=0, **who)


def test_a_recording_needs_a_policy_that_is_kept(tmp_path):
    with pytest.raises(UserError, match=r"one of \[2, 4\] \(policies\), got 3"):
        world_models(tmp_path, recordings=[Recording(store="recorded", episodes=1, seed=0, policy=3)])
    assert not list(tmp_path.iterdir())


def test_steps_to_a_level_are_those_of_two_evaluations():
    curve = [{"success": value, "simulated": 100 * i} for i, value in enumerate([0.2, 0.9, 0.6, 0.8, 0.8, 0.9])]
    assert steps_to(0.8, curve)["simulated"] == 400
    assert steps_to(0.75, curve)["simulated"] == 200
    assert steps_to(0.95, curve) is None


def test_ratios_and_equal_steps_by_hand():
    curves = {
        ("with", "a", 0): [(0, 0.2), (100, 0.8), (100, 0.8)],   # reached after 100 steps
        ("plain", "a", 0): [(0, 0.2), (100, 0.4), (2000, 0.4)],  # never: a ratio of at least 20
        ("with", "b", 0): [(0, 0.2), (300, 0.4), (300, 0.6)],   # never
        ("plain", "b", 0): [(0, 0.2), (200, 0.6), (400, 0.9), (600, 0.9)]}
    whole = {cell: [{"simulated": steps, "imagined": 0, "success": success, "cpu_seconds": 1.0, "claimed": 0, "true": 0,
                     "dreamt": 0.0} for steps, success in curve] for cell, curve in curves.items()}
    rows = [_row(cell, curve, 0.8, 100) for cell, curve in whole.items()]
    lines = _summary(rows, whole, ["with", "plain"], 0.8)
    assert lines[0] == "with: 1 of 2 reached 80%; success 0.20 → 0.70"
    assert lines[2] == ("against plain: with reached it in 1 of 2 pairs, plain never in 1 of these (their ratios are "
                        "lower bounds); plain reached it in 1 of the others")
    assert lines[3].endswith("simulator steps: geometric mean 20.00 [20.00, 20.00]")
    assert lines[4].endswith("geometric mean 10.00 [10.00, 10.00]")  # 100 recorded steps for the model
    # Pair a: (.8 + .8) / 2 against (.2 + .4) / 2; pair b: (.4 + .6) / 2 against (.2 + .6) / 2.
    assert lines[-1].endswith("0.65 against 0.35, higher in 2 of 2 pairs")


def test_rank_correlation_by_hand():
    simulated = {"a": 0.1, "b": 0.5, "c": 0.9}
    assert rank_correlation(simulated, {"c": 0.3, "a": 0.0, "b": 0.2}) == 1
    assert rank_correlation(simulated, {"a": 0.2, "b": 0.1, "c": 0.3}) == pytest.approx(0.5)  # 1 - 6 * 2 / 24
    assert rank_correlation(simulated, {"a": 0.2, "b": 0.2, "c": 0.2}) == 0
