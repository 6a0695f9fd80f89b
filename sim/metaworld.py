"""One Meta-World task with pixels: what runs inside a simulation process.

Nothing here imports torch at run time, so a process full of environments stays small. ``sim.vector`` puts several of
these behind the ``Env`` contract. Import this module only after ``sim.gl.ensure_gl``: MuJoCo picks its GL at import.
"""

from __future__ import annotations

import copy
import difflib
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sim.tasks import phrasings

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

WORKSPACE_POSITION, WORKSPACE_TARGET, WORKSPACE_FOVY = (1.05, 0.22, 0.78), (0.0, 0.66, 0.13), 41.0
UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
"""Meta-World's corner cameras are mounted upside down; their pictures are turned by half a turn."""

THIN_CELL = 0.64
"""Robot meshes are drawn with one vertex per cell of ``THIN_CELL / image_size`` metres: about two thirds of a pixel."""

_BLACK = 8
"""A frame whose brightest value is below this came from a broken GL context."""


def _user_error(text: str) -> Exception:
    from data.types import UserError  # late: it imports torch, which simulation processes do without

    return UserError(text)


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise a UserError with the nearest known name unless ``name`` is one of ``known``."""
    known = tuple(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3) or known[:1]
        raise _user_error(f"unknown {kind} {name!r}, did you mean {near[0]!r}?")


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """What differs from the nominal simulator. The defaults change nothing.

    ``sim.stand_in`` uses it to make a robot stand-in out of the same tasks.
    """

    gain: float = 1.0
    """Hand displacement per unit of action, relative to nominal."""
    damping: float = 1.0
    """Joint damping, relative to nominal."""
    friction: float = 1.0
    """Sliding friction of every geom, relative to nominal."""
    mass: float = 1.0
    """Mass and inertia of every body, relative to nominal."""
    latency: int = 0
    """Control steps between commanding an action and its execution; before the first arrives the hand holds still."""
    camera_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Metres added to the camera's position; its orientation stays."""
    zoom: float = 1.0
    """Field of view, relative to nominal."""
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Red, green and blue intensity of every light, relative to nominal."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "camera_shift", tuple(self.camera_shift))
        object.__setattr__(self, "light", tuple(self.light))
        for name in ("gain", "damping", "friction", "mass", "zoom"):
            if not getattr(self, name) > 0:
                raise _user_error(f"perturbation {name} must be above 0, got {getattr(self, name)}")
        if self.latency < 0:
            raise _user_error(f"perturbation latency must be 0 or more control steps, got {self.latency}")
        if len(self.camera_shift) != 3 or len(self.light) != 3:
            raise _user_error("perturbation camera_shift and light need three numbers each")


