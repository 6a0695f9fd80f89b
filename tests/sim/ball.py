"""A toy simulator for the tests of ``sim.remote``: a ball in a box. It fails in every way when its action says so."""

import os
import signal
import time

import numpy as np

from sim.remote.protocol import Answers, BadInputError, Description

STEPS, SIZE, HZ = 12, 16, 10.0
FAILURES = {"exit": lambda: os._exit(7), "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "sleep": lambda: time.sleep(600), "raise": lambda: 1 / 0, "system_exit": lambda: exit("no Kit here")}


class Balls:
    """Rows of a ball that is pushed towards a goal. Row ``i`` fails in an episode whose seed is ``fail_seed``."""

    def __init__(self, rows: int = 3, fail_seed: int = -1, failure: str = "exit", fail_at: int = 4,
                 fail_in: str = "step", marker: str = "") -> None:
        if rows < 1:
            raise BadInputError(f"expected at least one row, got {rows}; type rows=1")
        self.rows, self.fail_seed, self.fail_at = rows, fail_seed, fail_at
        self.failure, self.fail_in, self.marker = failure, fail_in, marker
        if fail_in == "make":
            FAILURES[failure]()
        self.place, self.goal = np.zeros((2, rows, 2))
        self.gain, self.light = np.ones((rows, 1)), np.ones((rows, 3))
        self.steps, self.seeds = np.zeros((2, rows), np.int64)
        self.description = Description(
            cameras=["above", "side"], image_size=SIZE, proprio_names=["x_m", "y_m"], action_names=["dx", "dy"],
            control_hz=HZ, max_episode_steps=STEPS, row_tasks=["ball"] * rows, embodiment="ball",
            statistics={"action_low": [-1.0] * 2, "action_high": [1.0] * 2, "proprio_mean": [0.0] * 2,
                        "proprio_std": [1.0] * 2},
            provenance={"simulator": "ball", "pid": os.getpid()}, factors=["gain", "light"])

    def perturb(self, row: int, changes: dict) -> None:
        self.gain[row], self.light[row] = changes.get("gain", 1.0), changes.get("light", 1.0)

    def reset(self, mask: np.ndarray, seeds: np.ndarray, answers: Answers) -> dict[int, str]:
        for row in np.flatnonzero(mask):
            self._fail("reset", row, seeds[row])
            random = np.random.default_rng(int(seeds[row]))
            self.place[row], self.goal[row] = random.uniform(-1, 1, (2, 2))
            self.steps[row], self.seeds[row] = 0, seeds[row]
        self._show(mask, answers)
        return {int(row): f"push the ball to {self.goal[row].round(1)}" for row in np.flatnonzero(mask)}

    def step(self, actions: np.ndarray, mask: np.ndarray, answers: Answers) -> None:
        self.place += np.where(mask[:, None], 0.2 * self.gain * actions, 0)
        self.steps += mask
        self._show(mask, answers)
        for row in np.flatnonzero(mask):
            if self.steps[row] >= self.fail_at:
                answers.frames["above"][row, :3] = 255  # half of an answer
                self._fail("step", row, self.seeds[row])
                self._show(mask, answers)

    def expert(self, mask: np.ndarray, actions: np.ndarray) -> None:
        for row in np.flatnonzero(mask):
            self._fail("expert", row, self.seeds[row])
        actions[mask] = np.clip((self.goal - self.place)[mask] / 0.2, -1, 1)

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        return {"place": self.place[row], "goal": self.goal[row], "steps": self.steps[row : row + 1]}

    def restore(self, row: int, snapshot: dict[str, np.ndarray], answers: Answers) -> str:
        self.place[row], self.goal[row], self.steps[row] = snapshot["place"], snapshot["goal"], snapshot["steps"][0]
        self._show(np.arange(self.rows) == row, answers)
        return f"push the ball to {self.goal[row].round(1)}"

    def close(self) -> None:
        if self.marker:
            with open(self.marker, "w") as file:
                file.write("closed")

    def _fail(self, call: str, row: int, seed: int) -> None:
        if call == self.fail_in and seed == self.fail_seed:
            FAILURES[self.failure]()

    def _show(self, mask: np.ndarray, answers: Answers) -> None:
        for row in np.flatnonzero(mask):
            picture = np.add.outer(np.arange(SIZE), np.arange(SIZE)).astype(np.uint8) * 4
            shift = int(500 * np.abs(self.place[row]).sum())
            answers.frames["above"][row] = (picture + shift % 251)[..., None]
            answers.frames["side"][row] = (picture[..., None] + np.uint8(shift % 241)) * self.light[row]
        arrived = np.linalg.norm(self.place - self.goal, axis=1) < 0.1
        answers.proprio[mask] = self.place[mask]
        answers.time[mask] = self.steps[mask] / HZ
        answers.success[mask] = answers.terminated[mask] = arrived[mask]
        answers.reward[mask] = arrived[mask]
        answers.truncated[mask] = (~arrived & (self.steps >= STEPS))[mask]


def make(config: dict) -> Balls:
    """Without what Python prints getting in the way."""
    print("a simulator may print what it likes")
    return Balls(**config)


class Silent(Balls):
    """Without expert, snapshots and anything to perturb."""

    expert = snapshot = perturb = property()

    def __init__(self, **config) -> None:
        super().__init__(**config)
        self.description.factors.clear()


def make_silent(config: dict) -> Balls:
    return Silent(**config)
