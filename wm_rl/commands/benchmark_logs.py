"""``python main.py benchmark suite=logs``: what a policy gains from the logs that it was given.

For every seed: the robot stand-in is recorded as ROS 2 bags, which are ingested through a mapping, cloned and labelled
(``prepared/<seed>``). Every arm then trains in the simulator with the same episodes' seeds and as many gradient steps
in all, and plays the same held-out trials on the stand-in. What is done is kept (``cells/``): a benchmark that was
stopped goes on with the same ``hydra.run.dir``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table

from data.budget import StoreConfig
from data.logs.commit import ingest_logs
from data.logs.mapping import read_mapping
from data.store import ReplayStore
from data.types import UserError
from sim.expert import ExpertConfig
from sim.intervals import Interval, paired_difference, wilson
from sim.vector import VectorEnv
from wm_rl.behaviour import hold_out, label_unknown_behaviour, without
from wm_rl.cloning import CloningConfig, clone
from wm_rl.commands.collect import collect
from wm_rl.journal import Journal
from wm_rl.log_learning import LogArm, LogExperiment, judge_on_stand_in, learn
from wm_rl.policy import TinyVLA, TinyVLAConfig
from wm_rl.workers import one_core_each

WARM_START = "warm start alone"


def benchmark_logs(
    *, folder: str, seeds: Sequence[int], log_episodes: int, env: Callable[[], VectorEnv],
    stand_in: Callable[[], VectorEnv], expert: ExpertConfig, mapping: Mapping[str, Any], storage: StoreConfig,
    policy: TinyVLAConfig, cloning: CloningConfig, experiment: LogExperiment, arms: Mapping[str, LogArm], jobs: int,
) -> int:
    """The first arm is compared with the others. Prints success on the stand-in, writes ``results.json``.

    Raises ``UserError`` when there is nothing to compare.
    """
    if not seeds or len(arms) < 2 or jobs < 1:
        raise UserError("suite=logs needs at least one seed, two arms and one job")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    for name in ("cells", "prepared"):
        (run / name).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        if not _cell(run, WARM_START, seed).is_file():
            _prepare(run, seed, log_episodes, env, stand_in, expert, mapping, storage, policy, cloning, experiment,
                     journal)
    cells = [(arm, seed) for seed in seeds for arm in arms]
    todo = [cell for cell in cells if not _cell(run, *cell).is_file()]
    with journal.progress("cells", len(cells)) as bar:
        bar.advance(len(cells) - len(todo))
        with one_core_each(jobs) as pool:
            waiting = [pool.submit(_run, run, arm, arms[arm], seed, experiment, env, stand_in, policy, cloning.steps)
                       for arm, seed in todo]
            try:
                for future, (arm, seed) in zip(waiting, todo, strict=True):
                    future.result()
                    bar.advance(note=f"{arm}, seed {seed}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    names = [*arms, WARM_START]
    found = {(name, seed): json.loads(_cell(run, name, seed).read_text()) for name in names for seed in seeds}
    results = _results(found, names, seeds)
    (run / "results.json").write_text(json.dumps(results, indent=1))
    journal.console.print(_table(results, names, seeds))
    journal.say(f"results: {run / 'results.json'}")
    return 0


def _cell(run: Path, name: str, seed: int) -> Path:
    return run / "cells" / f"{name.replace(' ', '_')}-{seed}.json"


def _write(file: Path, content: Any) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(file)


def _prepare(
    run: Path, seed: int, episodes: int, env: Callable[[], VectorEnv], stand_in: Callable[[], VectorEnv],
    expert: ExpertConfig, mapping: Mapping[str, Any], storage: StoreConfig, policy: TinyVLAConfig,
    cloning: CloningConfig, experiment: LogExperiment, journal: Journal,
) -> None:
    """Record, ingest, clone, label, and play the clone's trials. What an earlier attempt left is repeated beside it."""
    attempt = sum(1 for _ in (run / "prepared").glob(f"{seed}-attempt*"))
    made = run / "prepared" / f"{seed}-attempt{attempt}"
    made.mkdir()
    collect(seed=seed, env=stand_in, expert=expert, actor="expert", episodes=episodes, sample=True, storage=storage,
            store=None, lerobot=None, rosbag=str(made / "bags"), format="v2.1")
    (made / "mapping.yaml").write_text(yaml.safe_dump(dict(mapping), sort_keys=False))
    with closing(env()) as world:  # the simulator's ranges and names: fresh episodes join the logs
        ReplayStore.create(made / "logs.zarr", spec=world.spec, statistics=world.statistics,
                           embodiment=world.embodiment, config=storage).close()
        report = ingest_logs(made / "bags", made / "logs.zarr", read_mapping(made / "mapping.yaml"),
                             image_size=world.spec.image_size, workers=1, storage=storage)
    for line in report.lines():
        journal.say(line)
    store = ReplayStore.open(made / "logs.zarr", storage)
    learned = TinyVLA(policy, spec=store.spec, statistics=store.statistics, seed=seed)
    held_out = hold_out(store, cloning.held_out, seed)
    with journal.progress("clone", cloning.steps) as bar:
        clone(learned, without(store, held_out), cloning, seed=seed, device=torch.device("cpu"),
              log=lambda step, metrics: bar.advance())
    behaviour = label_unknown_behaviour(learned, store, held_out)
    for line in behaviour.lines():
        journal.say(line)
    learned.save(made / "warm_start")
    success = store.episodes.success
    _write(_cell(run, WARM_START, seed), {
        "prepared": made.name, "trials": judge_on_stand_in(learned, stand_in, experiment),
        "behaviour": behaviour.to_dict(), "updates": cloning.steps,
        "logs": {word: int((success == word).sum()) for word in ("yes", "no", "unknown")}})


