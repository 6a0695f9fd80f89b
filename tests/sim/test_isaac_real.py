"""Isaac Lab, the real one, through its worker process: Newton on a CPU. Its contract is in ``test_env_contract``."""

import dataclasses
import json
import os
import signal
import subprocess

import numpy as np
import pytest

from data.rollout import rollout
from data.types import Success, UserError
from sim.expert import ExpertConfig, ScriptedExpert
from sim.isaac.config import IsaacConfig
from sim.isaac.env import IsaacEnv
from sim.perturbation import Perturbation
from sim.remote.environments import find_python
from tests.sim.isaac import REACH, ROOT, push, real
from tests.sim.test_isaac import GOLDEN

pytestmark = real


def test_the_real_one_still_does_what_was_recorded(tmp_path):
    assert _in_isaac("tests.sim.isaac_probe", tmp_path) == GOLDEN


def test_the_stand_in_gripper_opens_and_closes(tmp_path):
    fingers = _in_isaac("tests.sim.isaac_gripper", tmp_path)  # only the first is driven, the second follows it
    np.testing.assert_allclose(fingers["open"], 0.04, atol=0.002)
    np.testing.assert_allclose(fingers["closed"], 0.0, atol=0.002)


def _in_isaac(module, folder):
    """What a module writes that runs in Isaac Lab's Python."""
    subprocess.run([find_python("isaac", "ISAACLAB_PYTHON"), "-m", module, folder / "told.json"], cwd=ROOT, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, capture_output=True)
    return json.loads((folder / "told.json").read_text())


def test_the_stand_in_cube_lies_on_the_stand_in_table():
    env = IsaacEnv(num_envs=2, config=IsaacConfig(
        task="Test-Lift-Cube", modules=["tests.sim.isaac_lift"], instructions=["lift the cube"],
        proprio=["policy.object_position", "policy.joint_pos"]))
    env.reset(seed=[1, 2], options={"reset_mask": np.ones(2, bool)})
    for _ in range(25):
        observation, *_ = env.step(np.zeros((2, env.spec.action_dim), np.float32))
    env.close()
    assert env.spec.proprio_names[:4] == ("object_position_0", "object_position_1", "object_position_2", "joint_pos_0")
    np.testing.assert_allclose(observation["proprio"][:, 2], 0.8 * 0.06 / 2, atol=0.003)


def test_training_goes_on_when_a_real_process_is_killed(pushing):
    observation, _ = pushing.reset(seed=range(8), options={"reset_mask": np.ones(8, bool)})
    os.kill(pushing._parts[0].process._child.pid, signal.SIGKILL)
    after, _, terminated, truncated, _ = pushing.step(np.zeros((8, 2), np.float32))
    assert truncated.all()
    assert not terminated.any()
    np.testing.assert_array_equal(after["frames"]["camera"], observation["frames"]["camera"])
    again, _ = pushing.reset(seed=range(8), options={"reset_mask": np.ones(8, bool)})
    np.testing.assert_array_equal(again["frames"]["camera"], observation["frames"]["camera"])


@pytest.fixture(scope="module")
def pushing():
    env = IsaacEnv(config=push(), num_envs=8)
    yield env
    env.close()


def test_the_stand_in_arm_has_the_pandas_kinematics(pushing):
    """The hand is where the modified Denavit-Hartenberg parameters that Franka Emika publishes put it."""
    angles = [0.0, 0.2185, 0.0, -2.8958, 0.0, 3.1143, 0.7855]
    parameters = [(0, 0.333, 0), (0, 0, -1), (0, 0.316, 1), (0.0825, 0, 1), (-0.0825, 0.384, -1), (0, 0, 1),
                  (0.088, 0, 1)]  # a, d, and alpha in quarter turns
    frame = np.eye(4)
    for (a, d, quarter), theta in zip(parameters, angles, strict=True):
        s, c, sa, ca = np.sin(theta), np.cos(theta), float(quarter), float(not quarter)
        frame = frame @ [[c, -s, 0, a], [s * ca, c * ca, -sa, -sa * d], [s * sa, c * sa, ca, ca * d], [0, 0, 0, 1]]
    hand = (frame @ [0, 0, 0.107, 1])[:3]
    observation, _ = pushing.reset(seed=range(8), options={"reset_mask": np.ones(8, bool)})
    np.testing.assert_allclose(observation["proprio"], np.tile(hand, (8, 1)), atol=1e-4)


