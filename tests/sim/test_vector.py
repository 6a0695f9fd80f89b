from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.rollout import rollout
from data.types import Source, Success, UserError
from sim.expert import ExpertConfig, ScriptedExpert
from sim.metaworld import MetaWorldConfig
from sim.perturbation import Perturbation
from sim.stand_in import stand_in_config
from sim.tasks import DEMO_TASKS, MIXES, PHRASINGS, TASKS, phrasings
from sim.vector import VectorEnv

ROOT = Path(__file__).resolve().parents[2]
SHORT = MetaWorldConfig(max_episode_steps=8)


@pytest.fixture(scope="module")
def demo():
    env = VectorEnv(tasks=DEMO_TASKS, num_envs=4, workers=1)
    yield env
    env.close()


@pytest.mark.sim
def test_expert_solves_the_demo_tasks_and_pictures_differ(demo):
    episodes = list(rollout(demo, ScriptedExpert(demo), [[7], [7], [7], [7]], sample=False))
    assert {episode.task for episode in episodes} == set(DEMO_TASKS)
    assert all(episode.success is Success.YES and episode.reward.sum() == 1 for episode in episodes)
    assert all(episode.terminated[-1] and not episode.truncated.any() for episode in episodes)
    firsts = [episode.frames["workspace"][0] for episode in episodes]
    for i in range(4):
        assert firsts[i].mean() > 40  # lit
        assert firsts[i][-16:].mean(axis=(0, 1))[0] > firsts[i][-16:].mean(axis=(0, 1))[2] + 15  # table, brown, below
        for j in range(i):
            assert np.abs(firsts[i].astype(int) - firsts[j]).mean() > 2  # two renderers in one process do not mix


@pytest.mark.sim
def test_seed_decides_goal_and_sentence(demo):
    everything = np.ones(4, bool)
    starts = [demo.reset(seed=[seed] * 4, options={"reset_mask": everything}) for seed in range(6)]
    frames = [start[0]["frames"]["workspace"] for start in starts]
    assert all((frames[0][row] != frames[1][row]).any() for row in range(4))
    sentences = {start[1]["instruction"][0] for start in starts}
    assert len(sentences) > 1
    assert sentences <= set(PHRASINGS[DEMO_TASKS[0]])


@pytest.mark.sim
def test_noise_is_the_same_in_any_row_and_after_any_episode(demo):
    expert = ScriptedExpert(demo, ExpertConfig(burst_probability=0.5))
    alone = next(iter(rollout(demo, expert, [[5], [], [], []], sample=True)))
    later = next(e for e in rollout(demo, expert, [[9, 5], [3], [], []], sample=True) if e.provenance["seed"] == 5)
    assert np.array_equal(alone.action, later.action)
    assert np.array_equal(alone.frames["workspace"], later.frames["workspace"])


@pytest.mark.sim
def test_thinned_meshes_do_not_change_the_physics(monkeypatch):
    SHORT.prepare()  # chooses GL before MuJoCo is imported
    from sim import metaworld_scene
    from sim.metaworld_task import MetaWorldTask

    def states():
        task = MetaWorldTask("door-close-v3", SHORT)
        answers = [task.reset(3)] + [task.step(task.expert_action()) for _ in range(6)]
        faces = int(task._env.model.mesh_facenum.sum())
        state = task._env.data.qpos.copy()
        task.close()
        return np.stack([answer.proprio for answer in answers]), state, faces

    thin = states()
    monkeypatch.setattr(metaworld_scene, "thin_meshes", lambda model, size: None)
    full = states()
    assert thin[2] < full[2] / 3
    assert np.array_equal(thin[0], full[0])
    assert np.array_equal(thin[1], full[1])


