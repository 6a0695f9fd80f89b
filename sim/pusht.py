"""PushT: a disc pushes a T onto its outline, seen from above. Fast, and drawn without GL or a display.

The task of diffusion policy (arXiv 2303.04137) as the package ``gym-pusht`` has it. Its physics keeps contacts that
nobody can save, so a snapshot is the episode's seed and actions: to restore it is to play them again.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from data.types import Spec, Statistics, UserError
from sim.perturbation import Perturbation, Ranges, draw, fixed, ranges
from sim.pusht_expert import PushTExpert
from sim.task import Progress, Step, check_counts, check_name
from sim.tasks import phrasings

SIZE = 512
"""Side of the square world, in its own pixels."""

STATISTICS = Statistics(
    action_low=np.zeros(2, np.float32), action_high=np.full(2, SIZE, np.float32),
    proprio_mean=np.full(2, SIZE / 2, np.float32), proprio_std=np.full(2, 120, np.float32))
"""An action is where the disc shall go, in pixels of the world: as in the demonstrations that others have recorded."""


@dataclass(frozen=True, kw_only=True)
class PushTConfig:
    """How it is played and seen."""

    embodiment: ClassVar[str] = "pusht-disc"
    statistics: ClassVar[Statistics] = STATISTICS
    factors: ClassVar[frozenset[str]] = frozenset({
        "latency", "light", "table_colour", "object_colour", "object_shift", "phrasing"})

    image_size: int = 64
    max_episode_steps: int = 300
    """Control steps (0.1 s) until an episode is truncated."""
    perturbation: Perturbation = field(default_factory=Perturbation)
    """Or its factors by name, as a mapping; null is none."""
    randomise: str | Ranges | None = None
    """Ranges from which each episode's seed draws its perturbation (``sim.perturbation``), or their name."""
    steps_after_success: int = 0
    """Control steps that an episode goes on after it succeeded, as far as ``max_episode_steps`` allows."""

    def __post_init__(self) -> None:
        check_counts(self)
        object.__setattr__(self, "perturbation", fixed(self.perturbation, self.factors, simulator="PushT"))
        self.ranges()

    def ranges(self) -> Ranges:
        """What ``randomise`` says. UserError for what it cannot."""
        return ranges(self.randomise, self.factors, simulator="PushT")

    @property
    def spec(self) -> Spec:
        """What its rows show and take."""
        return Spec(cameras=("top",), image_size=self.image_size, proprio_names=("disc_x_px", "disc_y_px"),
                    action_names=("target_x_px", "target_y_px"), control_hz=10.0)

    def tasks(self, names: Iterable[str]) -> tuple[str, ...]:
        """There is one."""
        for name in names:
            check_name("task", name, ("pusht",))
        return ("pusht",)

    def prepare(self) -> str:
        """Keep pygame from looking for a display."""
        if any(importlib.util.find_spec(package) is None for package in ("gym_pusht", "pymunk", "pygame")):
            raise UserError("expected gym-pusht, which is not installed; type: pip install 'wm-rl[pusht]'")
        os.environ["SDL_VIDEODRIVER"], os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "dummy", "1"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                import gym_pusht.envs.pusht  # noqa: F401
        except ImportError as error:  # its cv2 wants libraries of the system
            raise UserError(f"gym-pusht does not load ({error}); type: apt-get install libgl1 libglib2.0-0") from error
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("gym-pusht", "pymunk"))

    def make(self, task: str) -> PushTTask:
        """Build one environment."""
        return PushTTask(self)


