"""``python main.py benchmark suite=imagination``: simulator steps to a success rate, with imagination and without.

Needs the folder of a finished ``suite=world_model``: its models, recordings and warm starts. A cell (arm, task, seed)
is written to ``cells/`` when it is done, so a benchmark that was stopped goes on with the same ``hydra.run.dir``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data.store import ReplayStore
from data.types import UserError
from sim.figures import new_figure
from sim.vector import VectorEnv
from wm_rl.data_efficiency import Arm, Experiment, learn, steps_to
from wm_rl.journal import Journal
from wm_rl.workers import one_core_each


def benchmark_imagination(
    *, folder: str, world_models: str, model: str, warm_start: int, tasks: Sequence[str], seeds: Sequence[int],
    env: Callable[..., VectorEnv], experiment: Experiment, arms: Mapping[str, Arm], jobs: int,
) -> int:
    """Run every cell, print the steps that each took to ``level``, write ``results.json`` and ``curves.png``.

    Raises ``UserError`` when there is nothing to run, or ``world_models`` is no folder of a finished benchmark.
    """
    made = Path(world_models)
    needed = [made / "recorded.zarr", made / "policies" / str(warm_start),
              *(made / "models" / f"{model}-{seed}" for seed in seeds)]
    for path in needed:
        if not path.is_dir():
            raise UserError(f"suite=imagination needs {path}; run python main.py benchmark suite=world_model "
                            f"hydra.run.dir={made} first")
    if not tasks or not seeds or not arms or jobs < 1:
        raise UserError("suite=imagination needs at least one task, seed, arm and job")
    run, level = Path(folder), experiment.level
    (run / "cells").mkdir(parents=True, exist_ok=True)
    journal = Journal(run, [], enabled=True)
    cells = [(arm, task, seed) for seed in seeds for task in tasks for arm in arms]
    todo = [cell for cell in cells if not _file(run, cell).is_file()]
    with journal.progress("cells", len(cells)) as bar:
        bar.advance(len(cells) - len(todo))
        with one_core_each(jobs) as pool:
            waiting = [pool.submit(_run, run, cell, experiment, arms[cell[0]], env, made, model, warm_start)
                       for cell in todo]
            try:
                for future, (arm, task, seed) in zip(waiting, todo, strict=True):
                    future.result()
                    bar.advance(note=f"{arm}, {task}, seed {seed}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    curves = {cell: json.loads(_file(run, cell).read_text())["curve"] for cell in cells}
    offline = _offline_steps(made / "recorded.zarr", tasks)
    rows = [_row(cell, curve, level, offline[cell[1]]) for cell, curve in curves.items()]
    (run / "results.json").write_text(json.dumps({"level": level, "rows": rows}, indent=1))
    journal.console.print(_table(rows, level))
    for line in _summary(rows, curves, list(arms), level):
        journal.say(line)
    _draw(curves, tasks, list(arms), level, run / "curves.png")
    journal.say(f"curves: {run / 'curves.png'}")
    return 0


def _file(run: Path, cell: tuple[str, str, int]) -> Path:
    arm, task, seed = cell
    return run / "cells" / f"{arm.replace(' ', '_')}-{task}-{seed}.json"


def _run(
    run: Path, cell: tuple[str, str, int], experiment: Experiment, arm: Arm, env: Callable[..., VectorEnv], made: Path,
    model: str, warm_start: int,
) -> None:
    _, task, seed = cell
    result = learn(experiment, arm, make_env=env, task=task, seed=seed,
                   warm_start=made / "policies" / str(warm_start), world_model=made / "models" / f"{model}-{seed}",
                   recorded=made / "recorded.zarr", scratch=run)
    partial = _file(run, cell).with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(_file(run, cell))


def _offline_steps(path: Path, tasks: Sequence[str]) -> dict[str, int]:
    """Control steps of the recordings per task: a model of six tasks is charged to each by its part."""
    table = ReplayStore.open(path).episodes
    return {task: int(table.length[np.asarray(table.task).astype(str) == task].sum()) for task in tasks}


def _row(cell: tuple[str, str, int], curve: list[dict[str, float]], level: float, offline: int) -> dict[str, Any]:
    reached = steps_to(level, curve)
    end = curve[-1] if reached is None else reached
    return {"arm": cell[0], "task": cell[1], "seed": cell[2], "reached": reached is not None,
            "simulated": end["simulated"], "imagined": end["imagined"], "cpu_seconds": end["cpu_seconds"],
            "offline": offline, "before": curve[0]["success"], "best": max(point["success"] for point in curve),
            "last": curve[-1]["success"], "claimed": curve[-1]["claimed"], "true": curve[-1]["true"],
            "dreamt": curve[-1]["dreamt"]}


def _table(rows: Sequence[Mapping[str, Any]], level: float) -> Table:
    table = Table("arm", "task", "seed", f"simulator steps to {level:.0%}", "imagined", "CPU-s", "before → last (best)",
                  "imagination / simulator says")
    for row in rows:
        sign = "" if row["reached"] else "> "
        table.add_row(row["arm"], row["task"], str(row["seed"]), f"{sign}{row['simulated']:.0f}",
                      f"{row['imagined']:.0f}", f"{row['cpu_seconds']:.0f}",
                      f"{row['before']:.2f} → {row['last']:.2f} ({row['best']:.2f})",
                      f"{row['claimed']:.0f} / {row['true']:.0f}" if row["imagined"] else "")
    return table


def _summary(
    rows: Sequence[Mapping[str, Any]], curves: Mapping[tuple[str, str, int], list[dict[str, float]]],
    arms: Sequence[str], level: float,
) -> list[str]:
    """Per arm how many cells reached the level; geometric mean ratios over pairs, censored ones as what was spent."""
    lines = []
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        before, last = (np.mean([row[name] for row in own]) for name in ("before", "last"))
        lines.append(f"{arm}: {sum(row['reached'] for row in own)} of {len(own)} reached {level:.0%}; "
                     f"success {before:.2f} → {last:.2f}")
    for plain in arms[1:]:
        lines += [*_ratios(rows, arms[0], plain), _at_equal_steps(curves, arms[0], plain)]
    return lines


def _ratios(rows: Sequence[Mapping[str, Any]], imagining: str, plain: str) -> list[str]:
    """What one arm spent over what the first did, pair by pair."""
    partner = {(row["task"], row["seed"]): row for row in rows if row["arm"] == plain}
    pairs = [(row, partner[row["task"], row["seed"]]) for row in rows if row["arm"] == imagining]
    usable = [(own, other) for own, other in pairs if own["reached"]]
    overtaken = sum(other["reached"] for own, other in pairs if not own["reached"])
    lines = [f"against {plain}: {imagining} reached it in {len(usable)} of {len(pairs)} pairs, {plain} never in "
             f"{sum(not other['reached'] for _, other in usable)} of these (their ratios are lower bounds); "
             f"{plain} reached it in {overtaken} of the others"]
    for label, cost, extra in (("simulator steps", "simulated", None),
                               ("the same, the task's recordings counted for the model", "simulated", "offline"),
                               ("CPU seconds, the model's fit not counted", "cpu_seconds", None)):
        ratios = [other[cost] / (own[cost] + (own[extra] if extra else 0)) for own, other in usable
                  if own[cost] > 0 and other[cost] > 0]
        if ratios:
            lines.append(f"  ratio of {label}: geometric mean {np.exp(np.mean(np.log(ratios))):.2f} "
                         f"[{min(ratios):.2f}, {max(ratios):.2f}]")
    return lines


def _at_equal_steps(
    curves: Mapping[tuple[str, str, int], list[dict[str, float]]], imagining: str, plain: str
) -> str:
    """Success of both arms when each had as many simulator steps as the first took in all, reached or not."""
    own, other = [], []
    for (arm, task, seed), curve in curves.items():
        if arm == imagining:
            own.append(_smoothed(curve, curve[-1]["simulated"]))
            other.append(_smoothed(curves[plain, task, seed], curve[-1]["simulated"]))
    higher = sum(a > b for a, b in zip(own, other, strict=True))
    return (f"  success after the simulator steps of {imagining} (mean of two evaluations): {np.mean(own):.2f} against "
            f"{np.mean(other):.2f}, higher in {higher} of {len(own)} pairs")


def _smoothed(curve: Sequence[Mapping[str, float]], steps: float) -> float:
    """Mean success of the last two evaluations within ``steps``."""
    return float(np.mean([point["success"] for point in curve if point["simulated"] <= steps][-2:]))


def _draw(
    curves: Mapping[tuple[str, str, int], list[dict[str, float]]], tasks: Sequence[str], arms: Sequence[str],
    level: float, path: Path,
) -> None:
    """Success over simulator steps, a line per seed."""
    figure, axes = new_figure(3.4 * len(tasks), 3.2, len(tasks))
    for axis, task in zip(np.atleast_1d(axes), tasks, strict=True):
        for i, arm in enumerate(arms):
            for (name, of, seed), curve in curves.items():
                if (name, of) == (arm, task):
                    axis.plot([point["simulated"] for point in curve], [point["success"] for point in curve],
                              color=f"C{i}", alpha=0.7, linewidth=1, label=arm if seed == min(
                                  s for n, t, s in curves if (n, t) == (arm, task)) else None)
        axis.axhline(level, linestyle="--", color="grey", linewidth=0.8)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("simulator steps", fontsize=8)
        axis.set_ylim(0, 1.02)
    np.atleast_1d(axes)[0].set_ylabel("success, sampled", fontsize=8)
    np.atleast_1d(axes)[0].legend(fontsize=7, frameon=False)
    figure.savefig(path)
