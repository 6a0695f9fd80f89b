"""Who trains the policy, from the store beside it: one process, or several ranks that share every batch."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from lightning.fabric import Fabric
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data.batches import to_torch
from data.budget import StoreConfig
from data.prefetch import prefetch
from data.sampler import DecisionSampler, ReplayConfig
from data.store import ReplayStore
from wm_rl.cluster.crew import Actor
from wm_rl.learner import Learner
from wm_rl.plans import plans

_LAST_WORDS = 10.0
"""Seconds in which a rank that failed must have said so."""


class Updates(NamedTuple):
    """Some updates that a learner took in a row."""

    metrics: Sequence[dict[str, float]]
    """Of each."""
    version: int
    """Reached by the last."""
    seconds: float
    """Taken by all, reading their batches included."""


class Rank:
    """One process's share of every update. What one rank is asked, all are asked, in the same order."""

    def __init__(
        self, make_fabric: Callable[..., Fabric], make_learner: Callable[[Fabric], Learner], store: Path,
        storage: StoreConfig, replay: ReplayConfig, *, seed: int,
    ) -> None:
        self._make_fabric, self._make_learner = make_fabric, make_learner
        self._store, self._replay, self._seed = ReplayStore.open(store, storage), replay, seed

    def join(self, rank: int, ranks: int, meeting: Path, patience: float) -> None:
        """Become one of ``ranks``, at the warm start; return when all have come.

        ``meeting`` is a file that none of them used before, ``patience`` how long in s each waits for the others, here
        and later.
        """
        if ranks > 1:
            # What torchrun sets for machines with one device each: Fabric heeds it before Slurm's, which speaks of Ray.
            os.environ.update({"TORCHELASTIC_RUN_ID": meeting.parent.name, "RANK": str(rank), "GROUP_RANK": str(rank),
                               "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)})
            if sys.platform == "linux":  # all are on this machine: nobody else need hear them
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            torch.distributed.init_process_group(
                "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo", init_method=meeting.as_uri(), rank=rank,
                world_size=ranks, timeout=timedelta(seconds=patience))
        self._fabric = self._make_fabric(num_nodes=ranks)
        self._fabric.launch()
        self._learner = self._make_learner(self._fabric)
        self._sampler = DecisionSampler(self._store, self._replay, chunk=self._learner.policy.chunk, seed=self._seed)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's learner."""
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

    def follow(self, method: str, arguments: Sequence[Any]) -> None:
        """Do that as one of the others do. Whoever fails leaves, so that nobody waits for it."""
        try:
            getattr(self, method)(*arguments)
        except BaseException:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            raise


class PolicyLearner(Actor):
    """Updates the policy when asked, from what the store shows by then, on one rank or several.

    It is the first rank itself and owns the actors of the others, which end with it: whichever dies, the next thing
    that is asked fails, and whoever supervises this one replaces them all.
    """

    def __init__(
        self, make_fabric: Callable[..., Fabric], make_learner: Callable[[Fabric], Learner], store: Path,
        storage: StoreConfig, replay: ReplayConfig, *, seed: int, ranks: int = 1, patience: float = math.inf,
        gpus: int = 0,
    ) -> None:
        """``patience``: seconds that a rank waits for another; ``gpus``: that each of the other ranks needs."""
        make = partial(Rank, make_fabric, make_learner, store, storage, replay, seed=seed)
        self._own, self._patience, self._met = make(), patience, False
        self._others: list[Any] = [_hire(make, gpus) for _ in range(ranks - 1)]
        if not self._others:
            self._meet()  # what is wrong with it is said where it is made

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's learner."""
        self._all("load", state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self._all("state")

    def update(self, count: int) -> tuple[Updates, dict[str, Any]]:
        """Take ``count`` steps. What they gave, and the weights to publish."""
        return self._all("update", count)

    def _meet(self) -> None:
        """Have every rank join."""
        with tempfile.TemporaryDirectory(prefix="wm_rl-") as folder:
            meeting, ranks = Path(folder) / "meeting", 1 + len(self._others)
            others = [other.follow.remote("join", (rank, ranks, meeting, self._patience))
                      for rank, other in enumerate(self._others, 1)]
            self._own.join(0, ranks, meeting, self._patience)
            _heed(others)
        self._met = True

    def _all(self, method: str, *arguments: Any) -> Any:
        """Have every rank do it. What the first one answers."""
        if not self._met:
            self._meet()
        others = [other.follow.remote(method, arguments) for other in self._others]
        try:
            answer = getattr(self._own, method)(*arguments)
        except RuntimeError:
            _heed(others, timeout=_LAST_WORDS)  # where another failed first, why is its to say
            raise
        _heed(others)
        return answer


def _heed(others: list[Any], timeout: float | None = None) -> None:
    """Wait for the other ranks, and raise what went wrong in them. That one died is a failure of this actor's task."""
    for answer in ray.wait(others, num_returns=len(others), timeout=timeout)[0] if others else ():
        try:
            ray.get(answer)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise RuntimeError("another rank died") from error


def _hire(make: partial[Rank], gpus: int) -> Any:
    """An actor beside this one."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    beside = ray.remote(Rank).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=here)
    return beside.remote(*make.args, **make.keywords)