class PushTTask:
    """One world. The reward is 1 at the control step that covers 95 % of the outline, which decides the episode."""

    def __init__(self, config: PushTConfig) -> None:
        from gym_pusht.envs.pusht import PushTEnv

        self.config = config
        self._env, self._trial = PushTEnv(obs_type="state"), PushTEnv(obs_type="state")
        self._trial.reset()

    def perturb(self, perturbation: Perturbation) -> None:
        """From the next reset on."""
        self.config = dataclasses.replace(self.config, perturbation=perturbation)

    def reset(self, seed: int) -> Step:
        """Start the episode that ``seed`` names, which begins as ``gym-pusht``'s own do."""
        self._begin(seed, draw(self.config.perturbation, self.config.ranges(), seed))
        return self._step()

    def step(self, action: np.ndarray) -> Step:
        """Let the disc run for 0.1 s to where the normalised action ``[2]`` wants it."""
        self._play(action)
        return self._step()

    def expert_action(self) -> np.ndarray:
        """Return the scripted expert's action ``[2]`` for the present state."""
        target = self._expert.action().astype(np.float32)
        return np.clip(STATISTICS.normalise(target), -1, 1)

    def snapshot(self) -> dict[str, Any]:
        """Seed, perturbation and actions."""
        return {"task": "pusht", "progress": {"seed": self.progress.seed, "steps": self.progress.steps},
                "perturbation": dataclasses.asdict(self._changed),
                "actions": np.reshape(np.asarray(self._actions, np.float32), (-1, 2))}

    def restore(self, snapshot: Mapping[str, Any]) -> Step:
        """Play the episode of ``snapshot`` again as far as it went."""
        self._begin(snapshot["progress"]["seed"], Perturbation(**snapshot["perturbation"]))
        for action in snapshot["actions"]:
            self._play(action)
        return self._step()

    def close(self) -> None:
        """Nothing is open: it draws in memory."""

    def _begin(self, seed: int, change: Perturbation) -> None:
        random = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"pusht")]))
        which = int(random.integers(len(phrasings("pusht"))))
        sentences = phrasings("pusht", change.phrasing)
        self._instruction, self._changed = sentences[which % len(sentences)], change
        disc, block, angle = random.integers(50, 450, 2), random.integers(100, 400, 2), random.uniform(-np.pi, np.pi)
        moved = block + np.asarray(change.object_shift) * SIZE
        self._env.reset(options={"reset_to_state": [*disc.tolist(), *moved.tolist(), angle]})
        holds = 2 * disc / SIZE - 1
        self.progress = Progress(waiting=np.tile(holds.astype(np.float32), (change.latency, 1)), seed=seed,
                                 left=self.config.steps_after_success, limit=self.config.max_episode_steps)
        self._actions: list[np.ndarray] = []
        self._expert = PushTExpert(self._env, self._trial)

    def _play(self, action: np.ndarray) -> None:
        self._actions.append(np.array(action, np.float32))
        target = STATISTICS.denormalise(self.progress.delay(action))
        _, _, done, _, _ = self._env.step(target.astype(np.float64))
        self.progress.note(bool(done))

    def _step(self) -> Step:
        return Step(frame=self._draw(), proprio=np.array(self._env.agent.position, np.float32),
                    reward=self.progress.reward, **self.progress.flags(), time=self.progress.steps / 10,
                    instruction=self._instruction)

    def _draw(self) -> np.ndarray:
        """Draw as ``gym-pusht`` does, in the colours of the perturbation, scaled down by averaging."""
        import pygame
        from gym_pusht.envs.pymunk_override import DrawOptions

        env, change = self._env, self._changed
        screen = pygame.Surface((SIZE, SIZE))
        screen.fill(np.clip(255 * np.asarray(change.table_colour), 0, 255))
        goal = env.get_goal_pose_body(env.goal_pose)
        for shape in env.block.shapes:
            pygame.draw.polygon(screen, "LightGreen", [goal.local_to_world(corner) for corner in shape.get_vertices()])
            shape.color = (*np.clip(_T_COLOUR * change.object_colour, 0, 255).astype(int).tolist(), 255)
        env.space.debug_draw(DrawOptions(screen))
        size = (self.config.image_size, self.config.image_size)
        pixels = pygame.surfarray.array3d(pygame.transform.smoothscale(screen, size)).transpose(1, 0, 2)
        return np.clip(pixels * np.asarray(change.light), 0, 255).astype(np.uint8)


_T_COLOUR = np.array([119, 136, 153])
