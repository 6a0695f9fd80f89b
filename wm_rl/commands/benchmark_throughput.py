"""``python main.py benchmark suite=throughput``: asynchronous beside synchronous, over the simulator's latency.

Both play the same number of rows of the same environment and take the same updates for each episode. A measurement
(arm, latency, repeat) is written to ``cells/`` when it is done, so a benchmark that was stopped goes on with the same
``hydra.run.dir``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from data.types import UserError
from sim.figures import new_figure
from sim.vector import VectorEnv
from wm_rl.cluster.config import RayRuntime
from wm_rl.journal import Journal
from wm_rl.loop import Loop
from wm_rl.throughput import Arm, Measurement, measure, prepare
from wm_rl.workers import one_core_each

_PUBLISHED = 2.4
"""Speed-up over synchronous loops that AcceRL (arXiv 2603.18464) reports."""
_RATES = ("control_steps_per_s", "updates_per_s")


class Cell(NamedTuple):
    """One measurement. ``arm`` null: the synchronous loop, with steps that vary as ``variation`` says."""

    name: str
    arm: Arm | None
    variation: float
    latency_ms: float
    repeat: int


def benchmark_throughput(
    *, folder: str, loop: Callable[..., Loop], env: Callable[..., VectorEnv], runtime: RayRuntime,
    latencies_ms: Sequence[float], repeats: int, seconds: float, arms: Mapping[str, Arm],
) -> int:
    """Measure every cell that is not there yet; print the table, write ``results.json`` and ``throughput.png``.

    Raises:
        UserError: nothing to measure.
    """
    if not latencies_ms or repeats < 1 or not arms or seconds <= 0:
        raise UserError("suite=throughput needs at least one latency, repeat, arm and second")
    run = Path(folder)
    (run / "cells").mkdir(parents=True, exist_ok=True)
    journal = Journal(run, [], enabled=True)
    cells = _cells(latencies_ms, repeats, arms)
    prepared = prepare(loop, partial(env, latency_ms=0.0), runtime, run)
    with journal.progress("cells", len(cells)) as bar:
        for cell in cells:
            if not _file(run, cell).is_file():
                what = _measurement(cell, loop, env, runtime, seconds)
                with one_core_each(1) as pool:  # a cluster of its own, and nothing left of the one before
                    figures = pool.submit(measure, what, prepared, run / "running").result()
                _file(run, cell).write_text(json.dumps(figures, indent=1))
            bar.advance(note=f"{cell.name}, {cell.latency_ms:g} ms")
    rows = [{"arm": cell.name, "variation": cell.variation, "latency_ms": cell.latency_ms, "repeat": cell.repeat,
             **json.loads(_file(run, cell).read_text())} for cell in cells]
    compared = [_compare(rows, name, arm, latency) for name, arm in arms.items() for latency in latencies_ms]
    (run / "results.json").write_text(json.dumps({"rows": rows, "compared": compared}, indent=1))
    journal.console.print(_table(compared))
    _draw(compared, list(arms), run / "throughput.png")
    journal.say(f"results: {run / 'results.json'}, {run / 'throughput.png'}")
    return 0


def _cells(latencies_ms: Sequence[float], repeats: int, arms: Mapping[str, Arm]) -> list[Cell]:
    """Every arm and the synchronous loop that it is compared with, one repeat after the other."""
    cells = []
    for repeat in range(repeats):
        for latency in latencies_ms:
            for variation in dict.fromkeys(arm.variation for arm in arms.values()):
                cells.append(Cell("synchronous", None, variation, latency, repeat))
            cells += [Cell(name, arm, arm.variation, latency, repeat) for name, arm in arms.items()]
    return cells


def _file(run: Path, cell: Cell) -> Path:
    return run / "cells" / f"{cell.name.replace(' ', '_')}-{cell.variation:g}-{cell.latency_ms:g}-{cell.repeat}.json"


def _measurement(
    cell: Cell, loop: Callable[..., Loop], env: Callable[..., VectorEnv], runtime: RayRuntime, seconds: float
) -> Measurement:
    """The synchronous loop has ``env.num_envs`` rows in one environment, an asynchronous one as many in all."""
    num_envs = getattr(env, "keywords", {}).get("num_envs", 1)
    slow = partial(env, latency_ms=cell.latency_ms, variation=cell.variation)
    asynchronous = None
    if cell.arm is not None:
        rows = num_envs * cell.arm.rows
        if rows % runtime.collectors:
            raise UserError(f"expected rows that {runtime.collectors} collectors can share, got {rows}; type e.g. "
                            f"env.num_envs={runtime.collectors * 8}")
        slow = partial(slow, num_envs=rows // runtime.collectors)
        asynchronous = replace(runtime, updates_per_episode=cell.arm.updates_per_episode,
                               rows_per_thread=cell.arm.rows_per_thread)
    return Measurement(loop=loop, env=slow, runtime=asynchronous, local=runtime, seconds=seconds)


def _compare(rows: Sequence[Mapping[str, Any]], name: str, arm: Arm, latency: float) -> dict[str, Any]:
    """An arm beside the synchronous loop, repeat by repeat: of control steps and updates, what gained less counts."""
    own = [row for row in rows if (row["arm"], row["latency_ms"]) == (name, latency)]
    other = [row for row in rows if (row["arm"], row["variation"], row["latency_ms"])
             == ("synchronous", arm.variation, latency)]
    ratios = [min(a[what] / b[what] for what in _RATES) for a, b in zip(own, other, strict=True)]

    def mean(of: Sequence[Mapping[str, float]], what: str) -> float:
        return float(np.mean([row[what] for row in of]))

    simulating = 1 - mean(other, "trainer_utilisation")
    return {"arm": name, "latency_ms": latency, "speed_up": float(np.mean(ratios)), "lowest": min(ratios),
            "highest": max(ratios), "simulation_share": simulating,
            **{f"synchronous_{what}": mean(other, what) for what in _RATES},
            **{what: mean(own, what) for what in (*_RATES, "trainer_utilisation", "lag", "machine_busy", "update_s",
                                                  "start_up_s")}}


def _table(compared: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("arm", "latency", "simulation's share\nof the synchronous time", "control steps/s\nsync → async",
                  "updates/s\nsync → async", "speed-up [lowest, highest]", "trainer\nutilisation", "lag, updates",
                  "machine busy", title="asynchronous beside synchronous")
    for row in compared:
        table.add_row(
            row["arm"], f"{row['latency_ms']:g} ms", f"{row['simulation_share']:.0%}",
            *(f"{row[f'synchronous_{what}']:.{digits}f} → {row[what]:.{digits}f}"
              for what, digits in (("control_steps_per_s", 0), ("updates_per_s", 2))),
            f"{row['speed_up']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]", f"{row['trainer_utilisation']:.0%}",
            f"{row['lag']:.0f}", f"{row['machine_busy']:.0%}")
    return table


def _draw(compared: Sequence[Mapping[str, Any]], arms: Sequence[str], path: Path) -> None:
    """Speed-up and trainer utilisation over latency, a line per arm."""
    figure, axes = new_figure(9, 3.4, 2)
    for name in arms:
        rows = [row for row in compared if row["arm"] == name]
        latencies = [row["latency_ms"] for row in rows]
        axes[0].errorbar(latencies, [row["speed_up"] for row in rows], capsize=2, marker="o", label=name, yerr=[
            [row["speed_up"] - row["lowest"] for row in rows], [row["highest"] - row["speed_up"] for row in rows]])
        axes[1].plot(latencies, [row["trainer_utilisation"] for row in rows], marker="o", label=name)
    axes[0].axhline(_PUBLISHED, linestyle="--", color="grey", linewidth=0.8, label="AcceRL's 2.4")
    axes[0].axhline(1, linestyle=":", color="grey", linewidth=0.8)
    axes[0].set_ylabel("updates/s, asynchronous ÷ synchronous", fontsize=8)
    axes[1].set_ylabel("trainer utilisation, asynchronous", fontsize=8)
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(0, 1.02)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlabel("simulator's latency per control step, ms", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path)
