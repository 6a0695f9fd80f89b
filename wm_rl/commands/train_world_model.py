"""``python main.py train_world_model``: fit the video and success model, measure them on held-out episodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from rich.table import Table

from data.store import ReplayStore
from data.types import UserError
from wm_rl.journal import Journal
from world_model.config import WorldModelConfig
from world_model.learner import WorldModelLearner


def train_world_model(
    *,
    seed: int,
    folder: str,
    store: str,
    held_out: float,
    world_model: WorldModelConfig,
    runtime: Callable[..., Fabric],
    logger: Sequence[Logger],
) -> int:
    """Fit for ``world_model.steps``; weights go to ``<folder>/world_model``, measurements to ``quality.json``.

    Raises:
        UserError: a share that holds out nothing or everything, or an empty source with a weight.
    """
    replay, run = ReplayStore.open(store), Path(folder)
    journal = Journal(run, logger, enabled=True)
    shown = round(len(replay) * (1 - held_out))
    if not 0 < shown < len(replay):
        raise UserError(f"held_out={held_out} of {len(replay)} episodes leaves {shown} to train on; "
                        "collect more, or try held_out=0.3")
    seen = replay.at(shown)
    learner = WorldModelLearner(world_model, spec=replay.spec, statistics=replay.statistics, seed=seed,
                                device=str(runtime().device))
    both = world_model.steps + round(world_model.steps * world_model.success_ratio)
    with journal.progress("world model", both) as bar:
        def log(step: int, metrics: Mapping[str, float]) -> None:
            bar.advance()
            journal.record("world_model", step, metrics)

        learner.fit(seen, world_model.steps, log=log)
    learner.save_pretrained(run / "world_model")
    quality = learner.evaluate(replay, episodes=range(len(seen), len(replay)))
    (run / "quality.json").write_text(json.dumps(quality, indent=2))
    table = Table("measure", "held-out episodes")
    for name, value in quality.items():
        table.add_row(name, f"{value:.3f}")
    journal.console.print(table)
    journal.say(f"world model: {run / 'world_model'}")
    return 0
