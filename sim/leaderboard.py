"""Contestants beside each other over tasks and seeds: interquartile means with stratified bootstrap (rliable)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float

from sim.figures import new_figure, png
from sim.intervals import Interval

REPETITIONS = 2000


def iqm(scores: Float[np.ndarray, "seeds tasks"], *, seed: int = 0) -> Interval:
    """Interquartile mean of all scores (arXiv 2108.13264), with a 95 % bootstrap interval that keeps every task."""
    from rliable import library, metrics  # late: importing it takes seconds

    logging.getLogger("absl").setLevel(logging.WARNING)  # rliable tells of every estimate
    # Whatever generator rliable is given, it draws from NumPy's global one.
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        estimates, intervals = library.get_interval_estimates(
            {"own": scores}, lambda values: np.array([metrics.aggregate_iqm(values)]), reps=REPETITIONS)
    finally:
        np.random.set_state(before)
    low, high = intervals["own"][:, 0].tolist()
    return Interval(estimate=float(estimates["own"][0]), low=low, high=high)


def profile(scores: Float[np.ndarray, "seeds tasks"], levels: Float[np.ndarray, " levels"]) -> np.ndarray:
    """Share of runs that score above each level."""
    return (scores[None] > levels[:, None, None]).mean(axis=(1, 2))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant in one regime."""

    name: str
    score: Interval
    success: Interval
    against_first: Interval | None
    """Interquartile mean of the paired differences to the first contestant of the regime."""
    wins: int
    """Pairs (task, seed) in which it is above the first."""
    pairs: int
    facts: Mapping[str, str]
    """Further columns."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """One regime."""

    title: str
    rows: Sequence[Row]
    profiles: Mapping[str, Float[np.ndarray, "seeds tasks"]]
    """Scores of each contestant."""
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """Score over episodes, mean over tasks and seeds."""
    usage: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """Utilisation over lag: what each objective would have used of the same batches."""


def write_leaderboard(file: Path, title: str, boards: Sequence[Board], notes: Sequence[str]) -> None:
    """One self-contained HTML page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "leaderboard.html.j2").read_text(encoding="utf-8"))
    page = template.render(title=title, notes=notes, boards=[(board, png(draw(board))) for board in boards])
    file.write_text(page, encoding="utf-8")


def draw(board: Board) -> Any:
    """Intervals, performance profiles, curves and utilisation of one regime, side by side."""
    figure, axes = new_figure(15, 3.6, columns=4)
    ranked = sorted(board.rows, key=lambda row: row.score.estimate)
    colours = {row.name: f"C{i}" for i, row in enumerate(board.rows)}
    for place, row in enumerate(ranked):
        axes[0].plot([row.score.low, row.score.high], [place, place], color=colours[row.name], linewidth=4, alpha=0.5)
        axes[0].plot(row.score.estimate, place, "o", color=colours[row.name])
    axes[0].set_yticks(range(len(ranked)), [row.name for row in ranked], fontsize=8)
    axes[0].set(title="return, IQM with 95 % interval", xlabel="mean reward per step, of at most 1")
    levels = np.linspace(0, 1, 101)
    for name, scores in board.profiles.items():
        axes[1].plot(levels, profile(scores, levels), color=colours[name], linewidth=1.6)
    axes[1].set(title="performance profile", xlabel="return", ylabel="share of runs above")
    for name, (x, y) in board.curves.items():
        axes[2].plot(x, y, color=colours[name], linewidth=1.4, label=name)
    axes[2].set(title="return while training", xlabel="episodes")
    axes[2].legend(fontsize=7, frameon=False)
    for name, (x, y) in board.usage.items():
        axes[3].plot(x, y, "o-", linewidth=1.4, markersize=4, label=name)
    axes[3].set(title="utilisation of the same batches", xlabel="lag, in updates", ylim=(-0.03, 1.03))
    if board.usage:
        axes[3].legend(fontsize=7, frameon=False)
    return figure
