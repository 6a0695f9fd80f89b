"""LIBERO behind the ``Env`` contract, in its own environment (``make libero``): four suites of ten tasks, one of 90."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.types import Source, UserError
from sim.gl import ensure_gl
from sim.perturbation import Perturbation, Ranges
from sim.remote.client import RemoteEnv
from sim.remote.environments import find_python

STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps of an episode, as OpenVLA-OFT evaluates: somewhat more than the longest demonstration."""


@dataclass(frozen=True, kw_only=True)
class LiberoConfig:
    """How the tasks are simulated and seen."""

    cameras: tuple[str, ...] = ("agentview", "wrist")
    """One or both; pictures are turned by half a turn from how LIBERO stores them, as OpenVLA and OpenVLA-OFT do."""
    image_size: int = 64
    render_size: int | None = None
    """Pixels that are drawn and then resized with Lanczos' filter; null: ``image_size``. OpenVLA-OFT: 256, then 224."""
    fast_rendering: bool = True
    """Without shadows, reflections, smooth edges and fine meshes. False draws what the benchmark draws."""
    wait_steps: int = 10
    """Control steps after a reset, before an episode begins, in which everything comes to rest."""
    max_episode_steps: int | None = None
    """Control steps (1/20 s) until an episode is truncated; null: the suite's, in ``STEP_LIMITS``."""
    steps_after_success: int = 0
    """Control steps that an episode goes on after it succeeded, as far as ``max_episode_steps`` allows."""
    training_states: str = "sampled"
    """``sampled``: training episodes (seeds from 2^30 up) begin where LIBERO's task description places things at
    random, so that the suite's initial states stay held out. ``suite``: in those states too. Evaluation's episodes
    always begin in the suite's: with seed ``s`` in number ``s`` modulo their number, which is 50."""
    perturbation: Perturbation | Mapping[str, Any] | None = None
    """What differs from nominal in every episode (``sim.perturbation``); or its factors by name."""
    randomise: str | Ranges | None = None
    """Ranges from which each episode's seed draws its perturbation, or their name."""

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if not self.cameras or set(self.cameras) - {"agentview", "wrist"}:
            raise UserError(f"expected env.config.cameras of agentview and wrist, got {list(self.cameras)}; type e.g. "
                            "env.config.cameras=[agentview]")
        if self.training_states not in ("sampled", "suite"):
            raise UserError(f"expected env.config.training_states sampled or suite, got {self.training_states!r}")
        for name, least in (("image_size", 1), ("render_size", 1), ("max_episode_steps", 1), ("wait_steps", 0),
                            ("steps_after_success", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"expected env.config.{name} of at least {least}, got {value}")


class LiberoEnv(RemoteEnv):
    """``num_envs`` rows of one suite; row ``i`` plays ``tasks[i % len(tasks)]``. See ``data.types.Env``.

    ``workers`` processes share the rows in contiguous blocks. Which process a row lives in never changes what it plays.
    """

    def __init__(
        self,
        *,
        suite: str,
        tasks: Sequence[str | int] | None = None,
        num_envs: int = 2,
        workers: int = 2,
        config: LiberoConfig | None = None,
        source: Source | str = Source.SIM,
        only: Sequence[int] | None = None,
    ) -> None:
        """Start the processes and build every task; ``only`` these rows, where the others are played elsewhere.

        Args:
            suite: LIBERO's name of it, e.g. ``libero_object``; LIBERO-PRO's have theirs, e.g. ``libero_goal_swap``.
            tasks: Their names, or numbers from 0; null: all, which takes 0.7 GB of memory each.
            num_envs: At least one for each task.
            workers: Processes; LIBERO never runs in this one, so 0 is 1.
            config: How they are simulated and seen.
            source: ``sim``, or ``real`` where it plays a robot.
            only: Numbers of rows.

        Raises:
            UserError: an unknown suite or task, too few rows, a factor that it lacks, no GL, or LIBERO's environment is
                not there.
        """
        config = LiberoConfig() if config is None else config
        base = next((name for name in STEP_LIMITS if suite == name or suite.startswith(f"{name}_")), None)
        if base is None:
            raise UserError(f"expected env.suite of {', '.join(STEP_LIMITS)}, got {suite!r}")
        if workers < 0:
            raise UserError(f"expected env.workers of at least 0, got {workers}")
        ensure_gl()
        told = {key: value for key, value in vars(config).items() if key not in ("perturbation", "randomise")}
        settings = {**told, "cameras": list(config.cameras),
                    "render_size": config.render_size or config.image_size,
                    "max_episode_steps": config.max_episode_steps or STEP_LIMITS[base]}
        rows = np.arange(num_envs) if only is None else np.array(only)
        self.config = config
        super().__init__(
            name="libero", python=find_python("libero", "LIBERO_PYTHON"), factory="sim.libero.simulator:make",
            configs=[{"suite": suite, "tasks": None if tasks is None else list(tasks), "num_envs": num_envs,
                      "rows": block.tolist(), "settings": settings}
                     for block in np.array_split(rows, max(1, min(workers, len(rows))))],
            environment={"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "0"},  # processes are the parallelism
            source=source, perturbation=config.perturbation, randomise=config.randomise)
