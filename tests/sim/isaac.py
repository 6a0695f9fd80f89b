"""What the tests of Isaac Lab share: tasks of the real one, and the adapter with the FAKE behind it."""

import sys
from pathlib import Path

import pytest
import yaml

from data.types import UserError
from sim.isaac.config import IsaacConfig
from sim.remote.client import RemoteEnv
from sim.remote.environments import find_python
from tests.sim.fake_isaac import SIZE

ROOT = Path(__file__).parents[2]
NEWTON = "physics=newton_mjwarp"
CARTPOLE = IsaacConfig(task="Isaac-Cartpole-Direct", instructions=["balance the pole"], overrides=[NEWTON],
                       max_episode_steps=12, reward="task")
CAMERA = IsaacConfig(
    task="Isaac-Cartpole-Camera-Direct", instructions=["balance the pole"], cameras=["tiled_camera"], image_size=48,
    proprio=["critic"], max_episode_steps=12, reward="task", overrides=[NEWTON, "env.scene.env_spacing=0.0"])
REACH = IsaacConfig(
    task="Isaac-Reach-Franka", instructions=["reach the pose"], success="term:success", max_episode_steps=8,
    overrides=[NEWTON, "env.observations.policy.enable_corruption=false",
               "env.scene.env_spacing=0.0"])
"""Its rows stand in one place, as those of ``CAMERA``: beside each other they round differently."""
FAKE = {"task": "Fake-Cartpole", "instructions": ["go right", "to the right"], "cameras": ["camera"],
        "image_size": SIZE, "success": "tests.sim.fake_isaac:to_the_right", "expert": "tests.sim.fake_isaac:push_right",
        "hold_still": [0.0], "held_out_instructions": ["off to where the sun sets on a map turned round"],
        "object_shift": "tests.sim.fake_isaac:shift_cart", "still_camera": "camera"}


def push(**changes):
    """Our task, as ``env=isaac`` has it."""
    settings = yaml.safe_load((ROOT / "configs/env/isaac.yaml").read_text())["config"]
    return IsaacConfig(**{key: value for key, value in {**settings, **changes}.items() if key != "_target_"})


def fake(num_envs=3, workers=1, randomise=None, **changes):
    """The adapter in a worker process, with the FAKE behind it."""
    return RemoteEnv(name="isaac", python=Path(sys.executable), factory="tests.sim.fake_isaac:make",
                     configs=[{**FAKE, **changes, "num_envs": num_envs}] * workers, randomise=randomise)


def _missing():
    try:
        find_python("isaac", "ISAACLAB_PYTHON")
    except UserError as error:
        return str(error)
    return ""


real = [pytest.mark.isaac, pytest.mark.slow, pytest.mark.xdist_group("isaac"),
        pytest.mark.skipif(bool(_missing()), reason=_missing())]
"""Marks of what runs in Isaac Lab's own environment."""
