"""A FAKE of a vectorised Isaac Lab task: a cart and a pole drawn as two bars, for tests where Isaac Lab is not.

It does what the real one was recorded to do (``isaac_golden.json``): it resets a finished row within the step that
finished it, writes over the flags of the step before, clips nothing, leaves ``final_obs`` lying about, logs means.
"""

import contextlib
from types import SimpleNamespace

import gymnasium
import numpy as np
import torch

from sim.isaac.config import IsaacConfig
from sim.isaac.simulator import Demonstrating

DT, SIZE = 1 / 60, 24


class FakeIsaac:
    """``[n, 4]``: cart and pole, each with its velocity."""

    device = "cpu"
    step_dt = DT

    def __init__(self, num_envs, steps, *, fails_beyond=3.0):
        self.num_envs, self.max_episode_length, self.fails_beyond = num_envs, steps, fails_beyond
        self.single_action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (num_envs, 1))
        self.cfg = SimpleNamespace(compute_final_obs=True)
        self.sim = SimpleNamespace(cfg=SimpleNamespace(physics=SimpleNamespace()), forward=lambda: None)
        self.scene = SimpleNamespace(sensors={"camera": self}, write_data_to_sim=lambda: None)
        self.state = torch.zeros(num_envs, 4)
        self.camera_at = torch.zeros(num_envs, 3)
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long)
        self.reset_terminated, self.reset_time_outs = torch.zeros(2, num_envs, dtype=torch.bool)
        self.extras = {}

    @property
    def unwrapped(self):
        return self

    @property
    def data(self):
        """Of the camera: the cart as a bar from below, the pole as one from above."""
        frames = torch.full((self.num_envs, SIZE, SIZE, 3), 40, dtype=torch.uint8)
        for row, (cart, _, pole, _) in enumerate(self.state.tolist()):
            for value, rows, colour in ((cart, slice(SIZE // 2, None), 0), (pole, slice(0, SIZE // 2), 1)):
                middle = int(np.clip((value - float(self.camera_at[row, 0]) + 3) / 6, 0, 1) * (SIZE - 3))
                frames[row, rows, middle:middle + 3, colour] = 220
        return SimpleNamespace(output={"rgb": frames}, pos_w=self.camera_at, quat_w_opengl=torch.zeros(
            self.num_envs, 4))

    def set_world_poses(self, positions, orientations, env_ids, convention):
        """Of the camera: a place to the right of the middle shows all further to the left."""
        self.camera_at[env_ids] = positions

    @staticmethod
    def seed(seed):
        torch.manual_seed(seed)

    def reset(self, seed=None):
        if seed is not None:
            self.seed(seed)
        self._reset_idx(torch.arange(self.num_envs, dtype=torch.int32))
        return self._get_observations(), self.extras

    def step(self, action):
        action = action.to(self.device)
        force = 100 * action[:, 0]
        cart, speed, pole, turning = self.state.T
        speed, turning = speed + force * DT, turning + (10 * torch.sin(pole) - force) * DT
        self.state = torch.stack([cart + speed * DT, speed, pole + turning * DT, turning], dim=1)
        self.episode_length_buf += 1
        self.reset_terminated[:] = self.state[:, 0].abs() > self.fails_beyond
        self.reset_time_outs[:] = self.episode_length_buf >= self.max_episode_length
        reward = (1 - self.state[:, 2] ** 2) * DT
        over = (self.reset_terminated | self.reset_time_outs).nonzero().squeeze(-1).int()
        if len(over):
            self.extras["final_obs"] = self._get_observations()
            self._reset_idx(over)
        return self._get_observations(), reward, self.reset_terminated, self.reset_time_outs, self.extras

    def _reset_idx(self, rows):
        self.extras["log"] = {"Metrics/success_rate": self.reset_time_outs[rows].float().mean()}
        self.state[rows] = torch.rand(len(rows), 4) - 0.5
        self.episode_length_buf[rows] = 0

    def _get_observations(self):
        return {"policy": self.state.clone()}

    def close(self):
        pass


def to_the_right(task):
    """Success: the cart is there."""
    return task.state[:, 0] > 0.8


def push_right(task):
    """Expert."""
    return torch.ones(task.num_envs, 1)


def shift_cart(task, rows, shift):
    """Objects: the cart."""
    task.state[rows, 0] += shift[:, 0]


def make(settings):
    """Serve it as ``sim.isaac.simulator.make`` serves the real one."""
    settings = dict(settings)
    fake = FakeIsaac(settings.pop("num_envs"), settings.pop("steps", 20), **settings.pop("fake", {}))
    return Demonstrating(fake, IsaacConfig(**settings), contextlib.ExitStack(), "a FAKE of Isaac Lab")
