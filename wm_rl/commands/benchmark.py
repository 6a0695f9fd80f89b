"""``python main.py benchmark``: the closed loop over seeds beside its controls, as one table with intervals.

Every cell is a whole ``train`` in a process and folder of its own, so a benchmark that was stopped goes on where it
was: finished runs are read, cut ones are resumed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from data.types import Source, UserError
from sim.intervals import Interval, paired_difference, wilson
from wm_rl.journal import Journal


@dataclass(frozen=True, kw_only=True)
class Control:
    """One way to run the loop."""

    name: str
    overrides: Sequence[str]


def benchmark(
    *,
    folder: str,
    train_experiment: str,
    seeds: Sequence[int],
    controls: Sequence[Control],
    jobs: int,
) -> int:
    """Run every control on every seed, ``jobs`` at a time with one core each; print the table, write ``results.json``.

    Raises:
        UserError: nothing to run, or a run that failed (its log is named).
    """
    if not seeds or not controls or jobs < 1:
        raise UserError("a benchmark needs at least one seed, one control and one job")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    cells = [(control.name, seed, [f"experiment={train_experiment}", f"seed={seed}", *control.overrides])
             for seed in seeds for control in controls]
    with ThreadPoolExecutor(jobs) as pool, journal.progress("runs", len(cells)) as bar:
        def work(cell: tuple[str, int, list[str]]) -> dict[str, Any]:
            name, seed, overrides = cell
            summary = _train(run / f"{name.replace(' ', '_')}-{seed}", overrides)
            bar.advance(note=f"{name}, seed {seed}")
            return {"control": name, "seed": seed, "overrides": overrides, **_row(summary)}

        rows = list(pool.map(work, cells))
    results = {"rows": rows, "against_full": _against_first(rows, [control.name for control in controls])}
    (run / "results.json").write_text(json.dumps(results, indent=2))
    _print(journal, results)
    journal.say(f"results: {run / 'results.json'}")
    return 0


def _train(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The summary of a finished run in ``folder``; runs or resumes it first where there is none."""
    summary = folder / "summary.json"
    if not summary.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        started = (folder / ".hydra" / "overrides.yaml").is_file()
        arguments = [f"resume={folder}"] if started else [*overrides, f"hydra.run.dir={folder}"]
        with (folder / "log.txt").open("a") as log:
            code = subprocess.run(
                [sys.executable, "main.py", "train", *arguments], stdout=log, stderr=subprocess.STDOUT, check=False,
                cwd=Path(__file__).resolve().parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if code != 0:
            raise UserError(f"a run ended with exit code {code}; see {folder / 'log.txt'}, then run the benchmark "
                            "again with the same hydra.run.dir to go on")
    return json.loads(summary.read_text())


def _row(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        **{mode: tasks["all tasks"] for mode, tasks in summary["success"].items()},
        "gradient_share": summary["gradient_share"], "seconds": summary["seconds"],
        "world_model": summary["world_model"],
        "after_trials": {mode: [trial["success"] for trial in trials]
                         for mode, trials in summary["trials"]["after"].items()}}


def _against_first(rows: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, Any]]:
    """Success after training, pooled over seeds, of each control, and paired against the first."""
    def pooled(name: str, mode: str) -> list[bool]:
        return [success for row in rows if row["control"] == name for success in row["after_trials"][mode]]

    table: dict[str, dict[str, Any]] = {}
    for name in names:
        table[name] = {}
        for mode in rows[0]["after_trials"]:
            own, first = pooled(name, mode), pooled(names[0], mode)
            table[name][mode] = {
                "after": _numbers(wilson(sum(own), len(own))), "trials": len(own),
                "against_first": _numbers(paired_difference(first, own)) if name != names[0] else None}
    return table


def _numbers(interval: Interval) -> dict[str, float]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def _print(journal: Journal, results: dict[str, Any]) -> None:
    modes = list(results["rows"][0]["after_trials"])
    table = Table("control", "seed", *(f"{mode}: before → after, paired difference" for mode in modes),
                  "gradient share " + "/".join(Source), "minutes", title="closed loop")
    for row in results["rows"]:
        table.add_row(
            row["control"], str(row["seed"]),
            *(f"{row[mode]['before']['estimate']:.2f} → {row[mode]['after']['estimate']:.2f}, "
              f"{_signed(row[mode]['difference'])}" for mode in modes),
            "/".join(f"{row['gradient_share'][source]:.2f}" for source in Source),
            f"{sum(row['seconds'].values()) / 60:.1f}")
    journal.console.print(table)
    pooled = Table("control", *(f"{mode}: after, all seeds; against the full loop" for mode in modes))
    for name, by_mode in results["against_full"].items():
        pooled.add_row(name, *(
            f"{cell['after']['estimate']:.3f} [{cell['after']['low']:.3f}, {cell['after']['high']:.3f}]"
            + (f"; {_signed(cell['against_first'])}" if cell["against_first"] else "") for cell in by_mode.values()))
    journal.console.print(pooled)


def _signed(interval: Mapping[str, float]) -> str:
    return f"{interval['estimate']:+.2f} [{interval['low']:+.2f}, {interval['high']:+.2f}]"
