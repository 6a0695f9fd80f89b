"""What robot logs are worth, small, on real Meta-World; and how the arms are compared."""

import json
from functools import partial

import pytest

from data.budget import StoreConfig
from data.sampler import ReplayConfig
from data.types import UserError
from sim.expert import ExpertConfig
from sim.metaworld import MetaWorldConfig
from sim.stand_in import stand_in_config
from sim.vector import VectorEnv
from tests.examples import LEARNER
from wm_rl.cloning import CloningConfig
from wm_rl.commands.benchmark_logs import WARM_START, _results, benchmark_logs
from wm_rl.log_learning import LogArm, LogExperiment
from wm_rl.objectives import Gipo
from wm_rl.policy import TinyVLAConfig
from wm_rl.trust import Trust

CONFIG = MetaWorldConfig(camera="workspace", image_size=32, action_repeat=4, max_episode_steps=40)
ENV = partial(VectorEnv, tasks=["drawer-close-v3"], num_envs=2, workers=0)
MAPPING = {"proprio": [{"stream": "/joint_states.position"}], "action": [{"stream": "/command.position"}],
           "cameras": {"workspace": {"stream": "/workspace/compressed"}}, "clock": "header", "rate": 20.0,
           "success": "/success.position", "embodiment": "metaworld-sawyer"}


def run(folder, **changes):
    def arm(warm_start, real):
        return LogArm(warm_start=warm_start, replay=ReplayConfig(
            windows=4, decisions=4, discount=0.97, mix={"sim": 1 - real, "real": real, "imagined": 0.0},
            capacity={"sim": None, "real": None, "imagined": None}))

    given = {
        "folder": str(folder), "seeds": [0], "log_episodes": 4, "env": partial(ENV, config=CONFIG),
        "stand_in": partial(ENV, config=stand_in_config(CONFIG), source="real"),
        "expert": ExpertConfig(burst_probability=0.0), "mapping": MAPPING, "storage": StoreConfig(),
        "policy": TinyVLAConfig(chunk=2, bins=5, width=32, layers=1, channels=(8, 16), vocabulary=256, words=24),
        "cloning": CloningConfig(steps=3, batch=8, learning_rate=1e-3, sources={"real": 1.0}, held_out=0.25),
        "experiment": LogExperiment(iterations=2, episodes=2, updates=2, trials_per_task=2, first_seed=100,
                                    learner=LEARNER, objective=Gipo(beta=0.5), trust=Trust()),
        "arms": {"with": arm(True, 0.5), "without": arm(False, 0.0)}, "jobs": 1}
    return benchmark_logs(**{**given, **changes})


@pytest.mark.sim
@pytest.mark.slow
def test_arms_differ_in_the_logs_alone(tmp_path, capsys):
    assert run(tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["behaviour"]["0"]["labelled"] == 4
    assert results["behaviour"]["0"]["calibration"]["episodes"] == 1
    assert results["logs"]["0"]["unknown"] == 0
    assert results["logs"]["0"]["yes"] >= 3  # the expert seldom fails here, and no success is lost on the way
    cells = {name: json.loads((tmp_path / "cells" / f"{name}-0.json").read_text()) for name in ("with", "without")}
    assert [cells[name]["updates"] for name in cells] == [7, 7]  # 3 + 2 * 2, and as many without a warm start
    shares = {name: [point["gradient_share_real"] for point in cells[name]["curve"]] for name in cells}
    assert all(0 < share < 1 for share in shares["with"])
    assert shares["without"] == [0, 0]
    trials = [[(t["task"], t["seed"]) for t in cells[name]["trials"]] for name in cells]
    assert trials[0] == trials[1] == [("drawer-close-v3", 100), ("drawer-close-v3", 101)]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert run(tmp_path) == 0  # goes on: nothing is done again
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    with pytest.raises(UserError, match="two arms"):
        run(tmp_path, arms={})


def test_differences_are_paired_by_task_and_seed():
    def cell(*successes):
        return {"trials": [{"task": task, "seed": seed, "success": success} for (task, seed), success in
                           zip((("b", 1), ("a", 1), ("a", 2), ("b", 2)), successes, strict=True)],
                "updates": 1, "behaviour": {}, "logs": {}}

    found = {("with", 0): cell(True, True, True, False), ("without", 0): cell(False, True, False, False),
             ("with", 1): cell(True, False, True, True), ("without", 1): cell(True, True, False, False),
             (WARM_START, 0): cell(False, False, False, False), (WARM_START, 1): cell(True, True, True, True)}
    found["without", 0]["trials"].reverse()  # whatever order they came in
    arms = _results(found, ["with", "without", WARM_START], [0, 1])["arms"]
    assert arms["with"]["success"]["estimate"] == 6 / 8
    assert arms["with"]["first_minus_this"] is None
    assert arms["without"]["first_minus_this"]["estimate"] == pytest.approx(3 / 8)  # four gained, one lost
    assert arms["without"]["by_seed"][0]["first_minus_this"]["estimate"] == pytest.approx(2 / 4)
    assert arms["without"]["by_seed"][1]["first_minus_this"]["estimate"] == pytest.approx(1 / 4)
