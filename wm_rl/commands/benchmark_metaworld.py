"""``python main.py benchmark suite=metaworld``: objectives on Meta-World from stale replay, with a leaderboard.

A cell is one contestant on one task and seed in one regime, written to ``cells/`` when it is done: a benchmark that was
stopped goes on with the same ``hydra.run.dir``, and more seeds or contestants add to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data.types import UserError
from sim.leaderboard import Board, Row, iqm, write_leaderboard
from wm_rl.journal import Journal
from wm_rl.stale_metaworld import Contestant, Experiment, Regime, train_stale
from wm_rl.staleness import PANEL
from wm_rl.workers import one_core_each


@dataclass(frozen=True, kw_only=True)
class Round:
    """A regime and who runs in it; the first is what the others are compared with."""

    regime: Regime
    contestants: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class _Cell:
    round: str
    contestant: str
    task: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.round}-{self.contestant.replace(' ', '_')}-{self.task}-{self.seed}.json"


def benchmark_metaworld(
    *, folder: str, tasks: Sequence[str], seeds: Sequence[int], experiment: Experiment,
    contestants: Mapping[str, Contestant], rounds: Mapping[str, Round], jobs: int,
) -> int:
    """Run every cell, ``jobs`` at a time with one core each; print, write ``results.json`` and ``report.html``.

    Raises ``UserError`` when a round names an unknown contestant, or there is nothing to run.
    """
    for name, each in rounds.items():
        for contestant in each.contestants:
            if contestant not in contestants:
                raise UserError(f"rounds.{name}: unknown contestant {contestant!r}; there are {', '.join(contestants)}")
    cells = [_Cell(round=name, contestant=contestant, task=task, seed=seed) for seed in seeds for task in tasks
             for name, each in rounds.items() for contestant in each.contestants]
    if not cells or jobs < 1:
        raise UserError("suite=metaworld needs at least one task, seed, contestant and job")
    run = Path(folder)
    (run / "cells").mkdir(parents=True, exist_ok=True)
    journal = Journal(run, [], enabled=True)
    todo = [cell for cell in cells if not (run / "cells" / cell.file).is_file()]
    with journal.progress("cells", len(cells)) as bar:
        bar.advance(len(cells) - len(todo))
        with one_core_each(jobs) as pool:
            waiting = [pool.submit(_run, run, cell, experiment, rounds[cell.round].regime,
                                   contestants[cell.contestant]) for cell in todo]
            try:
                for future, cell in zip(waiting, todo, strict=True):
                    future.result()
                    bar.advance(note=f"{cell.round}: {cell.contestant}, {cell.task}, seed {cell.seed}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    found = {cell: json.loads((run / "cells" / cell.file).read_text()) for cell in cells}
    boards = [_board(name, each, found, tasks, seeds, experiment) for name, each in rounds.items()]
    for board in boards:
        journal.console.print(_table(board))
    goals = "one goal per task and seed" if experiment.one_goal else "another goal per episode"
    last = experiment.last * experiment.episodes_per_iteration
    notes = [f"tasks {', '.join(tasks)}; seeds {', '.join(map(str, seeds))}; state observations, {goals}, actions "
             f"sampled; a score is the mean over the last {last} training episodes",
             "intervals: 95 %, stratified bootstrap over seeds; 'against' is the interquartile mean of the paired "
             "differences"]
    write_leaderboard(run / "report.html", "objectives on stale replay", boards, notes)
    (run / "results.json").write_text(json.dumps([_numbers(board) for board in boards], indent=2))
    for note in notes:
        journal.say(note)
    journal.say(f"results: {run / 'results.json'}, report: {run / 'report.html'}")
    return 0


def _run(run: Path, cell: _Cell, experiment: Experiment, regime: Regime, contestant: Contestant) -> None:
    result = train_stale(experiment, regime, contestant, task=cell.task, seed=cell.seed, scratch=run)
    building = run / f"cell-{os.getpid()}.tmp"
    building.write_text(json.dumps(result))
    building.rename(run / "cells" / cell.file)


def _board(
    name: str, each: Round, found: Mapping[_Cell, Mapping[str, Any]], tasks: Sequence[str], seeds: Sequence[int],
    experiment: Experiment,
) -> Board:
    def grid(contestant: str, what: str) -> np.ndarray:
        return np.array([[found[_Cell(round=name, contestant=contestant, task=task, seed=seed)][what] for task in tasks]
                         for seed in seeds], float)

    first = grid(each.contestants[0], "return")
    rows, curves = [], {}
    for contestant in each.contestants:
        scores = grid(contestant, "return")
        reached = grid(contestant, "episodes_to_80")  # NaN: never
        facts = {"episodes to 80 %, median (never)":
                 f"{np.median(np.nan_to_num(reached, nan=np.inf)):.0f} ({np.isnan(reached).sum()})",
                 "mean lag": f"{grid(contestant, 'lag').mean():.0f}",
                 "own utilisation": f"{grid(contestant, 'utilisation').mean():.2f}",
                 "own effective share": f"{grid(contestant, 'effective_sample_share').mean():.2f}",
                 "p95 of |log r|": f"{grid(contestant, 'abs_log_ratio_p95').mean():.2f}"}
        rows.append(Row(
            name=contestant, score=iqm(scores), success=iqm(grid(contestant, "success")),
            against_first=iqm(scores - first) if contestant != each.contestants[0] else None,
            wins=int((scores > first).sum()), pairs=scores.size, facts=facts))
        runs = [found[_Cell(round=name, contestant=contestant, task=task, seed=seed)]["curve"]["return"]
                for task in tasks for seed in seeds]
        episodes = (np.arange(each.regime.iterations) + 1) * experiment.episodes_per_iteration
        curves[contestant] = (episodes.tolist(), np.mean(runs, axis=0).tolist())
    return Board(title=f"{name}: newest {each.regime.capacity} episodes, {each.regime.updates_per_iteration} updates "
                       f"per {experiment.episodes_per_iteration} episodes", rows=rows, curves=curves,
                 profiles={contestant: grid(contestant, "return") for contestant in each.contestants},
                 usage=_usage([result for cell, result in found.items() if cell.round == name]))


def _usage(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """What each objective would have used per lag bucket, of the batches of all runs of a round."""
    pooled: dict[str, dict[str, float]] = {}
    for result in results:
        for bucket, values in result["buckets"].items():
            sums = pooled.setdefault(bucket, dict.fromkeys(values, 0.0))
            for what, value in values.items():
                sums[what] += value * (1.0 if what == "tokens" else values["tokens"])
    means = sorted(({what: value / sums["tokens"] for what, value in sums.items()} for sums in pooled.values()),
                   key=lambda row: row["lag"])
    return {name: ([row["lag"] for row in means], [row[f"{name}/utilisation"] for row in means]) for name in PANEL}


def _table(board: Board) -> Table:
    first = board.rows[0]
    table = Table("contestant", "return, IQM", "success, IQM", f"against {first.name}", "above it", "lag",
                  title=board.title)
    for row in sorted(board.rows, key=lambda row: -row.score.estimate):
        table.add_row(row.name, str(row.score), str(row.success), str(row.against_first or ""),
                      f"{row.wins} of {row.pairs}" if row.against_first else "", row.facts["mean lag"])
    return table


def _numbers(board: Board) -> dict[str, Any]:
    def interval(value: Any) -> list[float] | None:
        return None if value is None else [value.estimate, value.low, value.high]

    return {"title": board.title, "usage": board.usage, "rows": [
        {"name": row.name, "return": interval(row.score), "success": interval(row.success),
         "against_first": interval(row.against_first), "wins": row.wins, "pairs": row.pairs, **row.facts}
        for row in board.rows]}
