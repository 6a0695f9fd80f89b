"""LIBERO as its own evaluation plays it, with nothing of this project: run by LIBERO's Python.

``libero_benchmark.py <suite> <task> <size> <actions.npz> <out.npz>`` replays the actions ``<trial>`` ``[t, 7]`` from
the suite's initial states and saves per trial what was seen before each action, what came last, and the success.
``size`` 0: without pictures.
"""

import sys

import numpy as np
from libero.libero import benchmark
from libero.libero.envs import OffScreenRenderEnv
from robosuite.utils.transform_utils import quat2axisangle


def evaluate(suite_name: str, number: int, size: int, actions: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    suite = benchmark.get_benchmark_dict()[suite_name]()
    pictures = {"camera_heights": size, "camera_widths": size} if size else {"use_camera_obs": False}
    env = OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(number), **pictures)
    env.seed(0)
    initial_states = suite.get_task_init_states(number)
    found = {}
    for trial in range(max(actions) + 1):
        env.reset()
        observation = env.set_init_state(initial_states[trial])
        if trial not in actions:
            continue
        for _ in range(10):
            observation, *_ = env.step([0.0] * 6 + [-1.0])
        seen, done = [observation], False
        for action in actions[trial]:
            observation, _, done, _ = env.step(action)
            seen.append(observation)
        found[f"{trial}/success"] = np.array(done)
        for key in ("agentview_image", "robot0_eye_in_hand_image") if size else ():
            found[f"{trial}/{key}"] = np.stack([each[key] for each in seen])
        for key in ("robot0_eef_pos", "robot0_gripper_qpos"):
            found[f"{trial}/{key}"] = np.stack([each[key] for each in seen])
        found[f"{trial}/robot0_eef_axisangle"] = np.stack([quat2axisangle(each["robot0_eef_quat"]) for each in seen])
    env.close()
    return found


if __name__ == "__main__":
    suite, number, size, given, out = sys.argv[1:]
    with np.load(given) as stored:
        np.savez(out, **evaluate(suite, int(number), int(size), {int(trial): stored[trial] for trial in stored}))
