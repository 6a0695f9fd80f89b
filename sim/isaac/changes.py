"""By what rows of an Isaac Lab task differ from its nominal form: what can be changed without touching its assets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sim.isaac.config import IsaacConfig
from sim.remote.protocol import BadInputError
from sim.tasks import wordy

_NOWHERE = (0.0, 0.0, 0.0)


class Changes:
    """The factors of ``sim.perturbation.Perturbation`` that the configuration makes possible, by row."""

    def __init__(self, env: Any, config: IsaacConfig, shift_objects: Callable[..., Any] | None) -> None:
        """``env``: once it was reset; ``shift_objects``: see ``IsaacConfig.object_shift``.

        Raises:
            BadInputError: ``hold_still`` is no action of the task.
        """
        count, width = env.num_envs, env.single_action_space.shape[0]
        self._env, self._config, self._shift_objects = env, config, shift_objects
        still = config.hold_still
        if still is not None and len(still) != width:
            raise BadInputError(f"expected {width} numbers in env.config.hold_still for {config.task}, got "
                                f"{list(still)}")
        self._still = np.array(still or [0.0] * width, np.float32)
        self._camera: Any = env.scene.sensors[config.still_camera] if config.still_camera else None
        if self._camera is not None:  # here and not later: looking at a sensor's data counts as having drawn it
            seen = self._camera.data
            self._camera_at, self._camera_turned = (
                getattr(value, "torch", value).clone() for value in (seen.pos_w, seen.quat_w_opengl))
        possible = {("light",): bool(config.cameras), ("camera_shift", "camera_turn"): self._camera is not None,
                    ("gain", "latency"): still is not None, ("object_shift",): shift_objects is not None,
                    ("phrasing",): bool(config.held_out_instructions)}
        self.factors = sorted(factor for factors, is_possible in possible.items() if is_possible for factor in factors)
        self._changes: list[Mapping[str, Any]] = [{}] * count
        self._light, self._gain = np.ones((count, 3), np.float32), np.ones((count, 1), np.float32)
        self._waiting: list[list[np.ndarray]] = [[] for _ in range(count)]
        """Actions that were commanded and not yet executed."""
        self._moved: set[int] = set()
        """Rows whose camera does not stand where it does nominally."""

    def set(self, row: int, changes: Mapping[str, Any]) -> None:
        """From the next reset on."""
        self._changes[row] = changes

    def begin(self, rows: np.ndarray) -> None:
        """Episodes have begun in ``rows``, which nothing has yet looked at."""
        for row in rows.tolist():
            changes = self._changes[row]
            self._light[row], self._gain[row] = changes.get("light", 1.0), changes.get("gain", 1.0)
            self._waiting[row] = [self._still] * changes.get("latency", 0)
            if "object_shift" in changes:
                assert self._shift_objects is not None
                self._shift_objects(self._env, self._tensor([row], torch.int32), self._tensor(
                    [changes["object_shift"]]))
            moves = bool({"camera_shift", "camera_turn"} & changes.keys())
            if moves or row in self._moved:
                self._move_camera(row, changes.get("camera_shift", _NOWHERE), changes.get("camera_turn", _NOWHERE))
                self._moved = self._moved | {row} if moves else self._moved - {row}

    def execute(self, commanded: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """What the rows of ``mask`` do now, normalised float32 ``[n, a]``, while what is late waits its turn."""
        executed = commanded.copy()
        for row in np.flatnonzero(mask & np.array([bool(waiting) for waiting in self._waiting])):
            self._waiting[row].append(executed[row].copy())
            executed[row] = self._waiting[row].pop(0)
        changed = self._gain[:, 0] != 1
        if changed.any():
            scaled = self._still + self._gain * (executed - self._still)
            executed[changed] = np.clip(scaled, -1, 1)[changed]
        return executed

    def show(self, frames: np.ndarray) -> np.ndarray:
        """Pictures uint8 ``[n, h, w, 3]`` under each row's light."""
        if (self._light == 1).all():
            return frames
        return np.clip(frames * self._light[:, None, None], 0, 255).astype(np.uint8)

    def sentences(self, row: int) -> list[str]:
        """Those that the row's instruction is one of."""
        phrasing = self._changes[row].get("phrasing", "usual")
        if phrasing == "usual":
            return list(self._config.instructions)
        held_out = list(self._config.held_out_instructions)
        return held_out if phrasing == "held_out" else [wordy(sentence) for sentence in held_out]

    def _move_camera(self, row: int, shift: Sequence[float], turn: Sequence[float]) -> None:
        """By metres, and by degrees about its own x, y and z: right, up and backwards."""
        turned = self._camera_turned[[row]]
        for axis, degrees in enumerate(turn):
            if degrees:
                from isaaclab.utils.math import quat_from_angle_axis, quat_mul

                turned = quat_mul(turned, quat_from_angle_axis(
                    self._tensor([math.radians(degrees)]), self._tensor(np.eye(3)[[axis]])))
        self._camera.set_world_poses(positions=self._camera_at[[row]] + self._tensor([shift]), orientations=turned,
                                     env_ids=[row], convention="opengl")

    def _tensor(self, values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self._env.device)
