"""Isaac Lab, the real one, through its worker process: Newton's physics on a CPU."""

import json
import mmap
import os
import re
import signal
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
from sim.remote.protocol import BadInputError, block_bytes, map_block
from tests.contract import check_env
from tests.sim.fake_isaac import DT, SIZE, FakeIsaac, make
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


@pytest.mark.isaac
@pytest.mark.skipif(bool(_missing()), reason=_missing())
def test_the_real_one_still_does_what_was_recorded(tmp_path):
    assert _in_isaac("tests.sim.isaac_probe", tmp_path) == GOLDEN


@pytest.mark.isaac
@pytest.mark.skipif(bool(_missing()), reason=_missing())
def test_the_stand_in_gripper_opens_and_closes(tmp_path):
    fingers = _in_isaac("tests.sim.isaac_gripper", tmp_path)  # only the first is driven, the second follows it
    np.testing.assert_allclose(fingers["open"], 0.04, atol=0.002)
    np.testing.assert_allclose(fingers["closed"], 0.0, atol=0.002)


def _in_isaac(module, folder):
    """What a module writes that runs in Isaac Lab's Python."""
    subprocess.run([find_python("isaac", "ISAACLAB_PYTHON"), "-m", module, folder / "told.json"], cwd=ROOT, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, capture_output=True)
    return json.loads((folder / "told.json").read_text())


@pytest.mark.isaac
@pytest.mark.skipif(bool(_missing()), reason=_missing())
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


@pytest.mark.isaac
@pytest.mark.skipif(bool(_missing()), reason=_missing())
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


@pytest.mark.isaac
@pytest.mark.skipif(bool(_missing()), reason=_missing())
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


@pytest.mark.isaac
@pytest.mark.skipif(bool(_missing()), reason=_missing())
def test_the_expert_pushes_the_cube_onto_the_strip(pushing):
    shown = list(rollout(pushing, ScriptedExpert(pushing, ExpertConfig(burst_probability=0)),
                         [[seed] for seed in range(8)], sample=False))
    assert [episode.success for episode in shown] == [Success.YES] * 8
    for episode in shown:
        assert episode.reward.sum() == 4  # at the success, and in the three control steps after it
        assert np.flatnonzero(episode.terminated).tolist() == [len(episode) - 4]
        assert episode.provenance["assets"] == "stand_in"
        assert episode.embodiment == "isaac-panda-stand-in"
        first, last = (episode.frames["camera"][at].astype(int) for at in (0, -1))
        red, green = ((picture[..., channel] > picture[..., 1 - channel] + 60).sum()
                      for picture, channel in ((first, 0), (first, 1)))
        assert red > 20
        assert (last[..., 1] > last[..., 0] + 60).sum() < green  # the cube hides part of the strip
    assert len({episode.frames["camera"][0].tobytes() for episode in shown}) == 8
    assert len({episode.instruction for episode in shown}) > 1


class Direct:
    """The adapter over the FAKE in this process; what it shows is in ``answers``."""

    def __init__(self, num_envs=2, **changes):
        self.simulator = make({**SETTINGS, "num_envs": num_envs, **changes})
        description = self.simulator.description
        self.task = self.simulator._env
        self.answers = map_block(mmap.mmap(-1, block_bytes(description)), description).sides[0]
        self.mask = np.ones(num_envs, bool)
        self.told = self.reset(range(num_envs))

    def reset(self, seeds, mask=None):
        return self.simulator.reset(self.mask if mask is None else mask, np.array(seeds, np.int64), self.answers)

    def step(self, action=0.0, mask=None):
        self.simulator.step(np.full((len(self.mask), 1), action, np.float32), self.mask if mask is None else mask,
                            self.answers)
        return self.answers


SETTINGS = {"task": "Fake-Cartpole", "instructions": ["go right", "to the right"], "cameras": ["camera"],
            "image_size": SIZE, "success": "tests.sim.fake_isaac:to_the_right",
            "expert": "tests.sim.fake_isaac:push_right"}


def fake(num_envs=3, workers=1, **changes):
    """The adapter in a worker process, with the FAKE behind it."""
    return RemoteEnv(name="isaac", python=Path(sys.executable), factory="tests.sim.fake_isaac:make",
                     configs=[{**SETTINGS, **changes, "num_envs": num_envs}] * workers)


def test_the_fake_does_what_the_real_one_was_recorded_to_do():
    assert probe(FakeIsaac(2, STEPS)) == GOLDEN


@pytest.mark.parametrize("changes", [{}, {"reward": "task", "success": None}, {"workers": 2, "num_envs": 2}])
def test_the_fake_keeps_the_contract(changes):
    check_env(lambda: fake(**changes))


