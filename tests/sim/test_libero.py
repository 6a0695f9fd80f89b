"""Real LIBERO behind its worker process, held against the benchmark's own evaluation loop."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from data.logs.ingest import IngestConfig, ingest
from data.rollout import rollout
from data.store import ReplayStore
from data.types import Action, Success, UserError
from sim.expert import ExpertConfig, ScriptedExpert
from sim.libero.env import STEP_LIMITS, LiberoConfig, LiberoEnv
from sim.remote.environments import find_python

ROOT = Path(__file__).parents[2]
SMALL = {"image_size": 32, "max_episode_steps": 6}
OBJECT, GOAL = "libero_object", "libero_goal"


def _python():
    try:
        return find_python("libero", "LIBERO_PYTHON")
    except UserError as error:
        return str(error)


PYTHON = _python()
real = [pytest.mark.libero, pytest.mark.slow, pytest.mark.xdist_group("libero"),
        pytest.mark.skipif(isinstance(PYTHON, str), reason=f"NOT TESTED: LIBERO. {PYTHON}")]


def real_libero(test):
    for mark in real:
        test = mark(test)
    return test


def libero(suite=OBJECT, tasks=(0,), num_envs=2, workers=1, **config):
    return LiberoEnv(suite=suite, tasks=list(tasks), num_envs=num_envs, workers=workers, config=LiberoConfig(**config))


class Scripted:
    """Plays given actions, one sequence for each row."""

    chunk, version = 1, -1

    def __init__(self, actions):
        self.actions, self.steps = actions, np.zeros(len(actions), int)

    def act(self, observation, seeds):
        rows = list(observation.slot)
        action = np.stack([self.actions[row][self.steps[row]] for row in rows])[:, None]
        self.steps[rows] += 1
        return Action(token=np.full(action.shape, -1, np.int16), action=action.astype(np.float32),
                      log_prob=np.full(action.shape, np.nan, np.float32), value=np.zeros(len(rows), np.float32))


@real_libero
@pytest.mark.parametrize(("suite", "trials", "length", "size"), [
    (OBJECT, range(4), 160, 0), (GOAL, range(1, 5), 6, 64), ("libero_spatial", range(12), 6, 0)])
def test_twenty_replays_agree_with_the_benchmark_s_own_evaluation(suite, trials, length, size, tmp_path):
    """Proprio at every step and success are equal bit for bit; so are pictures where furniture changes places."""
    with contextlib.closing(libero(suite, num_envs=2, max_episode_steps=length, fast_rendering=size == 0,
                                   image_size=size or 16)) as env:
        policy = Scripted(np.random.default_rng(0).uniform(-1, 1, (2, length * len(trials), 7)))
        if suite == OBJECT:  # the expert, which goes astray in some
            policy = ScriptedExpert(env, ExpertConfig(burst_probability=0.02, burst_steps=(5, 25)))
        played = rollout(env, policy, [list(trials[::2]), list(trials[1::2])], sample=suite == OBJECT)
        ours = {episode.provenance["seed"]: episode for episode in played}
    assert sorted(ours) == list(trials)
    theirs = benchmark(tmp_path, suite, size, {seed: episode.action for seed, episode in ours.items()})
    for trial, episode in ours.items():
        assert (episode.success is Success.YES) == theirs[f"{trial}/success"]
        np.testing.assert_array_equal(episode.proprio, proprio(theirs, trial))
        for camera, key in (("agentview", "agentview_image"), ("wrist", "robot0_eye_in_hand_image")):
            if size:
                np.testing.assert_array_equal(episode.frames[camera], theirs[f"{trial}/{key}"][:, ::-1, ::-1])
    if suite == OBJECT:
        assert sum(episode.success is Success.YES for episode in ours.values()) >= 2


def benchmark(folder, suite, size, actions):
    np.savez(folder / "actions.npz", **{str(trial): each.astype(np.float64) for trial, each in actions.items()})
    subprocess.run([PYTHON, ROOT / "tests/sim/libero_benchmark.py", suite, "0", str(size), folder / "actions.npz",
                    folder / "seen.npz"], check=True, capture_output=True, env={**os.environ, "MUJOCO_GL": gl()})
    with np.load(folder / "seen.npz") as seen:
        return dict(seen)


def gl():
    from sim.gl import ensure_gl

    return ensure_gl()


def proprio(seen, trial):
    return np.concatenate([seen[f"{trial}/{key}"] for key in (
        "robot0_eef_pos", "robot0_eef_axisangle", "robot0_gripper_qpos")], axis=1).astype(np.float32)


@real_libero
def test_a_restored_row_goes_on_bit_for_bit():
    """Where the stove, the cabinet and the rack have other places in every trial."""
    with contextlib.closing(libero(GOAL, image_size=32, max_episode_steps=40)) as env:
        moves = np.random.default_rng(3).uniform(-1, 1, (20, 2, 7)).astype(np.float32)
        env.reset(seed=[1, 2], options={"reset_mask": np.ones(2, bool)})
        for move in moves[:8]:
            before = env.step(move)
        snapshot = env.snapshot(0)
        first = [env.step(move) for move in moves[8:]]
        for row in (0, 1):  # where it was taken, and in another process' row that played something else
            shown, _ = env.restore(row, snapshot)
            for camera in env.spec.cameras:
                np.testing.assert_array_equal(shown["frames"][camera][row], before[0]["frames"][camera][0])
            again = [env.step(move[[0, 0]]) for move in moves[8:]]
            for one, two in zip(first, again, strict=True):
                for camera in env.spec.cameras:
                    np.testing.assert_array_equal(one[0]["frames"][camera][0], two[0]["frames"][camera][row])
                np.testing.assert_array_equal(one[0]["proprio"][0], two[0]["proprio"][row])
                assert one[4]["time"][0] == two[4]["time"][row]


@real_libero
def test_trials_training_and_instructions():
    with contextlib.closing(libero(tasks=(9, "pick_up_the_milk_and_place_it_in_the_basket"), num_envs=4, workers=2,
                                   **SMALL)) as env:
        reset = {"reset_mask": np.ones(4, bool)}
        trial, info = env.reset(seed=[7, 7, 57, 57], options=reset)
        assert info["instruction"][:2] == ["pick up the orange juice and place it in the basket",
                                           "pick up the milk and place it in the basket"]
        for row in (0, 1):  # trial 57 is 7 again: there are 50
            np.testing.assert_array_equal(trial["frames"]["agentview"][row], trial["frames"]["agentview"][row + 2])
        training = 1 << 30
        trained, _ = env.reset(seed=[training + 7, training + 7, training + 57, training + 7], options=reset)
        assert (trained["frames"]["agentview"][0] != trial["frames"]["agentview"][0]).any()
        assert (trained["frames"]["agentview"][0] != trained["frames"]["agentview"][2]).any()
        np.testing.assert_array_equal(trained["frames"]["agentview"][1], trained["frames"]["agentview"][3])


@real_libero
@pytest.mark.parametrize("suite", STEP_LIMITS)
def test_every_suite_plays(suite):
    with contextlib.closing(libero(suite, tasks=(3,), num_envs=1, **SMALL)) as env:
        start, info = env.reset(seed=[11], options={"reset_mask": np.ones(1, bool)})
        for _ in range(SMALL["max_episode_steps"]):
            end, _, _, truncated, _ = env.step(np.array([[0.3, 0.3, 0.3, 0, 0, 0, -1]], np.float32))
    assert truncated.all()
    assert len(info["instruction"][0].split()) > 3
    assert (end["proprio"][0, :3] - start["proprio"][0, :3] > 0.005).all(), "the hand went where it was told"
    for frames in end["frames"].values():
        assert frames.std() > 10


@real_libero
def test_pictures_are_drawn_large_and_resized():
    with contextlib.closing(libero(num_envs=1, image_size=224, render_size=256, fast_rendering=False)) as env:
        observation, _ = env.reset(seed=[0], options={"reset_mask": np.ones(1, bool)})
    assert env.max_episode_steps == 280
    assert observation["frames"]["agentview"].shape == (1, 224, 224, 3)


@real_libero
def test_what_is_wrong_is_said_in_one_line():
    with pytest.raises(UserError, match=r"unknown LIBERO task 10; type .* of: 0 pick_up_the_alphabet_soup"):
        libero(tasks=(10,))
    with pytest.raises(UserError, match="expected a row for each of 10 tasks"):
        LiberoEnv(suite=OBJECT, num_envs=2, workers=1)
    with contextlib.closing(libero(GOAL, num_envs=1, **SMALL)) as env:
        env.reset(seed=[0], options={"reset_mask": np.ones(1, bool)})
        with pytest.raises(UserError, match="no scripted expert knows how"):
            env.expert_action()


def test_settings_that_cannot_be_simulated():
    with pytest.raises(UserError, match=r"expected env\.suite of libero_spatial"):
        LiberoEnv(suite="libero_sofa")
    with pytest.raises(UserError, match=r"env\.workers of at least 0"):
        LiberoEnv(suite=OBJECT, workers=-1)
    for wrong in ({"cameras": ["sideview"]}, {"training_states": "all"}, {"image_size": 0}, {"wait_steps": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            LiberoConfig(**wrong)


@real_libero
def test_demonstrations_and_the_simulator_share_a_store(tmp_path):
    """A file in the layout of LIBERO's demonstrations, made by LIBERO, becomes what ``env=libero`` records."""
    with contextlib.closing(libero(GOAL, num_envs=1, image_size=64, max_episode_steps=12, fast_rendering=False)) as env:
        moves = np.random.default_rng(5).uniform(-1, 1, (1, 12, 7)).round(3)
        (episode,) = rollout(env, Scripted(moves), [[4]], sample=False)
        seen = benchmark(tmp_path, GOAL, 64, {4: episode.action})
        with h5py.File(tmp_path / "open_the_middle_drawer_of_the_cabinet_demo.hdf5", "w") as file:
            write_demonstration(file, seen, 4, episode.action, episode.instruction)
        store = ReplayStore.create(tmp_path / "both.zarr", spec=env.spec, statistics=env.statistics,
                                   embodiment=env.embodiment)
    store.append([episode])
    store.close()
    ingest(tmp_path / "open_the_middle_drawer_of_the_cabinet_demo.hdf5", tmp_path / "both.zarr",
           IngestConfig(image_size=64, cameras=None, embodiment=None, action_range="range", clip=False),
           mapping=ROOT / "docs/libero_mapping.yaml")
    simulated, logged = (ReplayStore.open(tmp_path / "both.zarr").trajectory(i) for i in range(2))
    assert (simulated.source, logged.source) == ("sim", "real")
    assert logged.instruction == simulated.instruction == "open the middle drawer of the cabinet"
    rows = len(logged) + 1
    for camera in ("agentview", "wrist"):
        np.testing.assert_array_equal(logged.frames[camera], simulated.frames[camera][:rows])
    np.testing.assert_allclose(logged.proprio, simulated.proprio[:rows], rtol=0, atol=1e-6)
    np.testing.assert_allclose(logged.action, simulated.action[: rows - 1], rtol=0, atol=1e-6)


