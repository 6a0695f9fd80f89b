"""Meta-World: what can be set, seen and commanded. ``sim.metaworld_task`` plays it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from data.types import Spec, Statistics, UserError
from sim.gl import ensure_gl
from sim.perturbation import FACTORS, Perturbation, Ranges, fixed, ranges
from sim.task import Task, check_counts, check_name
from sim.tasks import MIXES, TASKS

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

    def make(self, task: str) -> Task:
        """Build one environment."""
        from sim.metaworld_task import MetaWorldTask  # late: it imports MuJoCo, which picks its GL then

        return MetaWorldTask(task, self)
