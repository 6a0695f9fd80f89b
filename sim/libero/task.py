"""One LIBERO task in its own environment: episodes, pictures, snapshots. See ``simulator`` for where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from libero.libero.envs import OffScreenRenderEnv
from PIL import Image
from robosuite.utils.observables import sensor
from robosuite.utils.transform_utils import quat2axisangle

from sim.libero.expert import pick_and_place
from sim.libero.phrasing import phrase
from sim.libero.scene import Scene
from sim.remote.protocol import Answers

CONTROL_HZ = 20.0
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""Our names and robosuite's."""
ACTIONS = ("hand_dx", "hand_dy", "hand_dz", "hand_rx", "hand_ry", "hand_rz", "gripper_closing")
"""Operational space control: 1 asks for a pose 0.05 m, or 0.5 rad about an axis, from where the hand is. Gripper: -1
opens, 1 closes."""
PROPRIO = {"hand_x_m": (-0.05, 0.15), "hand_y_m": (0.0, 0.15), "hand_z_m": (0.6, 0.5), "hand_rx_rad": (3.0, 0.5),
           "hand_ry_rad": (0.0, 0.5), "hand_rz_rad": (0.0, 0.5), "finger_left_m": (0.03, 0.02),
           "finger_right_m": (-0.03, 0.02)}
"""Name, and the mean and deviation that it is standardised by: the size of the suites' workspaces. The hand's rotation
is a rotation vector. OpenVLA-OFT and LIBERO's demonstrations have these eight numbers in this order."""
REST = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
"""The action while everything comes to rest."""
_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_PLACES = ("body_pos", "body_quat", "site_rgba", "site_pos")
"""Model arrays in which LIBERO places furniture and lights the stove, and we move regions of the table."""
_BLACK = 8
"""A frame whose brightest value is below this came from a broken GL context."""


@dataclass(frozen=True)
class Settings:
    """How a task is simulated and seen: ``sim.libero.env.LiberoConfig``, complete."""

    cameras: list[str]
    image_size: int
    render_size: int
    fast_rendering: bool
    wait_steps: int
    max_episode_steps: int
    steps_after_success: int
    training_states: str


