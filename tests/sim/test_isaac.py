"""The adapter of Isaac Lab on the FAKE, which records of the real one keep honest."""

import json
import mmap
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.types import UserError
from sim.isaac.env import IsaacEnv
from sim.remote.protocol import BadInputError, block_bytes, map_block
from tests.sim.fake_isaac import DT, FakeIsaac, make
from tests.sim.isaac import FAKE, push
from tests.sim.isaac_probe import STEPS, probe

GOLDEN = json.loads((Path(__file__).parent / "isaac_golden.json").read_text())


class Direct:
    """The adapter over the FAKE in this process; what it shows is in ``answers``."""

    def __init__(self, num_envs=2, **changes):
        self.simulator = make({**FAKE, "num_envs": num_envs, **changes})
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


def test_the_fake_does_what_the_real_one_was_recorded_to_do():
    assert probe(FakeIsaac(2, STEPS)) == GOLDEN


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


def changed(changes, **settings):
    """A row and another that differs by ``changes``, both having begun from the same seed."""
    direct = Direct(**settings)
    direct.simulator.perturb(1, changes)
    direct.told = direct.reset([5, 5])
    return direct


def test_what_is_late_arrives_and_before_it_the_task_holds_still():
    direct = changed({"latency": 2}, steps=50, success=None)
    speeds = []
    for action in (1.0, 0.5, -0.2, 0.3, 0.8):
        before = direct.answers.proprio[:, 1].copy()
        speeds.append((direct.step(action).proprio[:, 1] - before) / (100 * DT))
    np.testing.assert_allclose(np.transpose(speeds), [[1, 0.5, -0.2, 0.3, 0.8], [0, 0, 1, 0.5, -0.2]], atol=1e-5)
    direct.simulator.perturb(1, {})
    direct.reset([5, 5])
    np.testing.assert_array_equal(*direct.step(0.7).proprio)


@given(gain=st.floats(0.1, 3), still=st.floats(-1, 1), action=st.floats(-1, 1))
def test_gain_counts_from_what_holds_still_and_stays_within_the_task_s_actions(gain, still, action):
    direct = changed({"gain": gain}, success=None, hold_still=[still])
    before = direct.answers.proprio[:, 1].copy()
    done = (direct.step(action).proprio[:, 1] - before) / (100 * DT)
    np.testing.assert_allclose(done, [action, np.clip(still + gain * (action - still), -1, 1)], atol=1e-4)


def test_light_and_camera_change_the_picture_alone():
    for changes in ({"light": [0.5, 1.0, 0.25]}, {"camera_shift": [1.0, 0.0, 0.0]}):
        direct = changed(changes)
        usual, other = direct.answers.frames["camera"]
        assert (usual != other).any()
        if "light" in changes:
            np.testing.assert_array_equal(other, (usual * np.array([0.5, 1.0, 0.25])).astype(np.uint8))
        np.testing.assert_array_equal(*direct.step(0.7).proprio)
        direct.simulator.perturb(1, {})
        direct.reset([5, 5])
        np.testing.assert_array_equal(*direct.answers.frames["camera"])


def test_objects_begin_elsewhere_and_sentences_are_others():
    direct = changed({"object_shift": [0.25, 0.0], "phrasing": "held_out"})
    np.testing.assert_allclose(direct.answers.proprio[1] - direct.answers.proprio[0], [0.25, 0, 0, 0], atol=1e-6)
    assert direct.told[0] in FAKE["instructions"]
    assert direct.told[1] == FAKE["held_out_instructions"][0]
    assert changed({"phrasing": "wordy"}).told[1].endswith(f"for me {FAKE['held_out_instructions'][0]}")


def test_a_task_has_the_factors_that_its_configuration_makes_possible():
    def factors(**changes):
        return set(Direct(**changes).simulator.description.factors)

    everything = {"light", "camera_shift", "camera_turn", "gain", "latency", "object_shift", "phrasing"}
    assert factors() == everything
    assert factors(hold_still=None) == everything - {"gain", "latency"}
    assert factors(object_shift=None, held_out_instructions=[]) == everything - {"object_shift", "phrasing"}
    assert factors(still_camera=None) == everything - {"camera_shift", "camera_turn"}
    assert factors(still_camera=None, cameras=[]) == {"gain", "latency", "object_shift", "phrasing"}


def test_physics_that_diverged_counts_as_a_crash():
    direct = Direct(cameras=[], still_camera=None)
    direct.task.state[:] = float("nan")
    with pytest.raises(FloatingPointError, match="physics of Fake-Cartpole diverged"):
        direct.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proprio": ["critic"]}, "no observation 'critic', it has policy"),
        ({"proprio_names": ["x"]}, "expected 4 proprio_names for Fake-Cartpole, got 1"),
        ({"success": "term:success"}, "no termination term 'success', it has []; name one, or a function"),
        ({"hold_still": [0, 0]}, "expected 1 numbers in env.config.hold_still for Fake-Cartpole, got [0, 0]"),
        ({"object_shift": "nowhere:won"}, "expected module:function of Isaac Lab's Python, got 'nowhere:won'"),
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
        ({"held_out_instructions": "push"}, {}, "expected a list of sentences in env.config.held_out_instructions"),
        ({"still_camera": "wrist"}, {}, "expected env.config.still_camera to be one of"),
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
