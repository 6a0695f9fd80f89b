"""Isaac Lab, the real one, through its worker process: Newton's physics on a CPU."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.rollout import rollout
from data.types import Success, UserError
from sim.expert import ExpertConfig, ScriptedExpert
from sim.isaac.config import IsaacConfig
from sim.isaac.env import IsaacEnv
from sim.remote.client import RemoteEnv
from sim.remote.environments import find_python
from tests.contract import check_env
from tests.sim.fake_isaac import SIZE, FakeIsaac
from tests.sim.isaac_probe import STEPS, probe

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((Path(__file__).parent / "isaac_golden.json").read_text())
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


def fake(num_envs=3, workers=1, **changes):
    """The adapter in a worker process, with the FAKE behind it."""
    settings = {"task": "Fake-Cartpole", "instructions": ["go right", "to the right"], "cameras": ["camera"],
                "image_size": SIZE, "success": "tests.sim.fake_isaac:to_the_right",
                "expert": "tests.sim.fake_isaac:push_right", **changes}
    return RemoteEnv(name="isaac", python=Path(sys.executable), factory="tests.sim.fake_isaac:make",
                     configs=[{**settings, "num_envs": num_envs}] * workers)


def test_the_fake_does_what_the_real_one_was_recorded_to_do():
    assert probe(FakeIsaac(2, STEPS)) == GOLDEN


@pytest.mark.isaac
@pytest.mark.skipif(bool(_missing()), reason=_missing())
def test_the_real_one_still_does_what_was_recorded(tmp_path):
    record = tmp_path / "record.json"
    subprocess.run([find_python("isaac", "ISAACLAB_PYTHON"), "-m", "tests.sim.isaac_probe", record], cwd=ROOT, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, capture_output=True)
    assert json.loads(record.read_text()) == GOLDEN


@pytest.mark.parametrize("changes", [{}, {"reward": "task", "success": None}, {"workers": 2, "num_envs": 2}])
def test_the_fake_keeps_the_contract(changes):
    check_env(lambda: fake(**changes))
