"""``python main.py benchmark suite=inference``: answers per second and waits, over a batch's size and age."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from data.types import UserError
from sim.figures import new_figure
from sim.vector import VectorEnv
from wm_rl.cluster.config import RayRuntime
from wm_rl.journal import Journal
from wm_rl.policy import TinyVLA, TinyVLAConfig

if TYPE_CHECKING:
    from wm_rl.cluster.load import Load


def benchmark_inference(
    *, folder: str, env: Callable[..., VectorEnv], policy: TinyVLAConfig, runtime: RayRuntime, load: Load,
    batch_sizes: Sequence[int], ages_ms: Sequence[float],
) -> int:
    """Ask one server at every setting; print the table, write ``results.json`` and ``inference.png``.

    Raises:
        UserError: nothing to measure.
    """
    from wm_rl.cluster.load import pass_seconds, under_load  # late: needs Ray

    if not batch_sizes or not ages_ms or min(batch_sizes) < 1 or min(ages_ms) < 0:
        raise UserError("suite=inference needs at least one batch size of at least 1, and one age of at least 0 ms")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    one = env(workers=0, only=0)
    make_policy = partial(TinyVLA, policy, spec=one.spec, statistics=one.statistics, seed=0)
    one.close()
    passes = pass_seconds(make_policy(), [2**i for i in range(6)])
    rows = under_load(runtime, make_policy, load, [(size, age) for size in batch_sizes for age in ages_ms])
    results = {"rows": rows, "pass_s": passes, "asking_rows": load.rows, "thinking_ms": load.thinking_ms}
    (run / "results.json").write_text(json.dumps(results, indent=1))
    journal.console.print(_table(rows))
    journal.say("a forward pass: " + ", ".join(f"{count} rows {1e3 * took:.1f} ms" for count, took in passes.items()))
    inside = sum(row["wait_p99_ms"] <= row["bound_ms"] for row in rows)
    journal.say(f"99 % of the waits are within age and forward passes at {inside} of {len(rows)} settings")
    _draw(rows, batch_sizes, run / "inference.png")
    journal.say(f"results: {run / 'results.json'}, {run / 'inference.png'}")
    return 0


def _table(rows: Sequence[Mapping[str, float]]) -> Table:
    table = Table("batch size", "age, ms", "answers/s", "rows per batch", "wait p50, p99, ms", "bound, ms",
                  "forward pass p50, p99, ms", "round trip p50, p99, ms", title="an inference server under load")
    for row in rows:
        pairs = [f"{row[f'{name}_p50_ms']:.1f}, {row[f'{name}_p99_ms']:.1f}" for name in ("wait", "pass", "round_trip")]
        table.add_row(str(row["batch_size"]), f"{row['age_ms']:g}", f"{row['answers_per_s']:.0f}",
                      f"{row['batch_rows']:.1f}", pairs[0], f"{row['bound_ms']:.1f}", *pairs[1:])
    return table


def _draw(rows: Sequence[Mapping[str, Any]], batch_sizes: Sequence[int], path: Path) -> None:
    """Answers per second, and the longest waits with their bounds, over age; a line per batch size."""
    figure, axes = new_figure(9, 3.4, 2)
    for i, size in enumerate(batch_sizes):
        own = [row for row in rows if row["batch_size"] == size]
        ages = np.array([row["age_ms"] for row in own])
        axes[0].plot(ages, [row["answers_per_s"] for row in own], marker="o", color=f"C{i}", label=f"{size} rows")
        axes[1].plot(ages, [row["wait_p99_ms"] for row in own], marker="o", color=f"C{i}")
        axes[1].plot(ages, [row["bound_ms"] for row in own], linestyle=":", color=f"C{i}")
    axes[0].set_ylabel("answers/s", fontsize=8)
    axes[1].set_ylabel("wait until the forward pass, p99, ms (dotted: bound)", fontsize=8)
    for axis in axes:
        axis.set_xlabel("age at which a batch goes off, ms", fontsize=8)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=7, frameon=False, title="batch size", title_fontsize=7)
    figure.savefig(path)
