"""``python main.py benchmark suite=experts``: what scripted experts solve, task by task; ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data.types import UserError
from sim.evaluation import Trial, evaluate_policy
from sim.expert import ScriptedExpert
from sim.intervals import wilson
from sim.vector import VectorEnv
from wm_rl.journal import Journal


def benchmark_experts(
    *, folder: str, env: Callable[[], VectorEnv], trials_per_task: int, first_seed: int, within: int
) -> int:
    """Play every task by its expert, without noise; print successes in the whole episode and ``within`` control steps.

    Raises:
        UserError: no trials, or a limit below 1.

    """
    if within < 1:
        raise UserError(f"within must be at least 1 control step, got {within}")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    world = env()
    try:
        played = evaluate_policy(world, ScriptedExpert(world), trials_per_task=trials_per_task, first_seed=first_seed,
                                 sample=False)
    finally:
        world.close()
    results = {task: _row([trial for trial in played.trials if trial.task == task], within) for task in world.tasks}
    (run / "results.json").write_text(json.dumps(results, indent=2))
    table = Table("task", "solved", f"within {within}", "median steps")
    for task, row in results.items():
        table.add_row(task, row["said"], row["said_within"], f"{row['median_steps']:.0f}" if row["solved"] else "–")
    journal.console.print(table)
    journal.say(f"{len(results)} tasks, solved {played.success()} of all trials; {run / 'results.json'}")
    return 0


def _row(trials: Sequence[Trial], within: int) -> dict[str, Any]:
    """Counts and intervals; the median is over solved trials."""
    steps = np.array([trial.steps for trial in trials if trial.success])
    solved, soon = wilson(len(steps), len(trials)), wilson(int((steps <= within).sum()), len(trials))
    return {"trials": len(trials), "solved": len(steps), "solved_within": int((steps <= within).sum()),
            "said": str(solved), "said_within": str(soon), "interval": asdict(solved), "interval_within": asdict(soon),
            "median_steps": float(np.median(steps)) if len(steps) else None,
            "longest": int(steps.max()) if len(steps) else None}
