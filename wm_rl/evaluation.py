"""Candidate against baseline on the same held-out trials: what ``evaluate`` and the end of ``train`` both do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.types import Policy, Trajectory, UserError
from sim.evaluation import Evaluation, compare, evaluate_policy
from sim.intervals import Interval
from sim.report import SuccessRow
from sim.vector import VectorEnv
from sim.video import write_film, write_video
from wm_rl.journal import Journal
from wm_rl.seeding import TRAINING_SEEDS

MODES = ("sampled", "greedy")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a policy is judged."""

    trials_per_task: int
    first_seed: int
    """Trials of a task use this episode seed and those after it; all below those of training."""
    modes: Sequence[str]
    """``sampled`` draws actions as in training, ``greedy`` takes the likeliest; the first decides the verdict."""
    videos_per_task: int

    def __post_init__(self) -> None:
        """Refuse trials that are none, or that training could have seen."""
        for name in ("trials_per_task", "videos_per_task"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.first_seed <= TRAINING_SEEDS - self.trials_per_task:
            raise UserError(f"evaluation.first_seed must lie in [0, {TRAINING_SEEDS - self.trials_per_task}], so that "
                            f"no goal was trained on; got {self.first_seed}")
        if not self.modes or not set(self.modes) <= set(MODES):
            raise UserError(f"evaluation.modes must be some of {', '.join(MODES)}, got {list(self.modes)}")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Evaluations by mode, of the candidate (``after``) and of the baseline (``before``, empty without one)."""

    after: Mapping[str, Evaluation]
    before: Mapping[str, Evaluation]

    @property
    def mode(self) -> str:
        """The mode that the verdict is about."""
        return next(iter(self.after))

    @property
    def difference(self) -> Interval | None:
        """Paired difference of success in the deciding mode; None without a baseline."""
        return self.differences(self.mode)[0] if self.before else None

    @property
    def better(self) -> bool | None:
        """True: better than the baseline. False: worse. None: not shown either way, or nothing to compare with."""
        difference = self.difference
        if difference is None or not difference.excludes_zero:
            return None
        return difference.low > 0

    def verdict(self) -> str:
        """One sentence for the top of the report."""
        trials, after = len(self.after[self.mode].trials), self.after[self.mode].success()
        if self.difference is None:
            return f"Success {after} over {trials} {self.mode} trials; no baseline to compare with."
        before = self.before[self.mode].success()
        word = {True: "Better than the baseline", False: "Worse than the baseline",
                None: "No difference from the baseline was shown"}[self.better]
        return (f"{word}: {self.mode} success {before.estimate:.2f} → {after.estimate:.2f}, paired difference "
                f"{self.difference} over {trials} held-out trials (95 % intervals).")

    def differences(self, mode: str) -> tuple[Interval, Mapping[str, Interval]]:
        """Paired differences over all trials and per task."""
        return compare(self.before[mode].trials, self.after[mode].trials)

    def rows(self) -> list[SuccessRow]:
        """One row for all tasks and one per task, in each mode."""
        rows = []
        for mode, after in self.after.items():
            before = self.before.get(mode)
            total, by_task = self.differences(mode) if before is not None else (None, {})
            rows.append(SuccessRow(name="all tasks", mode=mode, trials=len(after.trials), after=after.success(),
                                   before=before.success() if before is not None else None, difference=total))
            old = before.success_by_task() if before is not None else {}
            rows += [SuccessRow(name=task, mode=mode, trials=sum(t.task == task for t in after.trials), after=interval,
                                before=old.get(task), difference=by_task.get(task))
                     for task, interval in after.success_by_task().items()]
        return rows

    def summary(self) -> dict[str, Any]:
        """JSON-able: ``{mode: {task: {trials, before, after, difference}}}`` and the verdict."""
        success: dict[str, dict[str, Any]] = {mode: {} for mode in self.after}
        for row in self.rows():
            success[row.mode][row.name] = {
                "trials": row.trials, "after": asdict(row.after),
                "before": asdict(row.before) if row.before is not None else None,
                "difference": asdict(row.difference) if row.difference is not None else None}
        return {"verdict": self.verdict(), "better": self.better, "success": success,
                "trials": {name: {mode: [asdict(trial) for trial in evaluation.trials]
                                  for mode, evaluation in evaluations.items()}
                           for name, evaluations in (("before", self.before), ("after", self.after))}}


def judge(
    env: VectorEnv, candidate: Policy, baseline: Policy | None, config: EvaluationConfig, journal: Journal
) -> Judgement:
    """Play every trial with both policies in every mode."""
    judged: dict[str, dict[str, Evaluation]] = {"after": {}, "before": {}}
    for name, policy in (("before", baseline), ("after", candidate)):
        for mode in config.modes:
            if policy is None:
                continue
            title = f"{'baseline' if name == 'before' else 'candidate'} {mode}"
            total = config.trials_per_task * len(env.tasks)
            journal.say(f"evaluating the {title}: {total} trials")
            judged[name][mode] = evaluate_policy(
                env, policy, trials_per_task=config.trials_per_task, first_seed=config.first_seed,
                sample=mode == "sampled", keep=config.videos_per_task)
            journal.say(f"  success {judged[name][mode].success()}")
    return Judgement(**judged)


def write_videos(folder: Path, judgement: Judgement) -> dict[str, Path]:
    """One mp4 and one film strip per policy, of the deciding mode's first episodes of each task. Caption to mp4."""
    folder.mkdir(parents=True, exist_ok=True)
    videos = {}
    for name, evaluations in (("before", judgement.before), ("after", judgement.after)):
        episodes = evaluations[judgement.mode].episodes if evaluations else ()
        if episodes:
            caption = f"{name} ({judgement.mode}): {', '.join(dict.fromkeys(e.task for e in episodes))}"
            videos[caption] = folder / f"{name}.mp4"
            write_video(videos[caption], episodes)
            write_film(folder / f"{name}.png", episodes)
    return videos


def kept_episodes(judgement: Judgement) -> list[Trajectory]:
    """Held-out episodes of the candidate that were kept with their frames."""
    return list(judgement.after[judgement.mode].episodes)
