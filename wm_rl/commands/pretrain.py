"""``python main.py pretrain``: a policy by behaviour cloning, and log-probs for logs that have none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger

from data.store import ReplayStore
from wm_rl.behaviour import hold_out, label_unknown_behaviour, without
from wm_rl.cloning import CloningConfig, clone
from wm_rl.journal import Journal
from wm_rl.policy import TinyVLA, TinyVLAConfig


def pretrain(
    *,
    seed: int,
    folder: str,
    store: str,
    policy: TinyVLAConfig,
    cloning: CloningConfig,
    runtime: Callable[..., Fabric],
    logger: Sequence[Logger],
) -> int:
    """Clone what the store shows: ``<folder>/policy``; how good the labels of logs are: ``<folder>/behaviour.json``."""
    fabric, run = runtime(), Path(folder)
    journal = Journal(run, logger, enabled=True)
    replay = ReplayStore.open(store)
    learned = TinyVLA(policy, spec=replay.spec, statistics=replay.statistics, seed=seed)
    held_out = hold_out(replay, cloning.held_out, seed)
    with journal.progress("clone", cloning.steps) as bar:
        def log(step: int, metrics: dict[str, float]) -> None:
            bar.advance(note=f"accuracy {metrics['accuracy']:.2f}")
            journal.record("clone", step, metrics)

        clone(learned, without(replay, held_out), cloning, seed=seed, device=fabric.device, log=log)
    learned.save(run / "policy")
    journal.say(f"policy: {run / 'policy'}")
    report = label_unknown_behaviour(learned, replay, held_out)
    for line in report.lines():
        journal.say(line)
    (run / "behaviour.json").write_text(json.dumps(report.to_dict(), indent=1))
    return 0
