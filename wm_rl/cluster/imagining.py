"""Who fits the world model, and who plays in it: both beside the store, which only its writer writes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.budget import StoreConfig
from data.rollout import rollout
from data.store import ReplayStore
from data.types import Source
from wm_rl.cluster.collecting import Outbox
from wm_rl.cluster.crew import Actor
from wm_rl.cluster.inference import RemotePolicy
from wm_rl.seeding import training_episode
from world_model.config import ImaginationConfig
from world_model.learner import WorldModelLearner


class ModelLearner(Actor):
    """Audits the world model against the newest simulated episodes, and fits it further."""

    def __init__(
        self, make_model: Callable[[], WorldModelLearner], config: ImaginationConfig, store: Path, storage: StoreConfig
    ) -> None:
        self._model, self._config, self._store = make_model(), config, ReplayStore.open(store, storage)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from this state."""
        self._model.load_state_dict(state)

    def audit(self, newest: int) -> dict[str, float]:
        """See ``WorldModelLearner.audit``, on the ``newest`` simulated episodes."""
        self._store.refresh()
        simulated = np.flatnonzero(self._store.episodes.source == Source.SIM.value)[-newest:]
        return self._model.audit(self._store, self._config, episodes=simulated.tolist())

    def refit(self, steps: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Fit ``steps`` further. Metrics, and the state to publish."""
        self._store.refresh()
        metrics = self._model.fit(self._store, steps)
        return metrics, self._model.state_dict()


class Imaginer(Actor):
    """Plays episodes in the world model when asked."""

    def __init__(
        self, make_model: Callable[[], WorldModelLearner], config: ImaginationConfig, store: Path, storage: StoreConfig,
        server: Any, writer: Any, *, seed: int, chunk: int,
    ) -> None:
        """``store`` is read only."""
        self._model, self._config, self._seed = make_model(), config, seed
        self._store = ReplayStore.open(store, storage)
        self._policy, self._outbox = RemotePolicy(server, chunk=chunk), Outbox(writer)

    def load(self, state: dict[str, Any]) -> None:
        """Imagine with this world model from now on."""
        self._model.load_state_dict(state)

    def imagine(self, stream: int, branches: int) -> None:
        """Play ``branches`` episodes from what is stored now; when this returns all are written."""
        self._store.refresh()
        dream = self._model.imagination(self._store, self._config, num_envs=branches)
        seeds = [[training_episode(self._seed, "imagined stream", stream, row)] for row in range(branches)]
        for trajectory in rollout(dream, self._policy, seeds, sample=True):
            self._outbox.send(trajectory)
        self._outbox.settle()
