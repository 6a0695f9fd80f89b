"""One Meta-World task with pixels: what runs inside a simulation process.

Nothing here imports torch at run time. ``MetaWorldTask`` imports MuJoCo, which picks its GL then: call
``sim.gl.ensure_gl`` before.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
import sys
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from data.types import Spec, Statistics, UserError
from sim.gl import ensure_gl
from sim.perturbation import FACTORS, Perturbation, Ranges, draw, fixed, ranges
from sim.task import Progress, Step, check_counts, check_name
from sim.tasks import MIXES, TASKS, phrasings

CAMERAS = ("workspace", "topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
"""``workspace`` is ours, and looks closely at the table from the robot's right; the others are Meta-World's."""

SIM_HZ = 80.0
"""Meta-World's own steps per second of simulated time."""

PROPRIO = ("hand_x_m", "hand_y_m", "hand_z_m", "gripper_opening_fraction")
_OBJECTS = tuple(f"object{i}_{part}" for i in (1, 2) for part in ("x_m", "y_m", "z_m", "qx", "qy", "qz", "qw"))
STATE = (*PROPRIO, *_OBJECTS, *(f"previous_{name}" for name in (*PROPRIO, *_OBJECTS)), "goal_x_m", "goal_y_m",
         "goal_z_m")
"""Meta-World's own observation, with the goal: what no robot has."""
ACTIONS = ("hand_dx", "hand_dy", "hand_dz", "gripper_closing")

STATISTICS = Statistics(
    action_low=np.full(4, -1, np.float32),
    action_high=np.full(4, 1, np.float32),
    proprio_mean=np.array([0.0, 0.6, 0.2, 0.6], np.float32),
    proprio_std=np.array([0.1, 0.12, 0.1, 0.35], np.float32),
)
"""Meta-World's actions are normalised already; proprio is scaled by the size of the workspace. Fixed, so that the
simulator and the robot stand-in share one store."""

_SCALES = {"x_m": (0.0, 0.15), "y_m": (0.6, 0.15), "z_m": (0.2, 0.15), "fraction": (0.6, 0.35)}
"""Mean and deviation of a state by the end of its name; quaternions stay as they are."""
_MEAN, _STD = np.array([next((scale for end, scale in _SCALES.items() if name.endswith(end)), (0.0, 1.0))
                        for name in STATE], np.float32).T
STATE_STATISTICS = Statistics(action_low=STATISTICS.action_low, action_high=STATISTICS.action_high,
                              proprio_mean=_MEAN.copy(), proprio_std=_STD.copy())
"""Of Meta-World's own observation."""

UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
"""Meta-World's corner cameras are mounted upside down; their pictures are turned by half a turn."""

_BLACK = 8
"""A frame whose brightest value is below this came from a broken GL context."""


