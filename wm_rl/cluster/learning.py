"""Who trains the policy, from the store beside it: one process, or several ranks that share every batch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric

from data.batches import to_torch
from data.budget import StoreConfig
from data.prefetch import prefetch
from data.sampler import DecisionSampler, ReplayConfig
from data.store import ReplayStore
from wm_rl.learner import Learner
from wm_rl.plans import plans


class Updates(NamedTuple):
    """Some updates that a learner took in a row."""

    metrics: Sequence[dict[str, float]]
    """Of each."""
    version: int
    """Reached by the last."""
    seconds: float
    """Taken by all, reading their batches included."""


class PolicyLearner:
    """Updates the policy when asked, from what the store shows by then. What it is asked, all its ranks are asked."""

    def __init__(
        self, make_fabric: Callable[..., Fabric], make_learner: Callable[[Fabric], Learner], store: Path,
        storage: StoreConfig, replay: ReplayConfig, *, seed: int,
    ) -> None:
        self._make_fabric, self._make_learner = make_fabric, make_learner
        self._store, self._replay, self._seed = ReplayStore.open(store, storage), replay, seed

    def ready(self) -> int:
        """The process."""
        return os.getpid()

    def join(self, rank: int, ranks: int, meeting: Path, patience: float, state: dict[str, Any] | None) -> None:
        """Become one of ``ranks``, and begin with a checkpoint's learner, or at the warm start.

        Returns when all have come. ``meeting`` is a file that none of them used before, ``patience`` how long in s
        each waits for the others, here and later.
        """
        if ranks > 1:
            # To Fabric, every actor is a machine with one device; the processes know each other already.
            os.environ.update({"LOCAL_RANK": "0", "NODE_RANK": str(rank)})
            if sys.platform == "linux":  # they are on one machine: nobody else need hear them
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            torch.distributed.init_process_group(
                "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo", init_method=meeting.as_uri(), rank=rank,
                world_size=ranks, timeout=timedelta(seconds=patience))
        self._fabric = self._make_fabric(num_nodes=ranks)
        self._fabric.launch()
        self._learner = self._make_learner(self._fabric)
        self._sampler = DecisionSampler(
            self._store, self._replay, chunk=self._learner.policy.chunk, seed=self._seed)
        if state is not None:
            self._learner.load_state_dict(state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty but for the first rank."""
        state = self._learner.state_dict()
        return state if self._fabric.is_global_zero else {}

    def update(self, count: int) -> tuple[Updates, dict[str, Any]]:
        """Take ``count`` steps. What they gave, and the weights to publish, which only the first rank has."""
        begun = time.perf_counter()
        self._store.refresh()
        first, device = self._learner.policy.version, self._fabric.device
        drawn = plans(self._fabric, self._sampler, range(first, first + count), version=first)
        pinned = partial(self._sampler.buffers, pin=device.type == "cuda")
        rows = [self._learner.update(to_torch(batch, device)) for batch in prefetch(self._sampler, drawn, pinned)]
        self._learner.gather()
        weights = {name: value.cpu() for name, value in self._learner.policy.state_dict().items()}
        updates = Updates(rows, self._learner.policy.version, time.perf_counter() - begun)
        return updates, weights if self._fabric.is_global_zero else {}