def test_the_expert_pushes_the_cube_onto_the_strip(pushing):
    shown = list(rollout(pushing, ScriptedExpert(pushing, ExpertConfig(burst_probability=0)),
                         [[seed] for seed in range(8)], sample=False))
    assert [episode.success for episode in shown] == [Success.YES] * 8
    for episode in shown:
        assert np.flatnonzero(episode.terminated).tolist() == [len(episode) - 4]  # three more steps show the success
        assert np.flatnonzero(episode.reward)[0] == len(episode) - 4
        assert episode.provenance["assets"] == "stand_in"
        assert episode.embodiment == "isaac-panda-stand-in"
        first, last = (episode.frames["camera"][at].astype(int) for at in (0, -1))
        red, green = ((picture[..., channel] > picture[..., 1 - channel] + 60).sum()
                      for picture, channel in ((first, 0), (first, 1)))
        assert red > 20
        assert (last[..., 1] > last[..., 0] + 60).sum() < green  # the cube hides part of the strip
    assert len({episode.frames["camera"][0].tobytes() for episode in shown}) == 8
    assert len({episode.instruction for episode in shown}) > 1


@pytest.mark.parametrize("factors", [
    {"light": (0.5, 0.5, 0.5)}, {"camera_shift": (0.0, 0.05, 0.0)}, {"camera_turn": (2.0, 0.0, 5.0)},
    {"object_shift": (0.04, 0.03)}, {"latency": 1}, {"gain": 0.5}], ids=lambda factors: next(iter(factors)))
def test_each_factor_changes_what_it_should_and_nominal_comes_back(pushing, factors):
    def played():
        start, _ = pushing.reset(seed=range(8), options={"reset_mask": np.ones(8, bool)})
        ahead, after = np.full((8, 2), 0.7, np.float32), np.full((8, 2), 0.2, np.float32)
        return [start, *(pushing.step(action)[0] for action in (ahead, after))]

    usual = played()
    pushing.perturb(Perturbation(**factors))
    changed = played()
    pushing.perturb(Perturbation())
    again = played()
    for one, other in zip(usual, again, strict=True):
        np.testing.assert_array_equal(one["frames"]["camera"], other["frames"]["camera"])
        np.testing.assert_array_equal(one["proprio"], other["proprio"])
    moved = [seen[-1]["proprio"] - seen[0]["proprio"] for seen in (usual, changed)]
    if "latency" in factors:
        still, ahead = (np.abs(seen[1]["proprio"] - seen[0]["proprio"]).max() for seen in (changed, usual))
        assert still < 1e-4 < 0.01 < ahead
    if "gain" in factors:
        np.testing.assert_allclose(moved[1][:, :2] / moved[0][:, :2], 0.5, atol=0.05)
    if not {"latency", "gain"} & set(factors):
        np.testing.assert_array_equal(moved[0], moved[1])
        for row in range(8):
            first = [seen[0]["frames"]["camera"][row].astype(int) for seen in (usual, changed)]
            assert np.abs(first[0] - first[1]).mean() > 0.3


def test_the_expert_pushes_cubes_that_begin_elsewhere(pushing):
    pushing.perturb(Perturbation(object_shift=(0.03, -0.03), latency=1, phrasing="held_out"))
    shown = list(rollout(pushing, ScriptedExpert(pushing, ExpertConfig(burst_probability=0)),
                         [[seed] for seed in range(8)], sample=False))
    pushing.perturb(Perturbation())
    assert sum(episode.success is Success.YES for episode in shown) >= 4  # it is late, and does not know
    assert {episode.instruction for episode in shown} <= set(push().held_out_instructions)
    assert shown[0].provenance["perturbation"]["latency"] == 1


def test_a_termination_term_is_a_success_and_ends_what_was_seen():
    easy = [f"env.commands.ee_pose.{kind}_success_threshold=10.0" for kind in ("position", "orientation")]
    env = IsaacEnv(num_envs=2, config=dataclasses.replace(REACH, overrides=[*REACH.overrides, *easy]))
    before, _ = env.reset(seed=[1, 2], options={"reset_mask": np.ones(2, bool)})
    after, reward, terminated, truncated, info = env.step(np.ones((2, 7), np.float32))
    env.close()
    assert terminated.all()
    assert not truncated.any()
    assert info["success"].all()
    assert reward.tolist() == [1, 1]
    names = list(env.spec.proprio_names)
    goal, action = names.index("pose_command_0"), names.index("actions_0")
    assert (after["proprio"][:, action:] == 1).all()  # the reset that follows in the same step would have made it 0
    np.testing.assert_array_equal(after["proprio"][:, goal:action], before["proprio"][:, goal:action])


def test_a_task_that_needs_isaac_sim_says_so_in_one_line():
    look = subprocess.run([find_python("isaac", "ISAACLAB_PYTHON"), "-c", "import isaacsim"], capture_output=True)
    if look.returncode == 0:
        pytest.skip("Isaac Sim is there")
    with pytest.raises(UserError, match="Isaac Sim did not start for IsaacContrib-Lift-Cube-Franka") as error:
        IsaacEnv(config=IsaacConfig(task="IsaacContrib-Lift-Cube-Franka", instructions=["lift the cube"]), num_envs=2)
    assert "\n" not in str(error.value)