@dataclass(frozen=True, kw_only=True)
class MetaWorldConfig:
    """How every task is simulated and seen."""

    embodiment: ClassVar[str] = "metaworld-sawyer"
    factors: ClassVar[frozenset[str]] = FACTORS

    camera: str = "workspace"
    image_size: int = 64
    action_repeat: int = 3
    """Simulator steps (1/80 s) per control step."""
    max_episode_steps: int = 50
    """Control steps until an episode is truncated."""
    perturbation: Perturbation = field(default_factory=Perturbation)
    """Or its factors by name, as a mapping; null is none."""
    randomise: str | Ranges | None = None
    """Ranges from which each episode's seed draws its perturbation (``sim.perturbation``), or their name."""
    observation: str = "pixels"
    """``pixels``: a picture and ``PROPRIO``. ``state``: no picture, and ``STATE`` as proprio."""
    reward: str = "sparse"
    """``sparse``: 1 at the control step that succeeds, which terminates. ``dense``: Meta-World's own, divided by its
    maximum of 10, at the last repeat; nothing terminates, and an episode that once succeeded has succeeded."""
    steps_after_success: int = 0
    """Control steps that a sparse episode goes on after it succeeded, as far as ``max_episode_steps`` allows: what
    success looks like, for a world model. Their reward is 1 while the task is still done."""
    goal_seed: int | None = None
    """Draws goal and objects alike for every episode; null: an episode's own seed does."""

    def __post_init__(self) -> None:
        check_name("camera", self.camera, CAMERAS)
        check_name("observation", self.observation, ("pixels", "state"))
        check_name("reward", self.reward, ("sparse", "dense"))
        check_counts(self)
        if self.action_repeat < 1:
            raise UserError(f"action_repeat must be at least 1, got {self.action_repeat}")
        if self.action_repeat * self.max_episode_steps > 500:
            raise UserError(
                "action_repeat * max_episode_steps must be at most Meta-World's 500 steps, "
                f"got {self.action_repeat * self.max_episode_steps}"
            )
        object.__setattr__(self, "perturbation", fixed(self.perturbation, self.factors, simulator="Meta-World"))
        self.ranges()

    def ranges(self) -> Ranges:
        """What ``randomise`` says. UserError for what it cannot."""
        return ranges(self.randomise, self.factors, simulator="Meta-World")

    @property
    def spec(self) -> Spec:
        """What its rows show and take."""
        pixels = self.observation == "pixels"
        return Spec(cameras=(self.camera,) if pixels else (), image_size=self.image_size,
                    proprio_names=PROPRIO if pixels else STATE, action_names=ACTIONS,
                    control_hz=SIM_HZ / self.action_repeat)

    @property
    def statistics(self) -> Statistics:
        """Of its actions and proprio."""
        return STATISTICS if self.observation == "pixels" else STATE_STATISTICS

    def tasks(self, names: Iterable[str]) -> tuple[str, ...]:
        """Tasks by name; ``mt10``, ``mt25`` and ``mt50`` are Meta-World's mixes."""
        tasks = tuple(dict.fromkeys(task for name in names for task in MIXES.get(name, (name,))))
        for task in tasks:
            check_name("task", task, (*TASKS, *MIXES))
        return tasks

    def prepare(self) -> str:
        """Choose a GL, before MuJoCo is imported, even if nothing is drawn here: the next environment may."""
        if importlib.util.find_spec("metaworld") is None or importlib.util.find_spec("mujoco") is None:
            raise UserError("expected Meta-World, which is not installed; type: pip install 'wm-rl[metaworld]'")
        try:
            ensure_gl()
        except UserError:
            if self.observation == "pixels":
                raise
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("metaworld", "mujoco"))

    def make(self, task: str) -> MetaWorldTask:
        """Build one environment."""
        return MetaWorldTask(task, self)


class MetaWorldTask:
    """One task, and a renderer where pixels are observed."""

    def __init__(self, task: str, config: MetaWorldConfig) -> None:
        import mujoco
        from metaworld import policies
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        from sim.metaworld_scene import Scene

        self.task, self.config = task, config
        env = ALL_V3_ENVIRONMENTS[task]()
        env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
        env._partially_observable = False  # the scripted experts read the goal
        del env.sawyer_observation_space
        _replace_scipy_rotation(env)
        self._env, self._mujoco = env, mujoco
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
        self._mujoco.mj_resetData(model, data)
        layout = seed if self.config.goal_seed is None else self.config.goal_seed
        random = np.random.Generator(np.random.Philox(key=[layout, zlib.crc32(self.task.encode())]))
        which = int(random.integers(len(phrasings(self.task))))
        sentences = phrasings(self.task, self._changed.phrasing)
        self._instruction = sentences[which % len(sentences)]
        env.np_random = random
        self._state, _ = env.reset()
        self._mujoco.mj_forward(model, data)
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
        mujoco, env = self._mujoco, self._env
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
        mujoco, env = self._mujoco, self._env
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
    import mujoco

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
