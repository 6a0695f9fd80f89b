import json
from functools import partial

import pytest

from data.types import UserError
from sim.metaworld import MetaWorldConfig
from sim.vector import VectorEnv
from wm_rl.commands.benchmark_experts import benchmark_experts

SETTINGS = {"trials_per_task": 3, "first_seed": 4_000_000}


@pytest.mark.sim
def test_experts_are_counted_in_the_whole_episode_and_in_its_beginning(tmp_path):
    env = partial(VectorEnv, tasks=["coffee-button-v3", "drawer-open-v3"], num_envs=2, workers=0,
                  config=MetaWorldConfig(observation="state", max_episode_steps=60))
    assert benchmark_experts(folder=str(tmp_path), env=env, within=20, **SETTINGS) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    button, drawer = results["coffee-button-v3"], results["drawer-open-v3"]
    assert (button["trials"], button["solved"], button["solved_within"]) == (3, 3, 3)
    assert (drawer["trials"], drawer["solved"], drawer["solved_within"]) == (3, 3, 0)
    assert button["median_steps"] < 20 < drawer["median_steps"] <= drawer["longest"]
    assert drawer["said"].startswith("1.00 [0.4")


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="within must be at least 1"):
        benchmark_experts(folder=str(tmp_path), env=None, within=0, **SETTINGS)
