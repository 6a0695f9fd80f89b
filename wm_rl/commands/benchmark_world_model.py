"""``python main.py benchmark suite=world_model``: record, fit every variant on every seed, clone policies, measure.

Everything is written as it is made, so a benchmark that was stopped goes on with the same ``hydra.run.dir``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from data.budget import StoreConfig
from data.store import ReplayStore
from data.types import UserError
from sim.expert import ExpertConfig
from sim.vector import VectorEnv
from wm_rl.cloning import CloningConfig, clone
from wm_rl.commands.collect import collect
from wm_rl.commands.evaluate_world_model import evaluate_world_model
from wm_rl.journal import Journal
from wm_rl.policy import TinyVLA, TinyVLAConfig
from wm_rl.workers import one_core_each
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.learner import WorldModelLearner


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Episodes of the scripted expert, going astray, or of a policy that was cloned from these."""

    store: str
    """Name of the store in the run's folder; recordings with the same name add to it."""
    episodes: int
    seed: int
    expert: ExpertConfig | None = None
    policy: int | None = None
    """Cloning steps of the policy that acts, one of those that are kept; None: the expert does."""
    unseen: bool = False
    """Of the tasks that the models do not see."""

    def __post_init__(self) -> None:
        """Refuse what nobody or two would act in."""
        if (self.expert is None) == (self.policy is None):
            raise UserError(f"a recording is either an expert's or a policy's, got expert={self.expert} and "
                            f"policy={self.policy}")


def benchmark_world_model(
    *, folder: str, seeds: Sequence[int], env: Callable[[], VectorEnv], unseen_env: Callable[[], VectorEnv],
    recordings: Sequence[Recording], storage: StoreConfig, variants: Mapping[str, WorldModelConfig],
    policy: TinyVLAConfig, cloning: CloningConfig, policies: Sequence[int], trials_per_task: int, first_seed: int,
    starts: int, imagination: ImaginationConfig, compiled: bool,
    jobs: int,
) -> int:
    """The first variant is the model, the others its rivals; ``policies``: cloning steps after which one is kept.

    Policies are cloned from what the expert recorded, before any of them records.

    Raises ``UserError`` when there is nothing to fit, or a recording's policy is not kept.
    """
    if not seeds or not variants or jobs < 1:
        raise UserError("suite=world_model needs at least one seed, one variant and one job")
    for recording in recordings:
        if recording.policy is not None and recording.policy not in policies:
            raise UserError(f"a recording's policy is one of {list(policies)} (policies), got {recording.policy}")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    for recording in (each for each in recordings if each.policy is None):
        _record(run, recording, unseen_env if recording.unseen else env, storage)
    _clone_policies(run, policy, cloning, policies, journal)
    for recording in (each for each in recordings if each.policy is not None):
        _record(run, recording, unseen_env if recording.unseen else env, storage)
    cells = [(name, seed) for seed in seeds for name in variants]
    todo = [(name, seed) for name, seed in cells if not (_folder(run, name, seed) / "fit.json").is_file()]
    with journal.progress("fits", len(cells)) as bar:
        bar.advance(len(cells) - len(todo))
        with one_core_each(jobs) as pool:
            waiting = [pool.submit(_fit, run / "recorded.zarr", _folder(run, name, seed), variants[name], seed)
                       for name, seed in todo]
            try:
                for future, (name, seed) in zip(waiting, todo, strict=True):
                    bar.advance(note=f"{name}, seed {seed}: {future.result():.0f} CPU-s")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    first, *others = variants
    return evaluate_world_model(
        folder=folder, models=[str(_folder(run, first, seed)) for seed in seeds],
        rivals={name: [str(_folder(run, name, seed)) for seed in seeds] for name in others},
        store=str(run / "held_out.zarr"), held_out=1.0, unseen=str(run / "unseen.zarr"),
        policies=[str(run / "policies" / str(steps)) for steps in policies], env=env,
        trials_per_task=trials_per_task, first_seed=first_seed, starts=starts, imagination=imagination, speed=True,
        compiled=compiled, seed=0)


def _record(run: Path, recording: Recording, env: Callable[[], VectorEnv], storage: StoreConfig) -> None:
    path, mark = run / f"{recording.store}.zarr", run / f"{recording.store}-{recording.seed}.done"
    if mark.is_file():
        return
    if path.exists():  # what a killed recording left goes; whole ones before it stay
        whole = [json.loads(each.read_text()) for each in run.glob(f"{recording.store}-*.done")]
        with closing(ReplayStore.open(path, storage)) as store:
            store.rollback(max(whole, key=lambda position: sum(position.values()), default={}))
    actor = "expert" if recording.policy is None else str(run / "policies" / str(recording.policy))
    collect(seed=recording.seed, env=env, expert=recording.expert or ExpertConfig(), actor=actor,
            episodes=recording.episodes, sample=True, storage=storage, store=str(path), lerobot=None, rosbag=None,
            format="v2.1")
    mark.write_text(json.dumps(ReplayStore.open(path).position))


def _folder(run: Path, name: str, seed: int) -> Path:
    return run / "models" / f"{name.replace(' ', '_')}-{seed}"


def _fit(store: Path, folder: Path, config: WorldModelConfig, seed: int) -> float:
    """Fit one model; CPU seconds of it."""
    replay = ReplayStore.open(store)
    learner = WorldModelLearner(config, spec=replay.spec, statistics=replay.statistics, seed=seed)
    begun = time.process_time()
    metrics = learner.fit(replay, config.steps)
    seconds = time.process_time() - begun
    learner.save_pretrained(folder)
    (folder / "fit.json").write_text(json.dumps({"cpu_seconds": seconds, **metrics}, indent=1))
    return seconds


def _clone_policies(
    run: Path, policy: TinyVLAConfig, cloning: CloningConfig, kept: Sequence[int], journal: Journal
) -> None:
    """Policies of different quality: one clone, kept after more and more steps."""
    if not kept or all((run / "policies" / str(steps)).is_dir() for steps in kept):
        return
    replay = ReplayStore.open(run / "recorded.zarr")
    learned = TinyVLA(policy, spec=replay.spec, statistics=replay.statistics, seed=0)
    with journal.progress("clone", cloning.steps) as bar:
        def log(step: int, metrics: dict[str, float]) -> None:
            bar.advance(note=f"accuracy {metrics['accuracy']:.2f}")
            if step + 1 in kept:
                learned.save(run / "policies" / str(step + 1))

        clone(learned, replay, cloning, seed=0, device=torch.device("cpu"), log=log)
