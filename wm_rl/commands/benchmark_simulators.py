"""``python main.py benchmark suite=simulators``: what it costs to have a simulator in a process of its own."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

from data.types import UserError
from sim.remote.client import RemoteEnv
from wm_rl.journal import Journal


def benchmark_simulators(
    *, folder: str, simulators: Mapping[str, Callable[[], RemoteEnv]], rounds: int, steps: int
) -> int:
    """Step each simulator through its worker, and let the same process step it by itself; write ``results.json``.

    Args:
        folder: Of the run.
        simulators: What to measure, in one process each.
        rounds: How often both are measured, in turns.
        steps: Control steps of every row, each time; episodes must be longer.

    Raises:
        UserError: a simulator whose environment is not there, or whose episodes are too short.
    """
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    results = {}
    for name, make in simulators.items():
        with contextlib.closing(make()) as env, journal.progress(name, rounds) as bar:
            results[name] = _measure(env, rounds, steps, bar.advance)
    table = Table("simulator", "rows", "pixels", "cameras", "by itself, steps/s", "through its worker", "share",
                  title=f"steps of one row per second, median of {rounds} rounds of {steps} steps")
    for name, row in results.items():
        table.add_row(name, str(row["rows"]), str(row["pixels"]), str(row["cameras"]), f"{row['alone']:.1f}",
                      f"{row['through']:.1f}", f"{row['share']:.3f} [{row['share_min']:.3f}, {row['share_max']:.3f}]")
    journal.console.print(table)
    (run / "results.json").write_text(json.dumps(results, indent=1))
    journal.say(f"results: {run / 'results.json'}")
    return 0


def _measure(env: RemoteEnv, rounds: int, steps: int, watch: Callable[[], None]) -> dict[str, float]:
    """Rates, and the share of the simulator's own rate that is left through the worker, round by round."""
    if rounds < 1 or not 1 <= steps < env.max_episode_steps:
        raise UserError(f"suite=simulators needs rounds of at least 1 and steps from 1 to {env.max_episode_steps - 1}: "
                        f"below an episode's; got rounds={rounds} steps={steps}")
    n = env.num_envs
    everything = {"reset_mask": np.ones(n, bool)}
    actions = np.random.default_rng(0).uniform(-1, 1, (n, env.spec.action_dim)).astype(np.float32)
    alone, through = [], []
    env.reset(seed=[0] * n, options=everything)
    env.step(actions)  # some simulators compile in their first step
    for number in range(rounds):
        env.reset(seed=[number] * n, options=everything)
        alone.append(n * steps / env.drive(actions, steps))
        env.reset(seed=[number] * n, options=everything)
        began = time.perf_counter()
        for _ in range(steps):
            env.step(actions)
        through.append(n * steps / (time.perf_counter() - began))
        watch()
    shares = np.array(through) / np.array(alone)
    return {"rows": n, "pixels": env.spec.image_size, "cameras": len(env.spec.cameras),
            "alone": float(np.median(alone)), "through": float(np.median(through)),
            "share": float(np.median(shares)), "share_min": float(shares.min()), "share_max": float(shares.max())}