class LiberoTask:
    """One row. ``reset`` comes first."""

    def __init__(self, suite: Any, number: int, settings: Settings) -> None:
        """``suite``: LIBERO's benchmark; ``number``: of the task in it."""
        task = suite.get_task(number)
        self.name, self.sentence, self._settings = task.name, task.language, settings
        self._initial_states = suite.get_task_init_states(number)
        self._libero = OffScreenRenderEnv(
            bddl_file_name=suite.get_task_bddl_file_path(number), camera_heights=settings.render_size,
            camera_widths=settings.render_size, camera_names=[CAMERAS[camera] for camera in settings.cameras])
        self._env, self._sim = self._libero.env, self._libero.sim
        self._env.hard_reset = False  # it compiles the model again, for 2.8 s; ``_begin`` does the rest
        self._sim.reset, self._clear = self._begin, self._sim.reset
        self._scene = Scene(self._env, settings.render_size if settings.fast_rendering else None)
        self._changes: Mapping[str, Any] = {}
        self._draws = False
        for camera in settings.cameras:
            self._env.modify_observable(f"{CAMERAS[camera]}_image", "sensor", self._sensor(CAMERAS[camera]))
        self._generators: list[Any] = []
        """NumPy's global generator as it is before the benchmark's reset of trial 0, 1, ..., as far as was needed."""

    def perturb(self, changes: Mapping[str, Any]) -> None:
        """Differ from nominal by ``changes``, as in ``sim.perturbation``; a reset or a restore comes next."""
        self._changes = changes
        self._scene.apply(changes)

    def reset(self, seed: int, *, training: bool) -> None:
        """Begin the episode that ``seed`` names, and wait until all is at rest."""
        rest = self._settings.wait_steps
        self._name_task(seed)
        if training and self._settings.training_states == "sampled":
            self._libero.seed(seed % 2**32)
            observation = self._look(self._libero.reset, draw=rest == 0)
        else:
            trial = seed % len(self._initial_states)
            self._reset_like_trial(trial)
            observation = self._look(self._libero.set_init_state, self._initial_states[trial], draw=rest == 0)
        if "object_shift" in self._changes:
            self._scene.shift_objects(np.array(self._changes["object_shift"]))
            observation = self._look(self._libero.set_init_state, self._libero.get_sim_state(), draw=rest == 0)
        if "gain" in self._changes:
            controller = self._env.robots[0].controller  # a new one since the reset
            controller.output_max = controller.output_max * self._changes["gain"]
            controller.output_min = controller.output_min * self._changes["gain"]
        self._waiting = [REST] * self._changes.get("latency", 0)
        for step in range(rest):
            observation, _, _, _ = self._look(self._libero.step, REST, draw=step == rest - 1)
        self._steps, self._left, self._succeeded, self._reward = 0, self._settings.steps_after_success, False, 0.0
        self._see(observation)

    def step(self, action: np.ndarray) -> None:
        """One control step."""
        self._waiting.append(action.astype(np.float64))
        observation, _, done, _ = self._look(self._libero.step, self._waiting.pop(0), draw=True)
        self._steps += 1
        self._left -= self._succeeded
        self._succeeded |= bool(done)
        self._reward = float(done)
        self._see(observation)

    def show(self, answers: Answers, row: int) -> None:
        """Write what was last seen."""
        for camera, frame in self._frames.items():
            answers.frames[camera][row] = frame
        last = self._steps >= self._settings.max_episode_steps
        answers.proprio[row], answers.reward[row] = self._proprio, self._reward
        answers.success[row] = answers.decided[row] = self._succeeded
        answers.terminated[row] = self._succeeded and (last or self._left <= 0)
        answers.truncated[row] = last and not self._succeeded
        answers.time[row] = self._steps / CONTROL_HZ

    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now. Raises ``BadInputError`` for a task that has none."""
        return pick_and_place(self._env)

    def snapshot(self) -> dict[str, np.ndarray]:
        """All that decides how the episode goes on, and what it shows now."""
        model, data = self._sim.model._model, self._sim.data._data
        state = np.zeros(mujoco.mj_stateSize(model, _STATE))
        mujoco.mj_getState(model, data, state, _STATE)
        clocks = [(each._time_since_last_sample, each._sampled) for each in self._env._observables.values()]
        return {
            "state": state, "clocks": np.array(clocks, np.float64),
            **{name: getattr(model, name).copy() for name in _PLACES},
            **{f"controller/{name}": np.array(value) for name, value in _numbers(self._env.robots[0].controller)},
            "gripper": np.array(self._env.robots[0].gripper.current_action, np.float64),
            "counters": np.array([self._env.timestep, self._steps, self._left, self._succeeded, self._reward]),
            "seed": np.array(self._seed), "waiting": np.reshape(self._waiting, (-1, len(ACTIONS))),
            **{f"frames/{camera}": frame for camera, frame in self._frames.items()}, "proprio": self._proprio}

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go on from a snapshot of this task that was taken under the present changes, bit for bit."""
        model, data = self._sim.model._model, self._sim.data._data
        for name in _PLACES:
            getattr(model, name)[:] = snapshot[name]
        mujoco.mj_setState(model, data, snapshot["state"], _STATE)
        mujoco.mj_forward(model, data)  # for the expert; it moves what the solver starts from, so set that again
        mujoco.mj_setState(model, data, snapshot["state"], _STATE)
        for each, (since, sampled) in zip(self._env._observables.values(), snapshot["clocks"], strict=True):
            each._time_since_last_sample, each._sampled = float(since), bool(sampled)
        robot = self._env.robots[0]
        for name, value in _numbers(robot.controller):
            setattr(robot.controller, name, type(value)(snapshot[f"controller/{name}"]) if np.ndim(value) == 0
                    else snapshot[f"controller/{name}"].copy())
        robot.gripper.current_action = snapshot["gripper"].copy()
        steps, self._steps, self._left, succeeded, self._reward = snapshot["counters"].tolist()
        self._env.timestep, self._succeeded, self._env.done = int(steps), bool(succeeded), False
        self._frames = {camera: snapshot[f"frames/{camera}"] for camera in self._settings.cameras}
        self._proprio = snapshot["proprio"]
        self._waiting = list(snapshot["waiting"])
        self._name_task(int(snapshot["seed"]))

    def close(self) -> None:
        """Free the GL context."""
        self._libero.close()

    def _reset_like_trial(self, trial: int) -> None:
        """Reset as the benchmark's evaluation does before ``trial``: it seeds once, so furniture differs by trial."""
        if not self._generators:
            self._libero.seed(0)
            self._generators.append(np.random.get_state())
        while len(self._generators) <= trial:
            np.random.set_state(self._generators[-1])
            self._libero.reset()
            self._generators.append(np.random.get_state())
        np.random.set_state(self._generators[trial])
        self._libero.reset()

    def _begin(self) -> None:
        """Leave all as a hard reset does: the gripper, furniture where its file has it, the solver warmed up twice."""
        self._clear()
        gripper = self._env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        self._scene.reset()
        for _ in range(2):  # one by the simulation, one by the renderer that a hard reset makes
            self._sim.forward()

    def _name_task(self, seed: int) -> None:
        self._seed, self.instruction = seed, phrase(self.sentence, self._changes.get("phrasing", "usual"), seed)

    def _look(self, call: Any, *arguments: Any, draw: bool) -> Any:
        """Call LIBERO; pictures that it takes meanwhile are drawn only if asked for."""
        self._draws = draw
        try:
            return call(*arguments)
        finally:
            self._draws = False

    def _sensor(self, camera: str) -> Any:
        size, context = self._settings.render_size, self._sim._render_context_offscreen
        blank = np.zeros((size, size, 3), np.uint8)

        @sensor(modality="image")
        def draw(observed: Any) -> np.ndarray:
            if not self._draws:
                return blank
            context.gl_ctx.make_current()  # another row's may be
            frame = self._sim.render(width=size, height=size, camera_name=camera)
            if frame.max() < _BLACK:
                raise RuntimeError(f"{self.name} rendered a black frame of {camera}: another renderer took its context")
            return frame

        return draw

    def _see(self, observation: Mapping[str, np.ndarray]) -> None:
        """Take pictures and proprio over as OpenVLA-OFT does: by half a turn, and resized with Lanczos' filter."""
        self._frames = {camera: self._resized(observation[f"{CAMERAS[camera]}_image"][::-1, ::-1])
                        for camera in self._settings.cameras}
        self._proprio = np.concatenate([
            observation["robot0_eef_pos"], quat2axisangle(observation["robot0_eef_quat"].copy()),
            observation["robot0_gripper_qpos"]]).astype(np.float32)

    def _resized(self, frame: np.ndarray) -> np.ndarray:
        if self._settings.image_size == self._settings.render_size:
            return frame
        size = (self._settings.image_size, self._settings.image_size)
        return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.LANCZOS))


def _numbers(holder: Any) -> list[tuple[str, Any]]:
    """Attributes that are numbers, flags or numeric arrays."""
    return [(name, value) for name, value in vars(holder).items()
            if isinstance(value, (bool, int, float, np.generic))
            or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")]
