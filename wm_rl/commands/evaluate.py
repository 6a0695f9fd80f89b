"""``python main.py evaluate``: is this policy good enough, and better than that one?"""

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
    policy: str,
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
    candidate = TinyVLA.load(Path(policy))
    reference = TinyVLA.load(Path(baseline)) if baseline is not None else None
    world = env()
    try:
        for learned in (candidate, reference):
            if learned is not None:
                check_compatible(learned, spec=world.spec, statistics=world.statistics, what="environment")
        judgement = judge(world, candidate, reference, evaluation, journal)
    finally:
        world.close()
    videos = write_videos(run / "videos", judgement)
    (run / "summary.json").write_text(json.dumps(
        {**judgement.summary(), "policy": policy, "baseline": baseline}, indent=2))
    write_report(run / "report.html", ReportData(
        title=f"Evaluation of {policy}", verdict=judgement.verdict(), passed=judgement.better,
        success=judgement.rows(), videos=videos))
    journal.say(f"[bold]{judgement.verdict()}[/bold]\nreport: {run / 'report.html'}")
    return 1 if gate and not judgement.better else 0