def _run(
    run: Path, name: str, arm: LogArm, seed: int, experiment: LogExperiment, env: Callable[[], VectorEnv],
    stand_in: Callable[[], VectorEnv], policy: TinyVLAConfig, clone_updates: int,
) -> None:
    made = run / "prepared" / json.loads(_cell(run, WARM_START, seed).read_text())["prepared"]
    _write(_cell(run, name, seed), learn(
        experiment, arm, env=env, stand_in=stand_in, logs=made / "logs.zarr", warm_start=made / "warm_start",
        policy=policy, clone_updates=clone_updates, seed=seed, scratch=run))


def _results(
    found: Mapping[tuple[str, int], Mapping[str, Any]], names: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Success per arm and seed, over all seeds, and the first arm's paired difference from each other one."""
    def successes(name: str, of: Sequence[int]) -> list[bool]:
        return [trial["success"] for seed in of for trial in
                sorted(found[name, seed]["trials"], key=lambda trial: (trial["task"], trial["seed"]))]

    def against(name: str, of: Sequence[int]) -> dict[str, float] | None:
        return None if name == names[0] else asdict(paired_difference(successes(name, of), successes(names[0], of)))

    def rate(name: str, of: Sequence[int]) -> dict[str, float]:
        own = successes(name, of)
        return asdict(wilson(sum(own), len(own)))

    return {
        "arms": {name: {
            "trials": len(successes(name, seeds)), "success": rate(name, seeds),
            "first_minus_this": against(name, seeds),
            "by_seed": {seed: {"success": rate(name, [seed]), "first_minus_this": against(name, [seed])}
                        for seed in seeds},
            "control_steps": [sum(each["control_steps"] for each in found[name, seed].get("curve", []))
                              for seed in seeds],
            "updates": [found[name, seed]["updates"] for seed in seeds],
            "cpu_seconds": [found[name, seed].get("cpu_seconds") for seed in seeds]} for name in names},
        "behaviour": {seed: found[WARM_START, seed]["behaviour"] for seed in seeds},
        "logs": {seed: found[WARM_START, seed]["logs"] for seed in seeds}}


def _table(results: Mapping[str, Any], names: Sequence[str], seeds: Sequence[int]) -> Table:
    table = Table("arm", "success on the stand-in", *(f"seed {seed}" for seed in seeds), "trials",
                  f"'{names[0]}' minus this, paired", title="trained with logs and without")
    for name in names:
        row = results["arms"][name]
        difference = row["first_minus_this"]
        table.add_row(name, str(Interval(**row["success"])),
                      *(f"{row['by_seed'][seed]['success']['estimate']:.2f}" for seed in seeds), str(row["trials"]),
                      "" if difference is None else
                      f"{difference['estimate']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]")
    return table
