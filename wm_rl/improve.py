"""The last stage of the loop in one process: collect, refit, imagine, update, a checkpoint after every iteration.

Reproducible bit for bit, and a run that was stopped, wherever, ends as if it had not been. ``wm_rl.cluster`` does the
same with its parts running side by side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from data.batches import to_torch
from data.prefetch import prefetch
from data.sampler import DecisionSampler
from data.store import ReplayStore
from sim.vector import VectorEnv
from wm_rl import interrupts
from wm_rl.curriculum import rows_by_failure
from wm_rl.learner import Learner
from wm_rl.loop import Loop, success_rate
from wm_rl.plans import plans
from wm_rl.policy import TinyVLA, check_compatible
from wm_rl.seeding import derive
from world_model.audit import Drift


def improve(loop: Loop) -> None:
    """Run the iterations that are not done yet."""
    store = loop.store()
    policy = loop.trained_policy()
    check_compatible(policy, spec=store.spec, statistics=store.statistics, what="replay store")
    learner = Learner(loop.learner_config, fabric=loop.fabric, policy=policy, objective=loop.objective,
                      reference=TinyVLA.load(loop.folder / "warm_start"), trust=loop.trust)
    if "learner" in loop.saved:
        learner.load_state_dict(loop.saved["learner"])
        torch.set_rng_state(loop.saved["rng"])  # as it was after all that is made above
    sampler = DecisionSampler(store, loop.mixture(store), chunk=policy.chunk, seed=loop.seed)
    first, last = loop.progress["iteration"], loop.config.iterations
    cut: dict[str, Any] = loop.progress.pop("cut", {})  # the iteration that a signal ended in the middle of
    main = loop.fabric.is_global_zero
    env = loop.make_env() if main and first < last else None
    try:
        with loop.journal.progress("improve", last - first) as bar, interrupts.deferred():
            for iteration in range(first, last):
                gathered, rows = cut.pop("gathered", {}), cut.pop("updates", [])
                if env is not None and not gathered:
                    gathered = _gather_unless_stopped(loop, env, policy, store, iteration)
                if _asked_to_stop(loop, main and not gathered):  # the others wait here for what the first one gathers
                    raise KeyboardInterrupt
                store.refresh()
                _update(loop, learner, sampler, iteration, rows)
                learner.gather()
                learned = learner.state_dict()
                whole = len(rows) == loop.config.updates_per_iteration
                if main and whole:
                    loop.journal.record("train", iteration, mean_metrics(rows) | gathered)
                    loop.progress["iteration"] = iteration + 1
                    bar.advance(note=f"success {gathered['collected_success']:.2f}")
                elif main:
                    loop.progress["cut"] = json.loads(json.dumps({"gathered": gathered, "updates": rows}))
                if main:
                    loop.save(learned)
                if _asked_to_stop(loop):
                    raise KeyboardInterrupt
    finally:
        if env is not None:
            env.close()
    if main:
        store.close()
        policy.save(loop.folder / "policy")


def mean_metrics(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over updates; a source's share is 0 in one that did not draw it, the rest are means over where seen."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row[name] for row in rows if name in row)
            / (len(rows) if name.startswith("gradient_share") else sum(name in row for row in rows))
            for name in names}


def imagine(loop: Loop, policy: TinyVLA, store: ReplayStore, iteration: int, *, newest: int) -> dict[str, float]:
    """Audit on the ``newest`` episodes before a refit can see them, then imagine unless imagination has drifted."""
    config = loop.config
    drift = Drift(**loop.progress["drift"])
    paused = not drift.within(loop.imagination_config.max_ratio)
    metrics: dict[str, float] = {}
    if paused or iteration % loop.imagination_config.audit_every == 0:
        with loop.timed("audit"):
            store.refresh()
            metrics = loop.model().audit(
                store, loop.imagination_config, episodes=range(len(store) - newest, len(store)))
        drift = drift.update(metrics)
        loop.progress["drift"] = asdict(drift)
    if iteration > 0 and iteration % config.refit_every == 0:
        with loop.timed("world_model"):
            loop.fit_world_model(loop.world_model_config.round_steps, None)
    metrics["imagined_ratio"] = drift.ratio
    # The first imagination always runs: a batch needs something of every source that it is made of.
    metrics["imagination_paused"] = float(iteration > 0 and not drift.within(loop.imagination_config.max_ratio))
    if metrics["imagination_paused"]:
        return metrics
    with loop.timed("imagine"):
        dream = loop.model().imagination(
            store, loop.imagination_config, num_envs=config.branches_per_iteration)
        imagined = loop.roll(dream, policy, config.branches_per_iteration, "imagine", iteration)
        store.append(imagined)
    return metrics | {
        "imagined_success": success_rate(imagined), "imagined_steps": sum(map(len, imagined)),
        "imagined_uncertainty": sum(float(t.uncertainty.mean()) for t in imagined) / len(imagined),
        "imagined_return": sum(float(t.reward.sum()) for t in imagined) / len(imagined)}


def _gather_unless_stopped(
    loop: Loop, env: VectorEnv, policy: TinyVLA, store: ReplayStore, iteration: int
) -> dict[str, float]:
    """``_gather``, or nothing when a signal ended it: the other ranks must hear of it before this one leaves."""
    try:
        with interrupts.immediate():
            return _gather(loop, env, policy, store, iteration)
    except KeyboardInterrupt:
        return {}


def _gather(loop: Loop, env: VectorEnv, policy: TinyVLA, store: ReplayStore, iteration: int) -> dict[str, float]:
    """Fresh simulation, and trajectories imagined from what is stored. Returns what the policy achieved."""
    with loop.timed("collect"):
        episodes = loop.config.episodes_per_iteration
        rows = None if loop.config.collect_tasks == "even" else rows_by_failure(
            store, env.row_tasks, episodes, derive(loop.seed, "tasks", iteration))
        acted = loop.roll(env, policy, episodes, "collect", iteration, rows=rows)
        store.append(acted)
    metrics = {"collected_success": success_rate(acted), "control_steps": sum(map(len, acted))}
    return metrics | imagine(loop, policy, store, iteration, newest=len(acted)) if loop.imagines else metrics


def _update(
    loop: Loop, learner: Learner, sampler: DecisionSampler, iteration: int, rows: list[dict[str, float]]
) -> None:
    """Take the updates that this iteration lacks, adding their metrics to ``rows``; fewer when asked to stop."""
    updates = loop.config.updates_per_iteration
    steps = range(iteration * updates + len(rows), (iteration + 1) * updates)
    drawn = plans(loop.fabric, sampler, steps, version=learner.policy.version)
    device = loop.fabric.device
    pinned = partial(sampler.buffers, pin=device.type == "cuda")
    with loop.timed("update"):
        for batch in prefetch(sampler, drawn, pinned):
            rows.append(learner.update(to_torch(batch, device)))
            if _asked_to_stop(loop):
                return


def _asked_to_stop(loop: Loop, stopped: bool = False) -> bool:
    """Some rank was, or has stopped already: all of them must leave at the same place."""
    own = torch.tensor(float(stopped or interrupts.seen()), device=loop.fabric.device)
    return bool(loop.fabric.all_reduce(own, reduce_op="max"))
