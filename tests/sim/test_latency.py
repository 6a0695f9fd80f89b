import contextlib
import time
from unittest import mock

import numpy as np
import pytest

from data.types import UserError
from sim import latency
from sim.latency import LatentVectorEnv
from sim.metaworld import MetaWorldConfig

STATE = MetaWorldConfig(max_episode_steps=400, action_repeat=1, observation="state", reward="dense")


def slept(steps=1, playing=None, **changes):
    """Seconds of sleep in each step, with only some rows playing."""
    env = LatentVectorEnv(tasks=["reach-v3"], workers=0, config=STATE, **{"num_envs": 4, "latency_ms": 50} | changes)
    with contextlib.closing(env), mock.patch.object(latency, "time") as clock:
        env.reset(seed=[0] * env.num_envs, options={"reset_mask": np.arange(env.num_envs) < (playing or env.num_envs)})
        assert not clock.sleep.called, "a reset takes none"
        for _ in range(steps):
            env.step(np.zeros((env.num_envs, 4), np.float32))
    return np.array([call.args[0] for call in clock.sleep.call_args_list])


@pytest.mark.sim
def test_every_step_takes_it_once_for_all_rows_together():
    assert slept(steps=3) == pytest.approx([0.05] * 3)
    assert slept(only=[2]) == pytest.approx([0.05])
    assert len(slept(latency_ms=0)) == 0


@pytest.mark.sim
def test_rows_that_are_stepped_together_wait_for_the_slowest():
    """Against draws of our own: the mean of one log-normal latency, and that of the largest of four."""
    draw = np.random.default_rng(7)
    spread = np.sqrt(np.log(1.25))
    many = np.exp(spread * draw.standard_normal((200_000, 4)) - spread**2 / 2)
    assert many.mean() == pytest.approx(1, abs=0.01)
    assert many.std() == pytest.approx(0.5, abs=0.01)
    alone, together = slept(steps=390, variation=0.5, only=[1]), slept(steps=390, variation=0.5)
    one_row_of_four = slept(steps=390, variation=0.5, playing=1)
    assert alone.mean() == pytest.approx(0.05, rel=0.1)
    assert alone.std() == pytest.approx(0.025, rel=0.25)
    assert one_row_of_four.mean() == pytest.approx(0.05, rel=0.1)
    assert together.mean() == pytest.approx(0.05 * many.max(axis=1).mean(), rel=0.1)


@pytest.mark.sim
def test_it_really_takes_that_long():
    env = LatentVectorEnv(tasks=["reach-v3"], workers=0, config=STATE, num_envs=1, latency_ms=100)
    with contextlib.closing(env):
        env.reset(seed=[0], options={"reset_mask": np.ones(1, bool)})
        begun = time.monotonic()
        env.step(np.zeros((1, 4), np.float32))
        assert time.monotonic() - begun >= 0.1


@pytest.mark.parametrize("wrong", [{"latency_ms": -1}, {"variation": -0.1}])
def test_a_time_below_zero_is_refused(wrong):
    with pytest.raises(UserError, match=r"env\.latency_ms"):
        slept(**wrong)
