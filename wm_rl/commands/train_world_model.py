"""``python main.py train_world_model``: fit the video and success model, measure them on held-out episodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from rich.table import Table

from data.store import ReplayStore
from data.types import UserError
from wm_rl import interrupts
from wm_rl.checkpoint import load_checkpoint, save_checkpoint
from wm_rl.journal import Bar, Journal
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.learner import WorldModelLearner

STRIP_STEPS = 8


def train_world_model(
    *,
    seed: int,
    folder: str,
    resume: str | None,
    store: str,
    held_out: float,
    teacher: str | None,
    checkpoint_every: int,
    world_model: WorldModelConfig,
    runtime: Callable[..., Fabric],
    logger: Sequence[Logger],
) -> int:
    """Fit for ``world_model.steps``; weights go to ``<folder>/world_model``, measurements to ``quality.json``.

    Every ``checkpoint_every`` steps of the video model a checkpoint is written, from which ``resume=<run>`` goes on
    to the same weights, and a film strip of a held-out episode is shown. With ``teacher``, a run of this command, the
    model starts from its weights and learns to answer in one step what it samples in ``world_model.teacher_steps``.

    Raises:
        UserError: a share that holds out nothing or everything, an empty source with a weight, a teacher of another
            shape.
    """
    replay, run = ReplayStore.open(store), Path(folder)
    journal = Journal(run, logger, enabled=True)
    interrupts.remember()
    shown = round(len(replay) * (1 - held_out))
    if not 0 < shown < len(replay):
        raise UserError(f"held_out={held_out} of {len(replay)} episodes leaves {shown} to train on; "
                        "collect more, or try held_out=0.3")
    if checkpoint_every < 1:
        raise UserError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    seen = replay.at(shown)
    learner = WorldModelLearner(world_model, spec=replay.spec, statistics=replay.statistics, seed=seed,
                                device=str(runtime().device))
    state = load_checkpoint(run / "checkpoints")
    if state is not None:
        learner.load_state_dict(state)
        journal.rewind({"world_model": learner.video_steps, "success_model": 0})
        journal.say(f"going on at step {learner.video_steps} of {world_model.steps}")
    try:
        if teacher is not None:
            _distil(learner, Path(teacher), seen, world_model.steps, journal)
        else:
            _fit(learner, replay, seen, world_model, checkpoint_every, journal, run)
    except KeyboardInterrupt:
        journal.say(f"\nstopped; go on with: python main.py train_world_model resume={run}")
        raise
    learner.version = max(learner.version, 1)
    learner.save_pretrained(run / "world_model")
    quality = learner.evaluate(
        replay, imagination=ImaginationConfig(), episodes=range(len(seen), len(replay)))
    (run / "quality.json").write_text(json.dumps(quality, indent=2))
    table = Table("measure", "held-out episodes")
    for name, value in quality.items():
        table.add_row(name, f"{value:.3f}")
    journal.console.print(table)
    journal.say(f"world model: {run / 'world_model'}")
    return 0


def _fit(
    learner: WorldModelLearner, replay: ReplayStore, seen: ReplayStore, config: WorldModelConfig, every: int,
    journal: Journal, run: Path,
) -> None:
    """The video model in stretches that end in a checkpoint, then the success model."""
    with journal.progress("video model", config.steps) as bar:
        bar.advance(learner.video_steps)
        while learner.video_steps < config.steps:
            watch = _Watch(journal, bar, "world_model")
            learner.fit_video(seen, min(every, config.steps - learner.video_steps), history=watch)
            save_checkpoint(run / "checkpoints", learner.video_steps, learner.state_dict(), keep=2)
            real, imagined = learner.film_strip(replay, len(seen), 0, STRIP_STEPS)
            strip = np.concatenate([np.concatenate(list(frames), axis=1) for frames in (real, imagined)])
            journal.show("held-out episode: recorded above imagined", learner.video_steps, strip)
            interrupts.check()
    steps = round(config.steps * config.success_ratio)
    with journal.progress("success model", steps) as bar:
        learner.fit_success(seen, steps, history=_Watch(journal, bar, "success_model"))


def _distil(learner: WorldModelLearner, teacher: Path, seen: ReplayStore, steps: int, journal: Journal) -> None:
    nested = teacher / "world_model"
    taught = WorldModelLearner.from_pretrained(nested if nested.is_dir() else teacher)
    with journal.progress("distil", steps) as bar:
        learner.distil(taught, seen, steps, log=_Watch(journal, bar, "world_model"))


class _Watch:
    """Moves a progress bar and records the metrics."""

    def __init__(self, journal: Journal, bar: Bar, kind: str) -> None:
        self.journal, self.bar, self.kind = journal, bar, kind

    def begin(self, steps: int) -> None:
        """Nothing to do."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step was taken."""
        self.bar.advance()
        self.journal.record(self.kind, step, metrics)
