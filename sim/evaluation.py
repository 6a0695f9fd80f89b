"""Seeded evaluation: the same trials for every policy, so that two policies can be compared pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from data.outcome import steps_until_decided
from data.rollout import rollout
from data.types import Env, Policy, Success, Trajectory, UserError
from sim.intervals import Interval, paired_difference, wilson


@runtime_checkable
class TaskEnv(Env, Protocol):
    """An Env whose rows each play a task known beforehand, like ``sim.vector.VectorEnv``."""

    @property
    def row_tasks(self) -> Sequence[str]:
        """The task of each row."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One episode of an evaluation."""

    task: str
    seed: int
    success: bool
    steps: int
    """Control steps until the episode ended."""
    return_: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Trials in order of task and seed, and the first few episodes of each task for a video."""

    trials: tuple[Trial, ...]
    episodes: tuple[Trajectory, ...]

    def success(self) -> Interval:
        """Success over all trials with its Wilson interval."""
        return wilson(sum(trial.success for trial in self.trials), len(self.trials))

    def success_by_task(self) -> dict[str, Interval]:
        """Return the same per task."""
        chosen: dict[str, list[bool]] = {}
        for trial in self.trials:
            chosen.setdefault(trial.task, []).append(trial.success)
        return {task: wilson(sum(wins), len(wins)) for task, wins in chosen.items()}


def evaluate_policy(
    env: TaskEnv,
    policy: Policy,
    *,
    trials_per_task: int,
    first_seed: int,
    sample: bool,
    keep: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Evaluation:
    """Play ``trials_per_task`` episodes of every task that ``env`` has, seeds ``first_seed`` upwards for each.

    Which row plays which seed does not change the outcome, so evaluations on different numbers of rows pair up.

    Args:
        env: Where to play.
        policy: Who acts.
        trials_per_task: Episodes of each task.
        first_seed: First episode seed; choose it away from the seeds that were trained on.
        sample: Draw actions (True) or take the greedy ones.
        keep: Episodes of each task, lowest seeds first, that come back with their frames.
        on_step: Called after each control step with the number of rows that played it.

    Raises:
        UserError: when ``trials_per_task`` is below 1.

    """
    if trials_per_task < 1:
        raise UserError(f"expected at least one trial per task, got {trials_per_task}; type e.g. trials_per_task=50")
    seeds = share_seeds(env.row_tasks, range(first_seed, first_seed + trials_per_task))
    trials, episodes = [], []
    for episode in rollout(env, policy, seeds, sample=sample, on_step=on_step):
        seed, steps = episode.provenance["seed"], steps_until_decided(episode.terminated)
        trials.append(Trial(task=episode.task, seed=seed, success=episode.success is Success.YES,
                            steps=steps, return_=float(episode.reward[:steps].sum())))
        if seed < first_seed + keep:
            episodes.append(episode)
    return Evaluation(
        trials=tuple(sorted(trials, key=lambda trial: (trial.task, trial.seed))),
        episodes=tuple(sorted(episodes, key=lambda episode: (episode.task, episode.provenance["seed"]))),
    )


def share_seeds(row_tasks: Sequence[str], seeds: Sequence[int]) -> list[list[int]]:
    """Deal ``seeds`` of each task to the rows that play it: every task gets every seed once."""
    shares: list[list[int]] = [[] for _ in row_tasks]
    for task in dict.fromkeys(row_tasks):
        rows = [row for row, name in enumerate(row_tasks) if name == task]
        for index, seed in enumerate(seeds):
            shares[rows[index % len(rows)]].append(seed)
    return shares


def compare(before: Sequence[Trial], after: Sequence[Trial]) -> tuple[Interval, Mapping[str, Interval]]:
    """Paired difference ``after - before`` over all trials and per task.

    Raises:
        UserError: unless both evaluations played the same tasks and seeds.

    """
    old = {(trial.task, trial.seed): trial.success for trial in before}
    new = {(trial.task, trial.seed): trial.success for trial in after}
    if old.keys() != new.keys() or len(old) != len(before):
        missing = sorted(old.keys() ^ new.keys())
        raise UserError("expected both evaluations to play the same tasks and seeds, "
                        f"{len(missing)} trials have no partner, e.g. {missing[:1]}; evaluate both alike")
    pairs = sorted(old)
    total = paired_difference([old[pair] for pair in pairs], [new[pair] for pair in pairs])
    by_task = {
        task: paired_difference([old[pair] for pair in pairs if pair[0] == task],
                                [new[pair] for pair in pairs if pair[0] == task])
        for task in dict.fromkeys(task for task, _ in pairs)
    }
    return total, by_task
