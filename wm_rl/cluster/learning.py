"""Who trains the policy, from the store beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric import Fabric

from data.batches import to_torch
from data.budget import StoreConfig
from data.prefetch import prefetch
from data.sampler import DecisionSampler, ReplayConfig
from data.store import ReplayStore
from wm_rl.cluster.crew import Actor
from wm_rl.learner import Learner


class Updates(NamedTuple):
    """Some updates that a learner took in a row."""

    metrics: Sequence[dict[str, float]]
    """Of each."""
    version: int
    """Reached by the last."""
    seconds: float
    """Taken by all, reading their batches included."""


class PolicyLearner(Actor):
    """Updates the policy when asked, from what the store shows by then."""

    def __init__(
        self, make_fabric: Callable[[], Fabric], make_learner: Callable[[Fabric], Learner], store: Path,
        storage: StoreConfig, replay: ReplayConfig, *, seed: int,
    ) -> None:
        self._fabric = make_fabric()
        self._learner = make_learner(self._fabric)
        self._store = ReplayStore.open(store, storage)
        self._sampler = DecisionSampler(self._store, replay, chunk=self._learner.policy.chunk, seed=seed)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's learner."""
        self._learner.load_state_dict(state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self._learner.state_dict()

    def update(self, count: int) -> tuple[Updates, dict[str, Any]]:
        """Take ``count`` steps. What they gave, and the weights to publish."""
        begun = time.perf_counter()
        self._store.refresh()
        first, device = self._learner.policy.version, self._fabric.device
        plans = (self._sampler.plan(first + i, version=first + i, now=time.time()) for i in range(count))
        pinned = partial(self._sampler.buffers, pin=device.type == "cuda")
        rows = [self._learner.update(to_torch(batch, device)) for batch in prefetch(self._sampler, plans, pinned)]
        weights = {name: value.cpu() for name, value in self._learner.policy.state_dict().items()}
        return Updates(rows, self._learner.policy.version, time.perf_counter() - begun), weights
