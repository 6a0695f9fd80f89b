"""One Meta-World task with pixels: what runs inside a simulation process.

Nothing here imports torch, so a process full of environments stays small. Import this module only after
``sim.gl.ensure_gl``: MuJoCo picks its GL at import.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
from metaworld import policies
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from sim.metaworld import ACTIONS, PROPRIO, SIM_HZ, UPSIDE_DOWN, MetaWorldConfig
from sim.metaworld_scene import Scene
from sim.perturbation import Perturbation, draw
from sim.task import Progress, Step
from sim.tasks import phrasings

_BLACK = 8
"""A frame whose brightest value is below this came from a broken GL context."""


class MetaWorldTask:
    """One task, and a renderer where pixels are observed."""

    def __init__(self, task: str, config: MetaWorldConfig) -> None:
        self.task, self.config = task, config
        env = ALL_V3_ENVIRONMENTS[task]()
        env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
        env._partially_observable = False  # the scripted experts read the goal
        del env.sawyer_observation_space
        _replace_scipy_rotation(env)
        self._env = env
        self._scene = Scene(env.model, config.camera, config.image_size if config.observation == "pixels" else None)
        self._expert_class = getattr(policies, _expert_name(task))
        self._plain = {key: copy.deepcopy(value) for key, value in vars(env).items() if _is_own(value)}
        self._layout = {name: getattr(env.model, name).copy() for name in _LAYOUT}
        space = env._random_reset_space
        self._reset_space = {bound: getattr(space, bound).copy() for bound in ("low", "high")}

    def perturb(self, perturbation: Perturbation) -> None:
        """From the next reset on."""
        self.config = dataclasses.replace(self.config, perturbation=perturbation)

    def reset(self, seed: int) -> Step:
        """Start the episode that ``seed`` names: goal, object, instruction and all that follows depend on it alone."""
        env, model, data = self._env, self._env.model, self._env.data
        self._set_plain(copy.deepcopy(self._plain))
        for name, value in self._layout.items():
            getattr(model, name)[:] = value
        self._perturb(draw(self.config.perturbation, self.config.ranges(), seed))
        mujoco.mj_resetData(model, data)
        layout = seed if self.config.goal_seed is None else self.config.goal_seed
        random = np.random.Generator(np.random.Philox(key=[layout, zlib.crc32(self.task.encode())]))
        which = int(random.integers(len(phrasings(self.task))))
        sentences = phrasings(self.task, self._changed.phrasing)
        self._instruction = sentences[which % len(sentences)]
        env.np_random = random
        self._state, _ = env.reset()
        mujoco.mj_forward(model, data)
        self._expert = self._expert_class()
        self.progress = Progress(
            waiting=np.zeros((self._changed.latency, len(ACTIONS)), np.float32), seed=seed,
            left=self.config.steps_after_success, limit=self.config.max_episode_steps)
        return self._step()

    def step(self, action: np.ndarray) -> Step:
        """Apply a normalised action ``[a]`` for ``action_repeat`` simulator steps, or until the task is done."""
        executed = self.progress.delay(action)
        if self.config.reward == "dense":
            return self._dense_step(executed)
        done = False
        for _ in range(self.config.action_repeat):
            self._state, _, _, _, info = self._env.step(executed)
            done = bool(info["success"])
            if done and not self.progress.succeeded:
                break
        self.progress.note(done)
        return self._step()

    def expert_action(self) -> np.ndarray:
        """Return the scripted expert's action ``[a]`` for the present state, clipped to [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that its own gains are too high
            return np.clip(self._expert.get_action(self._state), -1, 1).astype(np.float32)

    def snapshot(self) -> dict[str, Any]:
        """MuJoCo's integration state, what the task moved in the model, and what the Python side remembers."""
        env = self._env
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.zeros(mujoco.mj_stateSize(env.model, kind))
        mujoco.mj_getState(env.model, env.data, physics, kind)
        remembered = {f"env.{name}": value for name, value in vars(env).items() if _is_own(value)}
        arrays = {name: np.array(value) for name, value in remembered.items() if isinstance(value, _NUMPY)}
        return {
            "task": self.task, "progress": {**vars(self.progress), "waiting": self.progress.waiting.tolist()},
            "perturbation": dataclasses.asdict(self._changed), "instruction": self._instruction, "physics": physics,
            "state": self._state, **{f"model.{name}": getattr(env.model, name).copy() for name in _LAYOUT},
            **{name: value for name, value in remembered.items() if name not in arrays}, **arrays,
            "scalars": [name for name, value in remembered.items() if isinstance(value, np.generic)]}

    def restore(self, snapshot: Mapping[str, Any]) -> Step:
        """Go back to where ``snapshot`` was taken, bit for bit, here or in another environment of the same task."""
        env = self._env
        self._set_plain({
            name.removeprefix("env."): value[()] if name in snapshot["scalars"] else copy.copy(value)
            for name, value in snapshot.items() if name.startswith("env.")})
        self._perturb(Perturbation(**snapshot["perturbation"]), scale=False)
        for name in _LAYOUT:
            getattr(env.model, name)[:] = snapshot[f"model.{name}"]
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(env.model, env.data, snapshot["physics"], kind)
        mujoco.mj_forward(env.model, env.data)
        mujoco.mj_setState(env.model, env.data, snapshot["physics"], kind)  # mj_forward changed its warm start
        self._state, self._instruction = snapshot["state"].copy(), snapshot["instruction"]
        waiting = np.array(snapshot["progress"]["waiting"], np.float32).reshape(-1, len(ACTIONS))
        self.progress = Progress(**{**snapshot["progress"], "waiting": waiting})
        self._expert = self._expert_class()
        return self._step()

    def close(self) -> None:
        """Free the GL context."""
        self._scene.close()

    def _set_plain(self, values: Mapping[str, Any]) -> None:
        """Give the environment the plain attributes ``values``, and no others."""
        for key in [key for key, value in vars(self._env).items() if _is_own(value) and key not in values]:
            delattr(self._env, key)
        vars(self._env).update(values)

    def _perturb(self, change: Perturbation, *, scale: bool = True) -> None:
        """Play under ``change``; ``scale``: the environment's scale of actions is nominal still."""
        self._changed = change
        self._scene.apply(change)
        if scale:
            self._env.action_scale *= change.gain
        for bound, values in self._reset_space.items():
            getattr(self._env._random_reset_space, bound)[:2] = values[:2] + np.asarray(change.object_shift)

    def _step(self) -> Step:
        state = self._state.astype(np.float32)
        drawn = self.config.observation == "pixels"
        return Step(
            frame=self._render() if drawn else _NO_FRAME, proprio=state[: len(PROPRIO)] if drawn else state,
            reward=self.progress.reward, **self.progress.flags(decides=self.config.reward == "sparse"),
            time=self._env.curr_path_length / SIM_HZ, instruction=self._instruction)

    def _dense_step(self, executed: np.ndarray) -> Step:
        """Only the last repeat is looked at: Meta-World spends more time on looking than on physics."""
        for _ in range(self.config.action_repeat - 1):
            self._env.set_xyz_action(executed[:3])
            self._env.do_simulation([executed[3], -executed[3]], n_frames=self._env.frame_skip)
            self._env.curr_path_length += 1
        self._state, reward, _, _, info = self._env.step(executed)
        self.progress.succeeded |= bool(info["success"])
        self.progress.reward = float(reward) / 10
        return self._step()

    def _render(self) -> np.ndarray:
        frame = self._scene.render(self._env.data)
        if frame.max() < _BLACK:
            raise RuntimeError(f"{self.task} rendered a black frame: another renderer took over the GL context")
        return np.ascontiguousarray(frame[::-1, ::-1] if self.config.camera in UPSIDE_DOWN else frame)