@pytest.mark.sim
def test_workers_stay_light_and_a_dead_one_is_named(tmp_path):
    env = VectorEnv(tasks=["drawer-close-v3"], num_envs=2, workers=2, config=SHORT)
    try:
        env.reset(seed=[1, 2], options={"reset_mask": np.ones(2, bool)})
        pids = [worker._process.pid for worker in env._workers]
        assert not any("torch" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"rows 1-1 \(drawer-close-v3\) died \(exit code -9"):
            env.step(np.zeros((2, 4), np.float32))
    finally:
        env.close()
    assert all(not Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        env.step(np.zeros((2, 4), np.float32))


@pytest.mark.sim
def test_other_cameras_stand_upright():
    env = VectorEnv(tasks=["drawer-close-v3"], num_envs=1, workers=0, config=MetaWorldConfig(camera="corner2"))
    observation, _ = env.reset(seed=[0], options={"reset_mask": np.ones(1, bool)})
    env.close()
    picture = observation["frames"]["corner2"][0].astype(int)
    assert picture[:8].std() < 5  # plain sky above
    assert picture[-16:].std() > 10  # table and pedestal below


def test_task_list_and_mixes_are_metaworlds():
    script = ("import sim.gl; sim.gl.ensure_gl(); from metaworld import env_dict as known; print(*known.ENV_CLS_MAP);"
              "print(*known.MT10_V3); print(*known.MT25_V3); print(*known.MT50_V3)")
    names = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    everything, *mixes = (line.split() for line in names.splitlines())
    assert set(everything) == set(TASKS)
    assert [set(mix) for mix in mixes] == [set(MIXES[name]) for name in ("mt10", "mt25", "mt50")]
    assert MetaWorldConfig().tasks(["mt10", "door-close-v3", "reach-v3"]) == (*MIXES["mt10"], "door-close-v3")
    assert all(len(set(phrasings(task))) >= 4 for task in TASKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["drawer-closs-v3"]}, "unknown task 'drawer-closs-v3', did you mean 'drawer-close-v3'?"),
        ({"tasks": "mt51"}, "unknown task 'mt51', did you mean 'mt"),
        ({"tasks": []}, "expected a list of tasks"),
        ({"tasks": DEMO_TASKS, "source": "imagined"}, "expected source sim or real"),
        ({"tasks": DEMO_TASKS, "num_envs": 0}, "expected a row for each of 4 tasks"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        VectorEnv(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MetaWorldConfig(camera="corner9"), "unknown camera 'corner9', did you mean 'corner"),
        (lambda: MetaWorldConfig(max_episode_steps=400), "at most Meta-World's 500"),
        (lambda: MetaWorldConfig(image_size=0), "image_size must be at least 1"),
        (lambda: ExpertConfig(burst_steps=(3, 2)), "shortest <= longest"),
    ],
)
def test_bad_config_is_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_stand_in_differs_and_says_so():
    config = stand_in_config()
    assert config.perturbation != Perturbation()
    assert config.camera == MetaWorldConfig().camera
    assert Source("real") is Source.REAL


class _Fixed:
    """Commands the same action for ever."""

    chunk, version = 1, 0

    def __init__(self, action):
        self.action = np.asarray(action, np.float32)

    def act(self, observation, seeds):
        from data.types import Action

        n = len(observation.proprio)
        return Action(token=np.zeros((n, 1, 4), np.int16), action=np.tile(self.action, (n, 1, 1)),
                      log_prob=np.zeros((n, 1, 4), np.float32), value=np.zeros(n, np.float32))


@pytest.mark.sim
def test_state_observations_with_dense_reward():
    config = MetaWorldConfig(observation="state", reward="dense", max_episode_steps=50, goal_seed=5)
    env = VectorEnv(tasks=["reach-v3"], num_envs=2, workers=0, config=config)
    assert env.spec.cameras == ()
    assert env.spec.proprio_dim == 39
    still, moving = (list(rollout(env, _Fixed(action), [[1, 2], [3]], sample=False))
                     for action in ([0, 0, 0, 0], [1, 1, 0, 0]))
    env.close()
    for episode in (*still, *moving):
        assert len(episode) == 50
        assert episode.frames == {}
        assert episode.truncated[-1]
        assert not episode.terminated.any()
        assert (episode.reward >= 0).all()
        assert (episode.reward <= 1).all()
        np.testing.assert_array_equal(episode.proprio[0], still[0].proprio[0])  # one goal, whatever the seed
    assert moving[0].proprio[-1, 0] > still[0].proprio[-1, 0] + 0.05  # the hand went
    goal, hand = moving[0].proprio[:, 36:39], moving[0].proprio[:, :3]
    nearest = np.linalg.norm(goal - hand, axis=1)[1:].argmin()
    assert moving[0].reward[nearest] == pytest.approx(moving[0].reward.max(), abs=0.05)  # reach rewards nearness


