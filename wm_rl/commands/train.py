"""``python main.py train``: the closed loop, then the evaluation of what it made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger

from data.budget import StoreConfig
from data.logs.ingest import IngestConfig
from data.sampler import ReplayConfig
from data.types import UserError
from sim.expert import ExpertConfig
from sim.vector import VectorEnv
from wm_rl import interrupts
from wm_rl.cloning import CloningConfig
from wm_rl.cluster.config import RayRuntime
from wm_rl.evaluation import EvaluationConfig
from wm_rl.improve import improve
from wm_rl.journal import Journal
from wm_rl.learner import LearnerConfig
from wm_rl.loop import STAGES, Loop, LoopConfig
from wm_rl.objectives import Objective
from wm_rl.policy import TinyVLAConfig
from wm_rl.status import told
from wm_rl.trust import Trust
from wm_rl.verdict import judge_run
from world_model.config import ImaginationConfig, WorldModelConfig


def train(
    *,
    seed: int,
    resume: str | None,
    folder: str,
    loop: LoopConfig,
    env: Callable[[], VectorEnv],
    stand_in: Callable[[], VectorEnv],
    expert: ExpertConfig,
    logs: IngestConfig,
    policy: TinyVLAConfig,
    cloning: CloningConfig,
    objective: Objective,
    replay: ReplayConfig,
    storage: StoreConfig,
    trust: Trust,
    learner: LearnerConfig,
    world_model: WorldModelConfig,
    imagination: ImaginationConfig,
    evaluation: EvaluationConfig,
    runtime: Callable[..., Fabric],
    logger: Sequence[Logger],
) -> int:
    """Run or resume; 0 when the report is written. The command line has already made ``folder`` of ``resume``."""
    fabric = runtime()
    learner.check_share(replay.windows, runtime.learners if isinstance(runtime, RayRuntime) else fabric.world_size)
    if isinstance(runtime, RayRuntime) and loop.collect_tasks != "even":
        raise UserError("collectors of runtime=ray each play their row's task all the time: type "
                        "loop.collect_tasks=even, or runtime=local")
    fabric.launch()
    interrupts.remember()
    run = Path(folder)
    journal = Journal(run, logger, enabled=fabric.is_global_zero)
    if resume is not None:
        journal.say(f"going on with {run}")
    try:
        closed = Loop(
            folder=run, seed=seed, config=loop, env=env, stand_in=stand_in, expert=expert, logs=logs, policy=policy,
            objective=objective, replay=replay, storage=storage, trust=trust, learner=learner, cloning=cloning,
            world_model=world_model, imagination=imagination, fabric=fabric, journal=journal)
        describe = partial(_describe, closed, "ray" if isinstance(runtime, RayRuntime) else "local")
        with told(run, describe) if fabric.is_global_zero else nullcontext():
            closed.run(runtime.improve if isinstance(runtime, RayRuntime) else improve)
            if fabric.is_global_zero:
                judge_run(closed, evaluation)
            fabric.barrier()
    except KeyboardInterrupt:
        journal.say(f"\nstopped; nothing saved is lost. Go on with: python main.py train resume={run}")
        raise
    return 0


def _describe(loop: Loop, runtime: str) -> dict[str, Any]:
    """For ``status.json``. Called in a thread while ``loop`` runs."""
    progress, config = loop.progress, loop.config
    improved = progress["iteration"] == config.iterations
    return {"runtime": runtime, "stage": "evaluate" if improved else STAGES[progress["stage"]],
            "iteration": progress["iteration"], "iterations": config.iterations,
            "updates_per_iteration": config.updates_per_iteration, "seconds": dict(progress["seconds"]),
            "doing": loop.journal.doing(), "live": loop.journal.live}