@dataclass(frozen=True, kw_only=True)
class MetaWorldConfig:
    """How every task is simulated and seen."""

    camera: str = "workspace"
    image_size: int = 64
    action_repeat: int = 3
    """Simulator steps (1/80 s) per control step."""
    max_episode_steps: int = 50
    """Control steps until an episode is truncated."""
    perturbation: Perturbation = field(default_factory=Perturbation)
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
        for name in ("image_size", "action_repeat", "max_episode_steps"):
            if getattr(self, name) < 1:
                raise _user_error(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps_after_success < 0:
            raise _user_error(f"steps_after_success must be at least 0, got {self.steps_after_success}")
        if self.action_repeat * self.max_episode_steps > 500:
            raise _user_error(
                "action_repeat * max_episode_steps must be at most Meta-World's 500 steps, "
                f"got {self.action_repeat * self.max_episode_steps}"
            )

    @property
    def control_hz(self) -> float:
        """Control steps per second of simulated time."""
        return SIM_HZ / self.action_repeat


class Step(NamedTuple):
    """What one environment answers to ``reset`` or ``step``."""

    frame: np.ndarray
    """``[h, w, 3]`` uint8; empty without pixels."""
    proprio: np.ndarray
    """``[p]`` float32, named by ``PROPRIO`` or ``STATE``."""
    reward: float
    terminated: bool
    truncated: bool
    success: bool
    decided: bool
    """It has succeeded, now or before; with a dense reward nothing is ever decided."""
    time: float
    """Simulated seconds since the reset."""
    instruction: str


class MetaWorldTask:
    """One task, and a renderer where pixels are observed."""

    def __init__(self, task: str, config: MetaWorldConfig) -> None:
        import mujoco
        from metaworld import policies
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.task, self.config = task, config
        env = ALL_V3_ENVIRONMENTS[task]()
        env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
        env._partially_observable = False  # the scripted experts read the goal
        del env.sawyer_observation_space
        env.action_scale *= config.perturbation.gain
        _replace_scipy_rotation(env)
        _perturb(env.model, config)
        self._env, self._mujoco = env, mujoco
        self._expert_class = getattr(policies, _expert_name(task))
        self._plain = {key: copy.deepcopy(value) for key, value in vars(env).items() if _is_plain(value)}
        self._layout = {name: getattr(env.model, name).copy() for name in _LAYOUT}
        self._renderer = self._make_renderer() if config.observation == "pixels" else None
        self._camera = "corner2" if config.camera == "workspace" else config.camera

    def reset(self, seed: int) -> Step:
        """Start the episode that ``seed`` names: goal, object, instruction and all that follows depend on it alone."""
        env, model, data = self._env, self._env.model, self._env.data
        for key in [key for key, value in vars(env).items() if _is_plain(value) and key not in self._plain]:
            delattr(env, key)
        vars(env).update(copy.deepcopy(self._plain))
        for name, value in self._layout.items():
            getattr(model, name)[:] = value
        self._mujoco.mj_resetData(model, data)
        layout = seed if self.config.goal_seed is None else self.config.goal_seed
        random = np.random.Generator(np.random.Philox(key=[layout, zlib.crc32(self.task.encode())]))
        sentences = phrasings(self.task)
        self._instruction = sentences[int(random.integers(len(sentences)))]
        env.np_random = random
        self._state, _ = env.reset()
        self._mujoco.mj_forward(model, data)
        self._expert = self._expert_class()
        self._waiting = [np.zeros(len(ACTIONS), np.float32)] * self.config.perturbation.latency
        self._steps, self._succeeded, self._left = 0, False, self.config.steps_after_success
        return self._step(reward=0.0)

    def step(self, action: np.ndarray) -> Step:
        """Apply a normalised action ``[a]`` for ``action_repeat`` simulator steps, or until the task is done."""
        self._waiting.append(np.clip(action, -1, 1))
        executed = self._waiting.pop(0)
        self._steps += 1
        if self.config.reward == "dense":
            return self._dense_step(executed)
        done = False
        for _ in range(self.config.action_repeat):
            self._state, _, _, _, info = self._env.step(executed)
            done = bool(info["success"])
            if done and not self._succeeded:
                break
        self._left -= self._succeeded
        self._succeeded |= done
        return self._step(reward=float(done))

    def expert_action(self) -> np.ndarray:
        """Return the scripted expert's action ``[a]`` for the present state, clipped to [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that its own gains are too high
            return np.clip(self._expert.get_action(self._state), -1, 1).astype(np.float32)

    def close(self) -> None:
        """Free the GL context."""
        if self._renderer is not None:
            self._renderer.close()

    def _step(self, *, reward: float) -> Step:
        decided = self._succeeded and self.config.reward == "sparse"
        last = self._steps >= self.config.max_episode_steps
        state = self._state.astype(np.float32)
        drawn = self._renderer is not None
        return Step(
            frame=self._render() if drawn else _NO_FRAME, proprio=state[: len(PROPRIO)] if drawn else state,
            reward=reward, terminated=decided and (last or self._left <= 0), truncated=last and not decided,
            success=self._succeeded, decided=decided, time=self._env.curr_path_length / SIM_HZ,
            instruction=self._instruction)

    def _dense_step(self, executed: np.ndarray) -> Step:
        """Only the last repeat is looked at: Meta-World spends more time on looking than on physics."""
        for _ in range(self.config.action_repeat - 1):
            self._env.set_xyz_action(executed[:3])
            self._env.do_simulation([executed[3], -executed[3]], n_frames=self._env.frame_skip)
            self._env.curr_path_length += 1
        self._state, reward, _, _, info = self._env.step(executed)
        self._succeeded |= bool(info["success"])
        return self._step(reward=float(reward) / 10)

    def _make_renderer(self) -> Any:
        model, size = self._env.model, self.config.image_size
        _thin_meshes(model, THIN_CELL / size)
        quality, buffer = model.vis.quality, model.vis.global_
        quality.offsamples, quality.shadowsize = 0, 0  # the shadow map would be 64 MB and most of the time
        buffer.offwidth = buffer.offheight = size
        renderer = self._mujoco.Renderer(model, size, size)
        for flag in ("mjRND_SHADOW", "mjRND_REFLECTION"):
            renderer.scene.flags[getattr(self._mujoco.mjtRndFlag, flag)] = 0
        return renderer

    def _render(self) -> np.ndarray:
        assert self._renderer is not None, "state observations have no picture"
        self._renderer.update_scene(self._env.data, camera=self._camera)
        frame = self._renderer.render()
        if frame.max() < _BLACK:
            raise RuntimeError(f"{self.task} rendered a black frame: another renderer took over the GL context")
        return np.ascontiguousarray(frame[::-1, ::-1] if self.config.camera in UPSIDE_DOWN else frame)


_NO_FRAME = np.zeros((0, 0, 3), np.uint8)

_LAYOUT = ("body_pos", "body_quat", "site_pos", "site_quat", "geom_pos", "geom_quat", "site_rgba", "geom_rgba")
"""Model arrays that tasks move things by on reset."""


def _is_plain(value: Any) -> bool:
    """Attributes that an episode may change and that own their memory; views into MuJoCo's do not."""
    if isinstance(value, np.ndarray):
        return value.base is None
    return value is None or isinstance(value, (bool, int, float, np.generic))


def _expert_name(task: str) -> str:
    """Meta-World's class name, e.g. ``SawyerDrawerCloseV3Policy``; one task's class breaks the rule."""
    name = {"peg-insert-side-v3": "peg-insertion-side-v3"}.get(task, task)
    return "Sawyer" + "".join(part.capitalize() for part in name.split("-")) + "Policy"


def _replace_scipy_rotation(env: Any) -> None:
    """Put MuJoCo's matrix-to-quaternion in place of SciPy's in this task's module: same numbers, 10x the speed."""
    import sys

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


def _perturb(model: Any, config: MetaWorldConfig) -> None:
    """Write dynamics, camera pose and light of ``config`` into the model."""
    change = config.perturbation
    model.dof_damping[:] *= change.damping
    model.geom_friction[:, 0] *= change.friction
    model.body_mass[:] *= change.mass
    model.body_inertia[:] *= change.mass
    for colours in (model.light_diffuse, model.light_ambient, model.light_specular):
        colours[:] *= np.asarray(change.light)
    for name in ("diffuse", "ambient", "specular"):
        colour = getattr(model.vis.headlight, name)
        colour[:] = colour * np.asarray(change.light)
    if config.camera == "workspace":
        camera = model.camera("corner2").id
        model.cam_pos[camera] = WORKSPACE_POSITION
        model.cam_quat[camera] = _look_at(WORKSPACE_POSITION, WORKSPACE_TARGET)
        model.cam_fovy[camera] = WORKSPACE_FOVY
    else:
        camera = model.camera(config.camera).id
    model.cam_pos[camera] += np.asarray(change.camera_shift)
    model.cam_fovy[camera] *= change.zoom


def _look_at(position: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """Quaternion of a camera at ``position`` that looks at ``target`` with up upwards (MuJoCo: along -z, y up)."""
    import mujoco

    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(backward, right), backward], axis=1).ravel())
    return quaternion


def _thin_meshes(model: Any, cell: float) -> None:
    """Draw detailed meshes with one vertex per ``cell`` metres; physics, which reads hulls, does not change.

    Software GL spends its time on vertices: the arm alone has 60,000 triangles for a picture of 4,096 pixels.
    """
    for mesh in range(model.nmesh):
        start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        if count < 2000:
            continue
        vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
        cells = np.floor(vertices / cell).astype(np.int64)
        _, first, cluster = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        corners = np.sort(cluster.reshape(-1)[model.mesh_face[start : start + count]], axis=1)
        whole = np.flatnonzero((corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]))
        _, kept = np.unique(corners[whole], axis=0, return_index=True)
        kept = start + whole[np.sort(kept)]
        end = start + len(kept)
        model.mesh_face[start:end] = first[cluster.reshape(-1)[model.mesh_face[kept]]]
        model.mesh_facenormal[start:end] = model.mesh_facenormal[kept]
        model.mesh_facetexcoord[start:end] = model.mesh_facetexcoord[kept]
        model.mesh_facenum[mesh] = len(kept)

