"""One contract, every environment: simulators in this process and in others, the robot stand-in and imagination.

A simulator is one more line of ``TARGETS``: how to build an environment of 2 to 8 rows of one short task; its marks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest

from data.store import ReplayStore
from data.types import Env, Source
from sim.isaac.env import IsaacEnv
from sim.libero.env import LiberoConfig, LiberoEnv
from sim.metaworld import MetaWorldConfig
from sim.perturbation import RANGES
from sim.pusht import PushTConfig
from sim.stand_in import stand_in_config
from sim.vector import VectorEnv
from tests.contract import check_env
from tests.sim import isaac, test_libero
from tests.world_model.conftest import SPEC, STATISTICS, episode
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.learner import WorldModelLearner

SHORT = MetaWorldConfig(max_episode_steps=8)
metaworld = partial(VectorEnv, tasks=["drawer-close-v3"], num_envs=2)
pusht = partial(VectorEnv, tasks=["pusht"], num_envs=2, config=PushTConfig(max_episode_steps=8))


def imagination(tmp_path_factory) -> Callable[[], Env]:
    """A world model of the toy world, fitted for seconds."""
    store = ReplayStore.create(tmp_path_factory.mktemp("toy") / "store", spec=SPEC, statistics=STATISTICS,
                               embodiment="square")
    store.append([episode(seed) for seed in range(40)])
    store.append([episode(seed, Source.REAL) for seed in range(40, 60)])
    config = WorldModelConfig(widths=(16, 24), batch=8, success_batch=8, learning_rate=4e-3, warmup=5, ema=0.8)
    learner = WorldModelLearner(config, spec=SPEC, statistics=STATISTICS, seed=0)
    learner.fit(store, 40)
    return lambda: learner.imagination(store, ImaginationConfig(), num_envs=4)


def ready(make: Callable[[], Env]) -> Callable[..., Callable[[], Env]]:
    """A target that needs no preparation."""
    return lambda tmp_path_factory: make


sim = pytest.mark.sim
needs_pusht = pytest.mark.skipif(importlib.util.find_spec("gym_pusht") is None,
                                 reason="gym-pusht is not installed; type: pip install 'wm-rl[pusht]'")
TARGETS = [
    pytest.param(ready(partial(metaworld, config=SHORT, workers=2)), id="metaworld", marks=sim),
    pytest.param(ready(partial(metaworld, workers=0, config=MetaWorldConfig(
        max_episode_steps=8, observation="state", reward="dense"))), id="metaworld-state", marks=sim),
    pytest.param(ready(partial(metaworld, workers=0, config=MetaWorldConfig(
        max_episode_steps=8, randomise="mild"))), id="metaworld-randomised", marks=sim),
    pytest.param(ready(partial(metaworld, workers=0, config=stand_in_config(SHORT), source="real")),
                 id="robot-stand-in", marks=sim),
    pytest.param(ready(partial(pusht, workers=0)), id="pusht", marks=needs_pusht),
    pytest.param(ready(partial(pusht, workers=2)), id="pusht-in-processes", marks=needs_pusht),
    pytest.param(ready(partial(LiberoEnv, suite="libero_object", tasks=[0], workers=1, config=LiberoConfig(
        image_size=32, max_episode_steps=6))), id="libero", marks=test_libero.real),
    pytest.param(ready(partial(LiberoEnv, suite="libero_goal", tasks=[6], workers=2, config=LiberoConfig(
        image_size=32, max_episode_steps=6, randomise={**RANGES["mild"], "latency": [0, 2], "gain": [0.7, 1.3]}))),
        id="libero-randomised", marks=test_libero.real),
    pytest.param(imagination, id="imagination"),
    *(pytest.param(ready(partial(isaac.fake, **changes)), id=f"isaac-fake{name}") for name, changes in {
        "": {}, "-task-reward": {"reward": "task", "success": None}, "-in-processes": {"workers": 2, "num_envs": 2},
        "-randomised": {"randomise": {"latency": [0, 2], "gain": [0.5, 1.5], "light": [0.5, 1.0],
                                      "object_shift": [-0.3, 0.3], "camera_shift": [-0.5, 0.5]}},
    }.items()),
    *(pytest.param(ready(partial(IsaacEnv, config=config, num_envs=2)), id=f"isaac-{name}", marks=isaac.real)
      for name, config in {
        "cartpole": isaac.CARTPOLE, "cartpole-camera": isaac.CAMERA, "reach": isaac.REACH,
        "push": isaac.push(max_episode_steps=8, steps_after_success=0),
        "push-randomised": isaac.push(max_episode_steps=8, steps_after_success=0, randomise="mild"),
    }.items()),
]


@pytest.mark.parametrize("target", TARGETS)
def test_every_environment_keeps_the_contract(target, tmp_path_factory):
    check_env(target(tmp_path_factory))