def write_demonstration(file, seen, trial, actions, instruction):
    """Data sets and attributes as in LIBERO's files; a row is what was seen before its action."""
    data = file.create_group("data")
    data.attrs["problem_info"] = json.dumps({"problem_name": "Libero_Tabletop_Manipulation", "domain_name": "robosuite",
                                             "language_instruction": instruction})
    data.attrs["env_args"] = json.dumps({"env_name": "Libero_Tabletop_Manipulation", "type": 1,
                                         "env_kwargs": {"control_freq": 20}})
    demo = data.create_group("demo_0")
    rows = len(actions)
    position, rotation = (seen[f"{trial}/robot0_eef_{each}"][:rows] for each in ("pos", "axisangle"))
    for name, values in {
            "actions": actions.astype(np.float64), "rewards": np.zeros(rows, np.uint8),
            "dones": np.zeros(rows, np.uint8),
            "obs/agentview_rgb": seen[f"{trial}/agentview_image"][:rows],
            "obs/eye_in_hand_rgb": seen[f"{trial}/robot0_eye_in_hand_image"][:rows], "obs/ee_pos": position,
            "obs/ee_ori": rotation, "obs/ee_states": np.hstack([position, rotation]),
            "obs/gripper_states": seen[f"{trial}/robot0_gripper_qpos"][:rows]}.items():
        demo[name] = values
    demo.attrs["num_samples"] = rows
