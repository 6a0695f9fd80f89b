"""A policy under perturbation: the trials of its evaluation again, one thing different at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from data.types import Policy, Success, UserError
from sim.evaluation import Evaluation, TaskEnv, compare, evaluate_policy
from sim.perturbation import Perturbable, Perturbation
from sim.report import PerturbedRow
from wm_rl.evaluation import EvaluationConfig
from wm_rl.journal import Journal


def judge_perturbed(
    env: TaskEnv, candidate: Policy, nominal: Evaluation, suite: Mapping[str, Perturbation], config: EvaluationConfig,
    journal: Journal,
) -> list[PerturbedRow]:
    """Play the first mode's trials once more under each perturbation of ``suite`` that ``env`` has.

    ``nominal``: the same trials unperturbed, with an episode kept. Those that ``env`` lacks are named and left out.

    Raises:
        UserError: an environment that cannot be perturbed.

    """
    if not isinstance(env, Perturbable) or not env.factors:
        raise UserError("this environment cannot be perturbed; type perturbations=none")
    lacking = {name: set(perturbation.changes) - set(env.factors) for name, perturbation in suite.items()}
    missing = sorted(name for name, factors in lacking.items() if factors)
    if missing:
        journal.say(f"left out, as this simulator has no such thing: {', '.join(missing)}")
    mode, usual = config.modes[0], env.perturbation
    rows = [_row("unperturbed", nominal, nominal)]
    with journal.progress("perturbed", len(suite) - len(missing)) as bar:
        for name, perturbation in suite.items():
            if name in missing:
                continue
            env.perturb(replace(usual, **perturbation.changes))
            rows.append(_row(name, nominal, evaluate_policy(
                env, candidate, trials_per_task=config.trials_per_task, first_seed=config.first_seed,
                sample=mode == "sampled", keep=1)))
            bar.advance(note=f"{name} {rows[-1].success.estimate:.2f}")
    env.perturb(usual)
    for row in rows:
        journal.say(f"  {row.name}: success {row.success}, difference {row.difference}")
    return rows


def summary(rows: list[PerturbedRow]) -> dict[str, dict[str, Any]]:
    """JSON-able: ``{name: {trials, success, difference}}``."""
    return {row.name: {"trials": row.trials, "success": asdict(row.success), "difference": asdict(row.difference)}
            for row in rows}


def _row(name: str, nominal: Evaluation, perturbed: Evaluation) -> PerturbedRow:
    episode = perturbed.episodes[0]
    frames = next(iter(episode.frames.values()))
    said = "solved" if episode.success is Success.YES else "failed"
    return PerturbedRow(
        name=name, trials=len(perturbed.trials), success=perturbed.success(),
        difference=compare(nominal.trials, perturbed.trials)[0], frame=frames[0],
        caption=f"{name}: {episode.instruction} ({said})")
