"""A scripted expert for PushT: try pushes in a copy of the world, walk to where the best one begins, push, look again.

It reads the world's state, not the picture. The world is fully damped: the block stops where the disc stops pushing
it, so its pose is all that a trial needs.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

RADIUS = 15.0
"""Of the disc, in pixels of the world, like all lengths here."""
GAP = 3.0
"""Between disc and block before a push begins."""
REACHES = (8.0, 20.0, 45.0, 80.0)
"""How far behind the block's edge a push aims."""
PUSH_STEPS = 6
"""Most control steps of a push."""
PATIENCE = 40
"""Control steps of walking after which another push is planned."""
CELL = 16
"""Side of a cell of the grid on which ways around the block are found."""

_LOW, _HIGH = 22.0, 490.0
"""Where the disc's centre may be."""
_BOXES = np.array([[[-60, 0], [60, 30]], [[-15, 30], [15, 120]]], np.float64)
"""The T in its own frame: lower and upper corner of bar and stem."""
_CORNERS = np.array([[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]], np.float64)


class PushTExpert:
    """Plans one push at a time."""

    def __init__(self, env: Any, trial: Any) -> None:
        """``env``: the ``PushTEnv`` that is played; ``trial``: another one, in which pushes are tried."""
        self._env, self._trial = env, trial
        self._goal = _placed(_CORNERS, env.goal_pose[:2], env.goal_pose[2])
        self._edge, self._normal = _edge_points()
        self._left, self._walked, self._pushing = 0, 0, False
        """Control steps that are left of the present push (0 asks for another), and those walked to where it begins."""

    def action(self) -> Float64[np.ndarray, " 2"]:
        """Where the disc shall go next."""
        if self._left == 0 or self._walked == PATIENCE:
            self._begin, self._aim, self._left = self._plan()
            self._walked, self._pushing = 0, False
        disc = np.array(self._env.agent.position)
        if not self._pushing and np.linalg.norm(disc - self._begin) > GAP:
            self._walked += 1
            return self._way(disc, self._begin)
        self._pushing, self._walked = True, 0
        self._left -= 1
        return self._aim

    def _plan(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Where the push begins, where it aims, and its control steps, after which corners are nearest to the goal."""
        block = self._env.block
        normals = _turned(self._normal, block.angle)
        begins = _placed(self._edge, block.position, block.angle) + normals * (RADIUS + GAP)
        free = ((begins > _LOW) & (begins < _HIGH)).all(axis=1) & (self._clearance(begins) > RADIUS + 1)
        best = (np.inf, begins[0], begins[0], 1)
        for begin, normal in zip(begins[free], normals[free], strict=True):
            for reach in REACHES:
                aim = begin - normal * (GAP + reach)
                for steps, distance in enumerate(self._try(begin, aim), 1):
                    best = min(best, (distance, begin, aim, steps), key=lambda push: push[0])
        return best[1:]

    def _try(self, begin: np.ndarray, aim: np.ndarray) -> list[float]:
        """Mean distance of the block's corners from the goal's, after each control step of a push."""
        world, block = self._trial, self._env.block
        world.block.angle, world.block.position = block.angle, block.position
        world.block.velocity, world.block.angular_velocity = (0, 0), 0
        world.agent.position, world.agent.velocity = begin.tolist(), (0, 0)
        for body in (world.block, world.agent):
            world.space.reindex_shapes_for_body(body)
        distances = []
        for _ in range(PUSH_STEPS):
            for _ in range(round(1 / (world.dt * world.control_hz))):  # the disc's controller, as in PushTEnv.step
                disc = world.agent
                x, y = (v + (world.k_p * (t - p) - world.k_v * v) * world.dt
                        for t, p, v in zip(aim, disc.position, disc.velocity, strict=True))
                disc.velocity = (x, y)
                world.space.step(world.dt)
            corners = _placed(_CORNERS, world.block.position, world.block.angle)
            distances.append(float(np.linalg.norm(corners - self._goal, axis=1).mean()))
        return distances

    def _way(self, disc: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Return a point in sight on the shortest way to ``end`` around the block."""
        if self._in_sight(disc, end):
            return end
        cells = np.arange(CELL / 2, 512, CELL)
        centres = np.stack(np.meshgrid(cells, cells, indexing="ij"), axis=-1)
        flat = centres.reshape(-1, 2)
        free = (self._clearance(flat) > RADIUS + GAP) & ((flat > _LOW) & (flat < _HIGH)).all(axis=1)
        lengths = CELL * _lengths(free.reshape(len(cells), -1), tuple((end // CELL).astype(int).tolist())).reshape(-1)
        lengths += np.linalg.norm(flat - disc, axis=1)
        for cell in np.argsort(lengths)[:60]:
            if np.isfinite(lengths[cell]) and np.linalg.norm(flat[cell] - disc) > CELL / 2 and self._in_sight(
                    disc, flat[cell]):
                return flat[cell]
        away = disc - np.array(self._env.block.position)  # it touches the block: step back
        return np.clip(disc + 2 * RADIUS * away / max(float(np.linalg.norm(away)), 1.0), _LOW, _HIGH)

    def _in_sight(self, one: np.ndarray, other: np.ndarray) -> bool:
        between = one + (other - one) * np.linspace(0, 1, 24)[:, None]
        return bool((self._clearance(between) > RADIUS + GAP / 2).all())

    def _clearance(self, points: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, " n"]:
        """Distance of points from the block; 0 inside."""
        block = self._env.block
        seen = _turned(points - np.array(block.position), -block.angle)[:, None]
        outside = np.maximum(np.maximum(_BOXES[:, 0] - seen, seen - _BOXES[:, 1]), 0)
        return np.linalg.norm(outside, axis=-1).min(axis=1)


def _lengths(free: Bool[np.ndarray, "x y"], end: tuple[int, int]) -> Float64[np.ndarray, "x y"]:
    """Length of the shortest way from each cell to ``end`` over free cells, in cells (Dijkstra)."""
    lengths = np.full(free.shape, np.inf)
    lengths[end] = 0
    heap = [(0.0, end)]
    steps = [(dx, dy, float(np.hypot(dx, dy))) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy]
    while heap:
        length, (x, y) = heapq.heappop(heap)
        for dx, dy, step in steps:
            cell = (x + dx, y + dy)
            inside = 0 <= cell[0] < free.shape[0] and 0 <= cell[1] < free.shape[1]
            if inside and free[cell] and length + step < lengths[cell]:
                lengths[cell] = length + step
                heapq.heappush(heap, (length + step, cell))
    return lengths


def _edge_points(spacing: float = 15.0) -> tuple[np.ndarray, np.ndarray]:
    """Points on the T's outline in its own frame, and its outward normal there."""
    points, normals = [], []
    ends = np.roll(_CORNERS, -1, axis=0)
    for begin, end in zip(_CORNERS, ends, strict=True):
        along = end - begin
        count = max(1, int(np.linalg.norm(along) // spacing))
        points += [begin + along * (i + 0.5) / count for i in range(count)]
        normals += [np.array([along[1], -along[0]]) / np.linalg.norm(along)] * count
    return np.array(points), np.array(normals)


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return points @ np.array([[cosine, sine], [-sine, cosine]])


def _placed(points: np.ndarray, position: Any, angle: float) -> np.ndarray:
    return _turned(points, angle) + np.array(position)
