"""``python main.py evaluate``: seeded trials of a policy, paired with those of a baseline."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from data.types import UserError
from sim.perturbation import Perturbation
from sim.report import ReportData, write_report
from sim.vector import VectorEnv
from wm_rl.evaluation import EvaluationConfig, judge, write_videos
from wm_rl.journal import Journal
from wm_rl.policy import TinyVLA, check_compatible
from wm_rl.robustness import judge_perturbed, summary


def evaluate(
    *,
    folder: str,
    candidate: str,
    baseline: str | None,
    gate: bool,
    env: Callable[[], VectorEnv],
    evaluation: EvaluationConfig,
    perturbations: Mapping[str, Perturbation],
) -> int:
    """Write ``summary.json``, ``videos/`` and ``report.html`` to ``folder``. With ``gate``, 1 unless it is better.

    ``perturbations``: by name, what the candidate is tried under besides.

    Raises:
        UserError: a checkpoint that is missing or does not fit the environment, a gate without a baseline, an
            environment that cannot be perturbed.
    """
    if gate and baseline is None:
        raise UserError("gate=true compares with a baseline: type baseline=<folder of a policy>")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    learned = TinyVLA.load(Path(candidate))
    reference = TinyVLA.load(Path(baseline)) if baseline is not None else None
    world = env()
    try:
        for policy in (learned, reference):
            if policy is not None:
                check_compatible(policy, spec=world.spec, statistics=world.statistics, what="environment")
        judgement = judge(world, learned, reference, evaluation, journal)
        perturbed = judge_perturbed(world, learned, judgement.after[judgement.mode], perturbations, evaluation,
                                    journal) if perturbations else []
    finally:
        world.close()
    videos = write_videos(run / "videos", judgement)
    (run / "summary.json").write_text(json.dumps(
        {**judgement.summary(), "perturbations": summary(perturbed), "candidate": candidate, "baseline": baseline},
        indent=2))
    write_report(run / "report.html", ReportData(
        title=f"Evaluation of {candidate}", verdict=judgement.verdict(), passed=judgement.better,
        success=judgement.rows(), perturbed=perturbed, videos=videos))
    journal.say(f"[bold]{judgement.verdict()}[/bold]\nreport: {run / 'report.html'}")
    return 1 if gate and not judgement.better else 0
