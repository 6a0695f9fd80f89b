"""The closed loop as a list of stages: record, ingest, demonstrate, clone, prefill, fit, improve, evaluate.

Each stage leaves its results in the run's folder and ends with a checkpoint, so a run that was killed anywhere goes on
from the last whole stage (or, inside ``improve``, from the last whole iteration) as if it had never stopped. Stages
that use a simulator run on the first rank; updates run on all of them, each drawing its own share of the batch.

    <run>/logs/          what the robot stand-in recorded, as LeRobot files (absent when ``loop.logs`` names yours)
    <run>/replay.zarr    everything learned from, tagged by source, behaviour and policy version
    <run>/warm_start/    the cloned policy       <run>/policy/        the trained one
    <run>/behaviour.json how good the log-probs estimated for logs are
    <run>/checkpoints/   the resume point        <run>/metrics.jsonl  every number logged
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.markup import escape

from data.budget import StoreConfig
from data.lerobot_writer import write_lerobot
from data.logs.ingest import IngestConfig, ingest
from data.rollout import rollout
from data.sampler import ReplayConfig, has_outcomes
from data.store import BeingWrittenError, Position, ReplayStore
from data.types import Env, Policy, Source, Trajectory, UserError
from sim.expert import ExpertConfig, ScriptedExpert
from sim.vector import VectorEnv
from wm_rl import interrupts
from wm_rl.behaviour import hold_out, label_unknown_behaviour, without
from wm_rl.checkpoint import load_checkpoint, save_checkpoint
from wm_rl.cloning import CloningConfig, clone
from wm_rl.curriculum import ORDERS
from wm_rl.journal import Journal
from wm_rl.learner import LearnerConfig
from wm_rl.objectives import Objective
from wm_rl.policy import TinyVLA, TinyVLAConfig, check_compatible
from wm_rl.seeding import training_episode
from wm_rl.trust import Trust
from world_model.audit import Drift
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.label import label_outcomes
from world_model.learner import WorldModelLearner

STAGES = ("record", "ingest", "demonstrate", "clone", "prefill", "fit", "improve")

_ENDING = 20.0
"""Seconds that a killed run's processes are given to end before its store is used again."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How much of everything."""

    iterations: int
    episodes_per_iteration: int
    """Simulated episodes collected before each round of updates."""
    updates_per_iteration: int
    logs: str | None
    """Folder of LeRobot logs; null records the robot stand-in."""
    log_episodes_per_task: int
    demonstrations_per_task: int
    prefill_episodes: int
    branches_per_iteration: int
    """Imagined trajectories per iteration."""
    refit_every: int
    """Iterations between later fits of the world model."""
    warm_start: str | None
    """Folder of a policy to begin from; null clones one from logs and demonstrations."""
    keep_checkpoints: int
    collect_tasks: str = "even"
    """Tasks that episodes are collected of: ``even``, or ``failures``: those more often that the policy fails at."""

    def __post_init__(self) -> None:
        """Refuse counts that make no run."""
        for name in ("iterations", "episodes_per_iteration", "updates_per_iteration", "log_episodes_per_task",
                     "demonstrations_per_task",
                     "prefill_episodes", "branches_per_iteration", "refit_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"loop.{name} must be at least 1, got {getattr(self, name)}")
        if self.collect_tasks not in ORDERS:
            raise UserError(f"loop.collect_tasks must be one of {', '.join(ORDERS)}, got {self.collect_tasks!r}")


class Loop:
    """One run. ``run()`` does what is left of it."""

    def __init__(
        self,
        *,
        folder: Path,
        seed: int,
        config: LoopConfig,
        env: Callable[[], VectorEnv],
        stand_in: Callable[[], VectorEnv],
        expert: ExpertConfig,
        logs: IngestConfig,
        policy: TinyVLAConfig,
        objective: Objective,
        replay: ReplayConfig,
        storage: StoreConfig,
        trust: Trust,
        learner: LearnerConfig,
        cloning: CloningConfig,
        world_model: WorldModelConfig,
        imagination: ImaginationConfig,
        fabric: Fabric,
        journal: Journal,
    ) -> None:
        """Nothing is built before it is needed, except what tells early that the settings do not fit."""
        self.folder, self.seed, self.config = folder, seed, config
        self.make_env, self.make_stand_in, self.expert = env, stand_in, expert
        self.logs_config = logs
        self.policy_config, self.objective, self.replay, self.storage = policy, objective, replay, storage
        self.trust, self.learner_config, self.cloning, self.world_model_config = trust, learner, cloning, world_model
        self.imagination_config, self.fabric, self.journal = imagination, fabric, journal
        self.imagines = replay.mix[Source.IMAGINED] > 0
        self.uses_logs = replay.mix[Source.REAL] > 0
        self.progress: dict[str, Any] = {"stage": 0, "iteration": 0, "seconds": {}, "position": {},
                                         "drift": asdict(Drift())}
        self.saved: dict[str, Any] = {}
        self._opened: ReplayStore | None = None
        self.policy: TinyVLA | None = None
        self.world_model: WorldModelLearner | None = None

    def run(self, improve: Callable[[Loop], None]) -> None:
        """All stages that are not done yet; ``improve`` is the last one, in one process or spread over many."""
        self._restore()
        for number in range(self.progress["stage"], len(STAGES) - 1):
            if self.fabric.is_global_zero:
                getattr(self, f"_{STAGES[number]}")()
                self.progress["stage"] = number + 1
                self.save()
                interrupts.check()
            self.fabric.barrier()
        if not self.fabric.is_global_zero:
            self._restore()
        improve(self)

    # -- stages, in order -------------------------------------------------------------------------------------------

    def _record(self) -> None:
        """Log episodes of the robot stand-in as LeRobot files, unless the user brought logs or wants none."""
        if self.config.logs is not None or not self.uses_logs:
            return
        with self.timed("record"), self._closing(self.make_stand_in()) as stand_in:
            episodes = self.config.log_episodes_per_task * len(stand_in.tasks)
            expert = ScriptedExpert(stand_in, self.expert)
            recorded = self.roll(stand_in, expert, episodes, "record", title="stand-in logs")
            partial, whole = self.folder / "logs.partial", self.folder / "logs"
            for left_behind in (partial, whole):  # by an attempt that was killed
                shutil.rmtree(left_behind, ignore_errors=True)
            write_lerobot(partial, recorded, spec=stand_in.spec, statistics=stand_in.statistics,
                          fps=stand_in.spec.control_hz, version="v2.1")
            partial.rename(whole)
        self._report_success("the robot stand-in recorded", recorded)

    def _ingest(self) -> None:
        """Logs become episodes of source ``real``; behaviour unknown until a clone estimates it."""
        store = self._create_store()
        if not self.uses_logs:
            self.journal.say("replay.mix.real=0: no logs are used")
            return
        with self.timed("ingest"), self.journal.stages() as watch:
            source = Path(self.config.logs) if self.config.logs is not None else self.folder / "logs"
            report = ingest(source, store.path, self.logs_config, storage=self.storage, watch=watch)
            store.refresh()
        for line in report.lines():
            self.journal.say(escape(line))

    def _demonstrate(self) -> None:
        """The scripted expert shows each task in the simulator."""
        with self.timed("demonstrate"), self._closing(self.make_env()) as env:
            episodes = self.config.demonstrations_per_task * len(env.tasks)
            expert = ScriptedExpert(env, self.expert)
            shown = self.roll(env, expert, episodes, "demonstrate", title="demonstrations")
            self.store().append(shown)
        self._report_success("the scripted expert showed", shown)

    def _clone(self) -> None:
        """A warm start: cloned here, or read from a folder. It also labels whatever came without log-probs."""
        store = self.store()
        with self.timed("clone"):
            policy = self._warm_policy(store)
            policy.save(self.folder / "warm_start")
            self.progress["warm_start"] = _sha256(self.folder / "warm_start" / "policy.safetensors")
            report = label_unknown_behaviour(policy, store, hold_out(store, self.cloning.held_out, self.seed))
        self.policy = policy
        for line in report.lines():
            self.journal.say(line)
        (self.folder / "behaviour.json").write_text(json.dumps(report.to_dict(), indent=1))

    def _prefill(self) -> None:
        """The warm start acts, so that replay holds what the policy itself does."""
        with self.timed("prefill"), self._closing(self.make_env()) as env:
            acted = self.roll(env, self.trained_policy(), self.config.prefill_episodes, "prefill", title="prefill")
            self.store().append(acted)
        self._report_success("the warm start acted", acted)

    def _fit(self) -> None:
        """First fit of the world model and the success model."""
        if not self.imagines:
            self.journal.say("replay.mix.imagined=0: no world model is trained" + (
                ", so no outcome is labelled" if self.replay.outcome_labels else ""))
            return
        with self.timed("world_model"):
            store = self.store()
            self.world_model = WorldModelLearner(
                self.world_model_config, spec=store.spec, statistics=store.statistics, seed=self.seed,
                device=str(self.fabric.device))
            self.fit_world_model(self.world_model_config.steps, "world model")
        if self.replay.outcome_labels:
            rule = self.imagination_config
            for line in label_outcomes(store, self.model().success_model(), threshold=rule.success_threshold,
                                       success_frames=rule.success_frames).lines():
                self.journal.say(line)

    # -- parts of stages --------------------------------------------------------------------------------------------

    def mixture(self, store: ReplayStore) -> ReplayConfig:
        """What updates draw: no logs where none says how it ended. They are cloned and modelled all the same."""
        seen = store.with_outcome_labels() if self.replay.outcome_labels else store
        if not self.uses_logs or has_outcomes(seen, Source.REAL):
            return self.replay
        self.journal.say("no log has a known success: updates draw none of them (the world model and the clone do)")
        return replace(self.replay, mix={**self.replay.mix, Source.REAL.value: 0.0})

    def fit_world_model(self, steps: int, title: str | None) -> None:
        """Fit the world model ``steps`` further on the store; with a ``title`` a progress bar shows it."""
        model, store = self.model(), self.store()
        if title is None:
            metrics = model.fit(store, steps)
        else:
            both = steps + round(steps * self.world_model_config.success_ratio)
            with self.journal.progress(title, both) as bar:
                metrics = model.fit(store, steps, log=lambda step, values: bar.advance())
        self.journal.record("world_model", model.version - 1, metrics)
        if metrics["world_model/undone"]:
            self.journal.say("this refit made the world model worse; it was undone")

    def _warm_policy(self, store: ReplayStore) -> TinyVLA:
        if self.config.warm_start is not None:
            policy = TinyVLA.load(Path(self.config.warm_start))
            check_compatible(policy, spec=store.spec, statistics=store.statistics, what="replay store")
            policy.version = 0
            return policy
        policy = TinyVLA(self.policy_config, spec=store.spec, statistics=store.statistics, seed=self.seed)
        with self.journal.progress("clone", self.cloning.steps) as bar:
            def log(step: int, metrics: dict[str, float]) -> None:
                bar.advance(note=f"accuracy {metrics['accuracy']:.2f}")
                self.journal.record("clone", step, metrics)

            seen = without(store, hold_out(store, self.cloning.held_out, self.seed))
            clone(policy, seen, self.cloning, seed=self.seed, device=self.fabric.device, log=log)
        return policy

    def roll(
        self, env: Env, policy: Policy, episodes: int, purpose: str, number: int = 0, *, title: str | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Trajectory]:
        """Play ``episodes`` training episodes; ``purpose``, ``number`` seed them.

        ``rows``: which row of ``env`` plays each; they are dealt over all of them in turn by default.
        """
        seeds: list[list[int]] = [[] for _ in range(env.num_envs)]
        for i in range(episodes):
            row = i % env.num_envs if rows is None else rows[i]
            seeds[row].append(training_episode(self.seed, purpose, number, i))
        trajectories = rollout(env, policy, seeds, sample=True)
        if title is None:
            return list(trajectories)
        done = []
        with self.journal.progress(title, episodes) as bar:
            for trajectory in trajectories:
                done.append(trajectory)
                bar.advance()
        return done

    # -- state ------------------------------------------------------------------------------------------------------

    def save(self, learner: Mapping[str, Any] | None = None) -> None:
        """Write the one resume point, with the ``learner``'s state. Called by the first rank only."""
        self.progress["position"] = self.store().position if self._has_store() else {}
        state: dict[str, Any] = {"progress": self.progress, "rng": torch.get_rng_state()}
        if self.policy is not None:
            state["policy"] = self.policy.state_dict()
        if learner is not None:
            state["learner"] = dict(learner)
        if self.world_model is not None:
            state["world_model"] = self.world_model.state_dict()
        number = self.progress["stage"] * 1_000_000 + self.progress["iteration"]
        save_checkpoint(self.folder / "checkpoints", number, state, keep=self.config.keep_checkpoints)

    def _restore(self) -> None:
        """Go back to the last resume point: models, counters, and the store as it was then."""
        state = load_checkpoint(self.folder / "checkpoints")
        if state is None:
            return
        self.progress, self.saved = state["progress"], state
        if self._has_store() and self.fabric.is_global_zero:
            self._roll_back(self.progress["position"])
        if "policy" in state:
            weights = self.folder / "warm_start" / "policy.safetensors"
            if "warm_start" in self.progress and self.progress["warm_start"] != _sha256(weights):
                raise UserError(f"{weights} is not what this run wrote; restore it from a copy, or start a new run")
            self.policy = TinyVLA.load(self.folder / "warm_start")
            self.policy.load_state_dict(state["policy"])
        if "world_model" in state and self.fabric.is_global_zero:
            store = self.store()
            self.world_model = WorldModelLearner(
                self.world_model_config, spec=store.spec, statistics=store.statistics, seed=self.seed,
                device=str(self.fabric.device))
            self.world_model.load_state_dict(state["world_model"])
        torch.set_rng_state(state["rng"])  # last: new modules draw their first weights
        self.journal.rewind({"train": self.progress["iteration"], "clone": self.cloning.steps
                             if self.progress["stage"] > STAGES.index("clone") else 0,
                             "world_model": self.world_model.version if self.world_model is not None else 0})

    def _roll_back(self, position: Position) -> None:
        """Once nobody writes: the actors of a driver that was just killed take some seconds to end."""
        give_up = time.monotonic() + _ENDING
        while True:
            try:
                self.store().rollback(position)
                return
            except BeingWrittenError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.5)

    def _create_store(self) -> ReplayStore:
        """A new store for this run; what a killed first attempt left behind is opened and rolled back instead."""
        if self._has_store():
            store = self.store()
            store.rollback({})
            return store
        with self._closing(self.make_env()) as env:
            self._opened = ReplayStore.create(self.folder / "replay.zarr", spec=env.spec, statistics=env.statistics,
                                              embodiment=env.embodiment, config=self.storage)
        return self._opened

    def _has_store(self) -> bool:
        return (self.folder / "replay.zarr" / "zarr.json").is_file()

    def store(self) -> ReplayStore:
        """The run's replay store, opened once."""
        if self._opened is None:
            self._opened = ReplayStore.open(self.folder / "replay.zarr", self.storage)
        return self._opened

    def model(self) -> WorldModelLearner:
        """The world model, once ``fit`` is done."""
        assert self.world_model is not None, "the fit stage comes first"
        return self.world_model

    def trained_policy(self) -> TinyVLA:
        """The policy, once ``clone`` is done."""
        assert self.policy is not None, "the clone stage comes first"
        return self.policy

    def _report_success(self, what: str, trajectories: list[Trajectory]) -> None:
        self.journal.say(f"{what} {len(trajectories)} episodes, {success_rate(trajectories):.0%} successful")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what the block takes to ``progress["seconds"][name]``."""
        begun = time.perf_counter()
        yield
        self.progress["seconds"][name] = self.progress["seconds"].get(name, 0.0) + time.perf_counter() - begun

    @contextmanager
    def _closing(self, env: VectorEnv) -> Iterator[VectorEnv]:
        try:
            yield env
        finally:
            env.close()


def success_rate(trajectories: Sequence[Trajectory]) -> float:
    """Share of the trajectories that ended in success; 0 of none."""
    return sum(t.success == "yes" for t in trajectories) / max(len(trajectories), 1)


def _sha256(path: Path) -> str:
    """Of a file; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
