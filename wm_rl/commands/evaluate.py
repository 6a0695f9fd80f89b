"""``python main.py evaluate``: seeded trials of a policy, paired with those of a baseline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from data.types import UserError
from sim.report import ReportData, write_report
from sim.vector import VectorEnv
from wm_rl.evaluation import EvaluationConfig, judge, write_videos
from wm_rl.journal import Journal
from wm_rl.policy import TinyVLA, check_compatible


def evaluate(
    *,
    folder: str,
    candidate: str,
    baseline: str | None,
    gate: bool,
    env: Callable[[], VectorEnv],
    evaluation: EvaluationConfig,
) -> int:
    """Write ``summary.json``, ``videos/`` and ``report.html`` to ``folder``. With ``gate``, 1 unless it is better.

    Raises:
        UserError: a checkpoint that is missing or does not fit the environment, a gate without a baseline.
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
    finally:
        world.close()
    videos = write_videos(run / "videos", judgement)
    (run / "summary.json").write_text(json.dumps(
        {**judgement.summary(), "candidate": candidate, "baseline": baseline}, indent=2))
    write_report(run / "report.html", ReportData(
        title=f"Evaluation of {candidate}", verdict=judgement.verdict(), passed=judgement.better,
        success=judgement.rows(), videos=videos))
    journal.say(f"[bold]{judgement.verdict()}[/bold]\nreport: {run / 'report.html'}")
    return 1 if gate and not judgement.better else 0
