"""After ``restore`` any actions give, bit for bit, what they gave after ``snapshot``: in other rows and processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.types import UserError
from sim.metaworld import MetaWorldConfig
from sim.perturbation import Perturbation
from sim.pusht import PushTConfig
from sim.task import pack, unpack
from sim.tasks import TASKS
from sim.vector import VectorEnv

FEW = ("drawer-close-v3", "peg-insert-side-v3", "hammer-v3", "pick-place-v3", "stick-pull-v3", "lever-pull-v3")
ALL = {"reset_mask": np.ones(2, bool)}
PIXELS = MetaWorldConfig(image_size=32, action_repeat=2, max_episode_steps=60, steps_after_success=2,
                         perturbation=Perturbation(latency=2), randomise="mild")
CONFIGS = {
    "pixels": PIXELS, "dense": MetaWorldConfig(max_episode_steps=60, observation="state", reward="dense"),
    "pusht": PushTConfig(max_episode_steps=60, perturbation=Perturbation(latency=1))}


@pytest.fixture(scope="module")
def rows():
    """Make two rows of one task, once."""
    with contextlib.ExitStack() as made:
        yield functools.cache(lambda task, kind: made.enter_context(contextlib.closing(
            VectorEnv(tasks=[task], num_envs=2, workers=0, config=CONFIGS[kind]))))


def branched(env, seed, before, after, *, expert=True):
    """Play row 0, branch it into row 1, and go on in row 1, then in row 0: what each saw from the branch on."""
    draw = np.random.default_rng([seed, before])
    env.reset(seed=[seed, seed + 1], options=ALL)  # row 1 is in the midst of something else
    for step in range(before):
        action = env.expert_action() if expert and step % 3 else draw.uniform(-1, 1, (2, env.spec.action_dim))
        env.step(action.astype(np.float32))
    taken = env.snapshot(0)
    actions = draw.uniform(-1, 1, (after, 2, env.spec.action_dim)).astype(np.float32)
    actions[:, 1] = actions[:, 0]
    original = [env.step(action) for action in actions]
    elapsed = env.elapsed[0]
    env.restore(1, taken)
    copy = [env.step(action) for action in actions]
    assert env.elapsed[1] == elapsed
    env.restore(0, taken)
    again = [env.step(action) for action in actions]
    return original, copy, again


def check_same(one, row, two, other):
    for a, b in zip(one, two, strict=True):
        for camera, frames in a[0]["frames"].items():
            assert np.array_equal(frames[row], b[0]["frames"][camera][other])
        assert np.array_equal(a[0]["proprio"][row], b[0]["proprio"][other])
        assert [part[row] for part in a[1:4]] == [part[other] for part in b[1:4]]
        for name in ("success", "decided", "time", "instruction", "task"):
            assert a[4][name][row] == b[4][name][other]


@pytest.mark.sim
@settings(max_examples=15)
@given(st.sampled_from(FEW), st.sampled_from(["pixels", "dense"]), st.integers(0, 2**20), st.integers(0, 30),
       st.integers(1, 12))
def test_a_branch_goes_on_as_the_original_does(rows, task, kind, seed, before, after):
    original, copy, again = branched(rows(task, kind), seed, before, after)
    check_same(original, 0, copy, 1)
    check_same(original, 0, again, 0)


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_branched_and_plays_and_is_seen(task):
    with contextlib.closing(VectorEnv(tasks=[task], num_envs=2, workers=0, config=PIXELS)) as env:
        original, copy, _ = branched(env, 5, 20, 6)
    check_same(original, 0, copy, 1)
    frames = np.stack([step[0]["frames"]["workspace"][0] for step in original])
    assert frames.std() > 10
    assert (frames[0] != frames[-1]).any()


@pytest.mark.sim
def test_a_snapshot_is_bytes_that_another_process_understands(rows):
    here = rows("hammer-v3", "pixels")
    here.reset(seed=[1, 2], options=ALL)
    for _ in range(4):
        here.step(here.expert_action())
    taken = here.snapshot(0)
    assert isinstance(taken, bytes)
    assert len(taken) < 60_000
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 2, 4)).astype(np.float32)
    original = [here.step(action) for action in actions]
    with contextlib.closing(VectorEnv(tasks=["hammer-v3"], num_envs=2, workers=2, config=PIXELS)) as there:
        there.restore(0, taken)  # it has not been reset even once
        copy = [there.step(action) for action in actions]
    check_same(original, 0, copy, 0)


@pytest.mark.sim
def test_a_wrong_snapshot_is_refused(rows):
    env = rows("hammer-v3", "pixels")
    env.reset(seed=[1, 2], options=ALL)
    with pytest.raises(UserError, match="expected the bytes of a snapshot"):
        env.restore(0, b"nonsense")
    other = unpack(env.snapshot(0)) | {"task": "reach-v3"}
    with pytest.raises(UserError, match="expected a snapshot of hammer-v3 for row 0, got one of reach-v3"):
        env.restore(0, pack(other))


@pytest.mark.skipif(importlib.util.find_spec("gym_pusht") is None,
                    reason="gym-pusht is not installed; type: pip install 'wm-rl[pusht]'")
@settings(max_examples=8)
@given(st.integers(0, 2**20), st.integers(0, 30), st.integers(1, 10))
def test_pusht_branches_too(rows, seed, before, after):
    env = rows("pusht", "pusht")
    original, copy, again = branched(env, seed, before, after, expert=False)
    check_same(original, 0, copy, 1)
    check_same(original, 0, again, 0)