@pytest.mark.sim
def test_another_goal_seed_is_another_goal():
    starts = []
    for goal_seed in (1, 2):
        env = VectorEnv(tasks=["reach-v3"], num_envs=1, workers=0, config=MetaWorldConfig(
            observation="state", reward="dense", max_episode_steps=2, goal_seed=goal_seed))
        (episode,) = rollout(env, _Fixed([0, 0, 0, 0]), [[0]], sample=False)
        env.close()
        starts.append(episode.proprio[0])
    assert np.abs(starts[0] - starts[1]).max() > 0.01


@pytest.mark.sim
def test_dense_episodes_that_once_succeeded_have_succeeded():
    env = VectorEnv(tasks=["drawer-close-v3"], num_envs=1, workers=0, config=MetaWorldConfig(
        observation="state", reward="dense", max_episode_steps=100))
    (episode,) = rollout(env, ScriptedExpert(env, ExpertConfig(burst_probability=0.0)), [[7]], sample=False)
    env.close()
    assert episode.success is Success.YES
    assert len(episode) == 100
    assert episode.reward[-1] > 0.5


@pytest.mark.sim
def test_an_episode_may_go_on_after_its_success():
    def record(**changes):
        env = VectorEnv(tasks=["drawer-close-v3", "button-press-v3"], num_envs=2, workers=0,
                        config=MetaWorldConfig(image_size=16, **changes))
        try:
            return list(rollout(env, ScriptedExpert(env, ExpertConfig(burst_probability=0)), [[3], [4]], sample=True))
        finally:
            env.close()

    for usual, longer in zip(*(sorted(record(**c), key=lambda e: e.task) for c in ({}, {"steps_after_success": 4})),
                             strict=True):
        steps = len(usual)
        assert len(longer) == steps + 4
        for name in ("action", "reward", "terminated", "decision"):
            assert np.array_equal(getattr(longer, name)[:steps], getattr(usual, name)), name
        assert np.array_equal(longer.frames["workspace"][: steps + 1], usual.frames["workspace"])
        assert not longer.terminated[steps:].any()
        assert not longer.decision[steps:].any()
        assert not longer.truncated.any()
        assert longer.success is Success.YES
        assert (longer.reward[steps:] == 1).all()  # the expert keeps the drawer closed and the button pressed
    budget = len(usual) + 2
    cut = max(record(steps_after_success=4, max_episode_steps=budget), key=len)
    assert len(cut) == budget
    assert cut.terminated.sum() == 1
    assert not cut.truncated.any()


@pytest.mark.sim
def test_rows_by_themselves_in_threads_play_what_they_play_among_others():
    tasks, rows = ["drawer-close-v3", "door-close-v3"], 3

    def some(own):
        env = VectorEnv(tasks=tasks, num_envs=rows, workers=0, config=SHORT, only=own)
        assert (env.num_envs, env.row_tasks) == (len(own), [tasks[row % 2] for row in own])
        with contextlib.closing(env):
            return list(rollout(env, ScriptedExpert(env), [[10 + row] for row in own], sample=False))

    with contextlib.closing(VectorEnv(tasks=tasks, num_envs=rows, workers=1, config=SHORT)) as env:
        together = list(rollout(env, ScriptedExpert(env), [[10], [11], [12]], sample=False))
    with ThreadPoolExecutor(rows) as pool:
        apart = [each for played in pool.map(some, [range(1), range(1, rows)]) for each in played]
        for one, other in zip(together, sorted(apart, key=lambda each: each.provenance["seed"]), strict=True):
            assert one.task == other.task
            assert np.array_equal(one.frames["workspace"], other.frames["workspace"])
            assert np.array_equal(one.proprio, other.proprio)