_NO_FRAME = np.zeros((0, 0, 3), np.uint8)

_LAYOUT = ("body_pos", "body_quat", "site_pos", "site_quat", "geom_pos", "geom_quat", "site_rgba", "geom_rgba")
"""Model arrays that tasks move things by on reset."""

_NUMPY = (np.ndarray, np.generic)


def _is_own(value: Any) -> bool:
    """Attributes that an episode may change and that are the environment's own; views into MuJoCo's memory are not."""
    while isinstance(value, np.ndarray) and value.base is not None:
        value = value.base
    return value is None or isinstance(value, (bool, int, float, *_NUMPY))


def _expert_name(task: str) -> str:
    """Meta-World's class name, e.g. ``SawyerDrawerCloseV3Policy``; one task's class breaks the rule."""
    name = {"peg-insert-side-v3": "peg-insertion-side-v3"}.get(task, task)
    return "Sawyer" + "".join(part.capitalize() for part in name.split("-")) + "Policy"


def _replace_scipy_rotation(env: Any) -> None:
    """Put MuJoCo's matrix-to-quaternion in place of SciPy's in this task's module: same numbers, 10x the speed."""
    class Rotation:
        wxyz: np.ndarray

        @staticmethod
        def from_matrix(matrix: np.ndarray) -> Any:
            rotation = Rotation()
            rotation.wxyz = np.zeros(4)
            mujoco.mju_mat2Quat(rotation.wxyz, np.ascontiguousarray(matrix, np.float64).ravel())
            return rotation

        def as_quat(self) -> np.ndarray:
            return self.wxyz[[1, 2, 3, 0]]

    module: Any = sys.modules[type(env).__module__]
    if hasattr(module, "Rotation"):
        module.Rotation = Rotation
