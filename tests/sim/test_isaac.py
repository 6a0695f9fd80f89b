"""Isaac Lab, the real one, through its worker process: Newton's physics on a CPU."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.rollout import rollout
from data.types import Success, UserError
from sim.expert import ExpertConfig, ScriptedExpert
from sim.isaac.config import IsaacConfig
from sim.isaac.env import IsaacEnv
from sim.remote.environments import find_python
from tests.contract import check_env

ROOT = Path(__file__).parents[2]
NEWTON = ["physics=newton_mjwarp"]
CARTPOLE = IsaacConfig(task="Isaac-Cartpole-Direct", instructions=["balance the pole"], overrides=NEWTON,
                       max_episode_steps=12, reward="task")
REACH = IsaacConfig(task="Isaac-Reach-Franka", instructions=["reach the pose"], success="term:success",
                    overrides=[*NEWTON, "env.observations.policy.enable_corruption=false"], max_episode_steps=8)


def push(**changes):
    settings = yaml.safe_load((ROOT / "configs/env/isaac.yaml").read_text())["config"]
    return IsaacConfig(**{key: value for key, value in {**settings, **changes}.items() if key != "_target_"})


def _missing():
    try:
        find_python("isaac", "ISAACLAB_PYTHON")
    except UserError as error:
        return str(error)
    return ""


real = [pytest.mark.isaac, pytest.mark.slow, pytest.mark.xdist_group("isaac"),
        pytest.mark.skipif(bool(_missing()), reason=_missing())]


@pytest.mark.parametrize(("config", "atol"), [
    pytest.param(CARTPOLE, 0.0, id="cartpole", marks=real),
    pytest.param(REACH, 1e-4, id="reach", marks=real),  # rows stand apart: their positions round differently
    pytest.param(push(max_episode_steps=8, steps_after_success=0), 0.0, id="push", marks=real)])
def test_real_isaac_keeps_the_contract(config, atol):
    check_env(lambda: IsaacEnv(config=config, num_envs=2), atol=atol)
