from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.rollout import rollout
from data.types import Success, UserError
from sim import pusht
from sim.expert import ScriptedExpert
from sim.pusht import SIZE, STATISTICS, PushTConfig
from sim.pusht_expert import _CORNERS, PUSH_STEPS, PushTExpert
from sim.vector import VectorEnv

ROOT = Path(__file__).resolve().parents[2]
needs_pusht = pytest.mark.skipif(importlib.util.find_spec("gym_pusht") is None,
                                 reason="gym-pusht is not installed; type: pip install 'wm-rl[pusht]'")


@needs_pusht
def test_the_expert_solves_it_and_success_is_the_packages_own():
    with contextlib.closing(VectorEnv(tasks=["pusht"], num_envs=2, workers=0, config=PushTConfig())) as env:
        episodes = list(rollout(env, ScriptedExpert(env), [[3, 4], [5, 6]], sample=False))
    assert all(episode.success is Success.YES and episode.reward.sum() == 1 for episode in episodes)
    assert all(episode.terminated[-1] and len(episode) > 5 for episode in episodes)
    task = PushTConfig().make("pusht")
    task.reset(3)
    (shown,) = (episode for episode in episodes if episode.provenance["seed"] == 3)
    covered = []
    for action in shown.action:
        *_, info = task._env.step(STATISTICS.denormalise(action).astype(np.float64))
        covered.append(info["coverage"])
    assert (np.array(covered) > 0.95).tolist() == shown.terminated.tolist()


@needs_pusht
def test_a_trial_of_a_push_says_where_the_block_will_be():
    PushTConfig().prepare()
    task = PushTConfig().make("pusht")
    task.reset(11)
    expert: PushTExpert = task._expert
    begin, aim, steps = expert._plan()
    expected = expert._try(begin, aim)[steps - 1]
    task._env.agent.position, task._env.agent.velocity = begin.tolist(), (0, 0)
    for _ in range(steps):
        task._env.step(aim)
    corners = np.array([task._env.block.local_to_world(tuple(corner)) for corner in _CORNERS.tolist()])
    assert expected == pytest.approx(np.linalg.norm(corners - expert._goal, axis=1).mean(), abs=1e-6)
    vertices = {tuple(vertex) for shape in task._env.block.shapes for vertex in shape.get_vertices()}
    assert {tuple(corner) for corner in _CORNERS.tolist()} <= vertices
    assert steps <= PUSH_STEPS


@needs_pusht
def test_actions_are_places_and_proprio_is_the_disc():
    with contextlib.closing(VectorEnv(tasks=["pusht"], num_envs=1, workers=0, config=PushTConfig())) as env:
        env.reset(seed=[8], options={"reset_mask": np.ones(1, bool)})
        for _ in range(20):
            observation, *_ = env.step(np.array([[-0.8, 0.6]], np.float32))
    assert observation["proprio"][0] == pytest.approx([0.1 * SIZE, 0.8 * SIZE], abs=8)


@needs_pusht
def test_it_needs_no_display_no_gl_and_no_torch():
    code = ("import sys, numpy as np; from sim.vector import VectorEnv; from sim.pusht import PushTConfig;"
            "env = VectorEnv(tasks=['pusht'], num_envs=1, workers=0, config=PushTConfig());"
            "o, _ = env.reset(seed=[1], options={'reset_mask': np.ones(1, bool)});"
            "assert o['frames']['top'].std() > 3; assert not {'torch', 'mujoco'} & set(sys.modules)")
    bare = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, text=True, capture_output=True,
                            check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(pusht.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gym-pusht, which is not installed; type: pip install 'wm-rl\[pusht\]'"):
        VectorEnv(tasks=["pusht"], config=PushTConfig())


def test_an_unknown_task_is_one_line():
    with pytest.raises(UserError, match="unknown task 'pusht2', did you mean 'pusht'"):
        VectorEnv(tasks=["pusht2"], config=PushTConfig())
