"""``python main.py benchmark suite=gridworld``: every objective on the 2 x 2 grid, by enumeration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data.types import UserError
from sim.figures import new_figure
from wm_rl.gridworld import analyse, divergence, evaluate, path, random_pair
from wm_rl.journal import Journal
from wm_rl.objectives import Gipo, NoClip, Objective, PpoClip, Sapo, TruncatedIs

_WIDTHS = np.logspace(-1, 1, 41)
FAMILIES: Mapping[str, Sequence[Objective]] = {
    "GIPO, β": [Gipo(beta=width) for width in _WIDTHS],
    "Laplacian kernel, β": [Gipo(beta=width, kernel="laplacian") for width in _WIDTHS],
    "Cauchy kernel, β": [Gipo(beta=width, kernel="cauchy") for width in _WIDTHS],
    "PPO, ε": [PpoClip(epsilon=width) for width in _WIDTHS],
    "SAPO, τ": [Sapo(tau_positive=1 / width, tau_negative=1.05 / width) for width in _WIDTHS],
    "truncated IS, cap": [TruncatedIs(cap=width) for width in _WIDTHS],
    "no clip": [NoClip()]}
"""Each family over the width of its trust, 0.1 to 10."""


@dataclass(frozen=True, kw_only=True)
class GridPath:
    """The target, and how old the behaviours are."""

    target_step: int
    rate: float
    lags: Sequence[int]

    def __post_init__(self) -> None:
        """Refuse a behaviour from before the beginning."""
        if not self.lags or not all(0 <= lag <= self.target_step for lag in self.lags):
            raise UserError(f"path.lags: expected numbers from 0 to path.target_step={self.target_step}, "
                            f"got {list(self.lags)}")


def benchmark_gridworld(
    *, folder: str, path: GridPath, objectives: Mapping[str, Objective], batches: Sequence[int], random_pairs: int,
    random_distance: float, seed: int,
) -> int:
    """Print the tables, write ``results.json`` and ``gridworld.png``."""
    run = Path(folder)
    run.mkdir(parents=True, exist_ok=True)
    journal = Journal(run, [], enabled=True)
    results = _on_path(path, objectives, batches)
    results["random_pairs"] = _on_random_pairs(objectives, random_pairs, random_distance, seed)
    results["collapse"] = _collapse(path)
    for lag in path.lags:
        journal.console.print(_table(results["lags"][str(lag)], lag, batches))
    journal.console.print(_random_table(results["random_pairs"], random_pairs))
    journal.say(f"PPO (ε = 0.2) uses nothing at all from lag {results['collapse']} on")
    (run / "results.json").write_text(json.dumps(results, indent=2))
    _plot(run / "gridworld.png", path)
    journal.say(f"results: {run / 'results.json'}, plot: {run / 'gridworld.png'}")
    return 0


def _on_path(grid: GridPath, objectives: Mapping[str, Objective], batches: Sequence[int]) -> dict[str, Any]:
    policies = path(grid.target_step, grid.rate)
    target = policies[-1]
    advantage, share = evaluate(target)
    lags: dict[str, Any] = {}
    for lag in grid.lags:
        behaviour = policies[grid.target_step - lag]
        rows = {}
        for name, objective in objectives.items():
            found = analyse(objective, target, behaviour)
            rows[name] = {**asdict(found), **{f"mse_{batch}": found.mean_squared_error(batch) for batch in batches}}
        lags[str(lag)] = {"divergence": divergence(target, behaviour), "objectives": rows}
    return {"true_gradient": float(np.linalg.norm(share[:, None] * target * advantage)), "lags": lags}


def _on_random_pairs(
    objectives: Mapping[str, Objective], pairs: int, distance: float, seed: int
) -> dict[str, dict[str, float]]:
    """Medians over pairs, errors relative to the true gradient, and in how many pairs nothing at all was used."""
    rng = np.random.default_rng(seed)
    drawn = [random_pair(rng, distance) for _ in range(pairs)]
    table = {}
    for name, objective in objectives.items():
        found = [analyse(objective, *pair) for pair in drawn]
        lengths = [np.linalg.norm(share[:, None] * target * advantage)
                   for target, _ in drawn for advantage, share in [evaluate(target)]]
        table[name] = {
            "bias": float(np.median([a.bias / n for a, n in zip(found, lengths, strict=True)])),
            "variance": float(np.median([a.variance / n**2 for a, n in zip(found, lengths, strict=True)])),
            "cosine": float(np.median([a.cosine for a in found])),
            "utilisation": float(np.median([a.utilisation for a in found])),
            "unused": sum(a.utilisation == 0 for a in found)}
    return table


def _collapse(grid: GridPath) -> int | None:
    """First lag from which PPO uses nothing, at any later lag either."""
    policies = path(grid.target_step, grid.rate)
    used = [analyse(PpoClip(epsilon=0.2), policies[-1], policies[grid.target_step - lag]).utilisation
            for lag in range(grid.target_step + 1)]
    last = max((lag for lag, share in enumerate(used) if share > 0), default=-1)
    return last + 1 if last < grid.target_step else None


def _table(found: dict[str, Any], lag: int, batches: Sequence[int]) -> Table:
    table = Table("objective", "bias", "variance", "cosine", *(f"MSE, N={batch}" for batch in batches), "used",
                  title=f"lag {lag} (KL {found['divergence']:.3f})")
    for name, row in found["objectives"].items():
        table.add_row(name, f"{row['bias']:.4f}", f"{row['variance']:.4f}", f"{row['cosine']:.3f}",
                      *(f"{row[f'mse_{batch}']:.5f}" for batch in batches), f"{row['utilisation']:.3f}")
    return table


def _random_table(found: dict[str, dict[str, float]], pairs: int) -> Table:
    table = Table("objective", "bias / |g|", "variance / |g|²", "cosine", "utilisation", "pairs without use",
                  title=f"{pairs} random pairs of policies, medians")
    for name, row in found.items():
        table.add_row(name, f"{row['bias']:.3f}", f"{row['variance']:.3g}", f"{row['cosine']:.3f}",
                      f"{row['utilisation']:.3f}", f"{row['unused']:.0f}")
    return table


def _plot(file: Path, grid: GridPath) -> None:
    """Bias against variance of every family at the largest lag, and utilisation over lags."""
    policies = path(grid.target_step, grid.rate)
    target, lag = policies[-1], max(grid.lags)
    figure, (pareto, usage) = new_figure(10, 4, columns=2)
    for name, family in FAMILIES.items():
        found = [analyse(objective, target, policies[grid.target_step - lag]) for objective in family]
        pareto.plot([a.bias for a in found], [a.variance for a in found], "." if len(found) == 1 else "-", label=name,
                    linewidth=1.8, markersize=12)
    pareto.set(xlabel="bias", ylabel="variance of one sample", title=f"lag {lag}: each family over its width")
    pareto.legend(frameon=False, fontsize=8)
    lags = range(grid.target_step + 1)
    shown: dict[str, Objective] = {"PPO, ε = 0.2": PpoClip(epsilon=0.2), "PPO, ε = 1": PpoClip(epsilon=1.0),
             "SAPO": Sapo(tau_positive=1.0, tau_negative=1.05), "GIPO, β = 0.5": Gipo(beta=0.5),
             "GIPO, β = 1": Gipo(beta=1.0), "truncated IS, cap 1": TruncatedIs(cap=1.0)}
    for name, objective in shown.items():
        usage.plot(lags, [analyse(objective, target, policies[grid.target_step - lag]).utilisation for lag in lags],
                   label=name, linewidth=1.8)
    usage.set(xlabel="lag, in gradient steps", ylabel="utilisation (coefficient > 0.1)", ylim=(-0.03, 1.03))
    usage.legend(frameon=False, fontsize=8)
    figure.savefig(file)