def test_a_finished_row_shows_the_end_of_its_episode_not_the_next_one():
    direct = Direct(steps=3, success=None, reward="task")
    cart, speed = direct.answers.proprio[:, 0].copy(), direct.answers.proprio[:, 1].copy()
    for _ in range(3):
        answers = direct.step()
    assert answers.truncated.all()
    np.testing.assert_allclose(answers.proprio[:, 0], cart + 3 * speed * DT, rtol=1e-5)  # it went on, unpushed
    assert (direct.task.state.numpy()[:, 0] != answers.proprio[:, 0]).all()  # inside, the next episode has begun
    np.testing.assert_array_equal(answers.time, 3 * DT)


@pytest.mark.parametrize("actions", [(1.0, 5.0), (-1.0, -40.0)])
def test_actions_are_clipped(actions):
    ends = [Direct().step(action).proprio.copy() for action in actions]
    np.testing.assert_array_equal(*ends)
    raw = Direct(action_low=-2.0, action_high=2.0).step(actions[1]).proprio
    assert (np.abs(raw[:, 1] - ends[0][:, 1]) > 1).all()  # the same normalised action, twice the force


def test_an_episode_that_terminates_is_no_success_by_itself():
    direct = Direct(steps=50, fake={"fails_beyond": 0.7})
    flags = [[flag.copy() for flag in (answers.terminated, answers.success, answers.reward)]
             for answers in (direct.step(-1.0) for _ in range(15))]
    assert any(terminated.any() for terminated, _, _ in flags)
    assert not any(success.any() or reward.any() for _, success, reward in flags)


def test_success_ends_the_episode_after_the_steps_that_show_it():
    direct = Direct(num_envs=1, steps_after_success=2, steps=50)
    seen = []
    while not direct.answers.terminated[0]:
        answers = direct.step(1.0)
        seen.append((bool(answers.success[0]), bool(answers.decided[0]), float(answers.reward[0])))
    first = [success for success, _, _ in seen].index(True)
    assert len(seen) == first + 3
    assert seen[first:] == [(True, True, 1.0)] * 3
    assert seen[:first] == [(False, False, 0.0)] * first


def test_a_row_that_is_not_asked_is_not_shown():
    direct = Direct()
    before = direct.answers.proprio[1].copy(), direct.answers.time[1]
    answers = direct.step(1.0, np.array([True, False]))
    assert (answers.proprio[1] == before[0]).all()
    assert answers.time.tolist() == [pytest.approx(DT), before[1]]
    shown = answers.proprio[0].copy()
    assert set(direct.reset([0, 9], np.array([False, True]))) == {1}
    assert (direct.answers.proprio[0] == shown).all()


def test_what_a_seed_decides():
    def starts(seeds, mode):
        direct = Direct(seeds=mode)
        direct.reset(seeds)
        return direct.answers.proprio.copy()

    for mode in ("episode", "batch"):
        np.testing.assert_array_equal(starts([7, 8], mode), starts([7, 8], mode))
    assert (starts([7, 8], "episode")[0] == starts([7, 9], "episode")[0]).all()
    assert (starts([7, 8], "episode")[0] == starts([9, 7], "episode")[1]).all()
    assert (starts([7, 8], "batch")[0] != starts([7, 9], "batch")[0]).any()  # as the documentation warns
    assert Direct().told == Direct(seeds="batch").told


def test_physics_that_diverged_counts_as_a_crash():
    direct = Direct(cameras=[])
    direct.task.state[:] = float("nan")
    with pytest.raises(FloatingPointError, match="physics of Fake-Cartpole diverged"):
        direct.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proprio": ["critic"]}, "no observation 'critic', it has policy"),
        ({"proprio_names": ["x"]}, "expected 4 proprio_names for Fake-Cartpole, got 1"),
        ({"success": "term:success"}, "no termination term 'success', it has []; name one, or a function"),
        ({"success": "nowhere:won"}, "expected module:function of Isaac Lab's Python, got 'nowhere:won'"),
    ],
)
def test_what_the_task_has_not_is_one_line(changes, message):
    with pytest.raises(BadInputError, match=re.escape(message)) as error:
        Direct(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"reward": "dense"}, {}, "expected env.config.reward to be sparse or task, got 'dense'"),
        ({"seeds": "row"}, {}, "expected env.config.seeds to be episode or batch"),
        ({"instructions": "push"}, {}, "expected a list of sentences"),
        ({"action_low": 1.0}, {}, "expected action_low < action_high"),
        ({}, {"workers": 3, "num_envs": 2}, "expected 1 <= workers <= num_envs"),
    ],
)
def test_bad_settings_are_one_line(changes, settings, message):
    with pytest.raises(UserError, match=message):
        IsaacEnv(config=push(**changes), **settings)


def test_without_an_environment_it_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ISAACLAB_PYTHON", raising=False)
    with pytest.raises(UserError, match=r"type: make isaac \(or name an interpreter that has it: ISAACLAB_PYTHON="):
        IsaacEnv(config=push())
