"""Isaac Lab behind the ``Env`` contract, in a worker process with a Python of its own."""

from __future__ import annotations

import numpy as np

from data.types import Source, UserError
from sim.isaac.config import IsaacConfig
from sim.remote.client import RemoteEnv
from sim.remote.environments import find_python


class IsaacEnv(RemoteEnv):
    """``num_envs`` rows of one task, shared by ``workers`` processes; one simulates them all."""

    rows_together = True

    def __init__(
        self, *, config: IsaacConfig, num_envs: int = 16, workers: int = 1, source: Source | str = Source.SIM,
        start_seconds: float = 900.0, call_seconds: float = 300.0,
    ) -> None:
        """Start the processes; a first start compiles for minutes.

        Raises:
            UserError: no environment with Isaac Lab, or a configuration that it or the task cannot take.
        """
        _check(config, num_envs, workers)
        self.config = config
        told = {key: value for key, value in vars(config).items() if key not in ("perturbation", "randomise")}
        shares = [len(rows) for rows in np.array_split(np.arange(num_envs), workers)]
        super().__init__(
            name="isaac", python=find_python("isaac", "ISAACLAB_PYTHON"), factory="sim.isaac.simulator:make",
            configs=[{**told, "num_envs": share} for share in shares], source=source,
            start_seconds=start_seconds, call_seconds=call_seconds, perturbation=config.perturbation,
            randomise=config.randomise)
        self.metadata["seeds"] = config.seeds


def _check(config: IsaacConfig, num_envs: int, workers: int) -> None:
    if not 1 <= workers <= num_envs:
        raise UserError(f"expected 1 <= workers <= num_envs, got {workers} and {num_envs}; type e.g. env.num_envs=16 "
                        "env.workers=1")
    for name, known in (("reward", ("sparse", "task")), ("seeds", ("episode", "batch"))):
        if getattr(config, name) not in known:
            raise UserError(f"expected env.config.{name} to be {' or '.join(known)}, got {getattr(config, name)!r}")
    if isinstance(config.instructions, str) or not config.instructions:
        raise UserError(f"expected a list of sentences in env.config.instructions, got {config.instructions!r}")
    if config.image_size < 1 or config.steps_after_success < 0 or (config.max_episode_steps or 1) < 1:
        raise UserError("expected image_size >= 1, steps_after_success >= 0 and max_episode_steps >= 1, got "
                        f"{config.image_size}, {config.steps_after_success} and {config.max_episode_steps}")
    if isinstance(config.held_out_instructions, str):
        raise UserError("expected a list of sentences in env.config.held_out_instructions, got "
                        f"{config.held_out_instructions!r}")
    if config.still_camera is not None and config.still_camera not in config.cameras:
        raise UserError(f"expected env.config.still_camera to be one of {list(config.cameras)}, got "
                        f"{config.still_camera!r}")
    if not config.action_low < config.action_high:
        raise UserError(f"expected action_low < action_high, got {config.action_low} and {config.action_high}")
