"""Who trains the policy, from the store beside it: one process, or several ranks that share every batch.

Ranks on other machines read a copy of the store there (``copying``).
"""

from __future__ import annotations

import math
import os
import socket
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
from wm_rl.cluster.copying import Copyist, copy_name
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
        self._make_fabric, self._make_learner, self._original = make_fabric, make_learner, store
        self._storage, self._replay, self._seed = storage, replay, seed
        self._patience = 0.0

    def join(self, rank: int, ranks: int, meeting: str, patience: float, copy: Path | None = None) -> None:
        """Become one of ``ranks``, at the warm start; return when all have come.

        ``meeting``: address of a file or port that none of them used before. ``patience``: how long in s each waits for
        the others, here and later. ``copy``: of the store, where this is another machine.
        """
        if ranks > 1:
            # What torchrun sets for machines with one device each: Fabric heeds it before Slurm's, which speaks of Ray.
            os.environ.update({"TORCHELASTIC_RUN_ID": meeting, "RANK": str(rank), "GROUP_RANK": str(rank),
                               "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)})
            if sys.platform == "linux" and meeting.startswith("file:"):  # all are on this machine: nobody else hears
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            torch.distributed.init_process_group(
                "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo", init_method=meeting, rank=rank,
                world_size=ranks, timeout=timedelta(seconds=patience))
        self._store = ReplayStore.open(copy or self._original, self._storage)
        self._patience = patience if copy else 0.0
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
        drawn = plans(self._fabric, self._sampler, range(first, first + count), version=first, patience=self._patience)
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
    that is asked fails, and whoever supervises this one replaces them all. Ranks on other machines, and the copies of
    the store that they read there, are placed anew each time, on machines that are alive.
    """

    def __init__(
        self, make_fabric: Callable[..., Fabric], make_learner: Callable[[Fabric], Learner], store: Path,
        storage: StoreConfig, replay: ReplayConfig, *, seed: int, ranks: int = 1, patience: float = math.inf,
        gpus: int = 0, nodes: int = 1, librarian: Any = None, copies: Path | None = None,
    ) -> None:
        """``patience``: seconds that a rank waits for another; ``gpus``: that each of the other ranks needs.

        ``nodes``: machines, or as many as there are, that the ranks are dealt to in blocks; the first is this one. On
        the others a ``Copyist``, which asks ``librarian``, keeps a copy of the store in the folder ``copies``.
        """
        make = partial(Rank, make_fabric, make_learner, store, storage, replay, seed=seed)
        self._own, self._patience, self._met = make(), patience, False
        homes = _homes(nodes, gpus) if nodes > 1 else [""]
        self._copyists: list[Any] = [_hire(home, Copyist, librarian, copies, copy_name(store, number), concurrency=2)
                                     for number, home in enumerate(homes[1:], 1)]
        self._following: list[Any] = []
        """Calls that do not end while the copyists live."""
        self._home = [rank * len(homes) // ranks for rank in range(ranks)]
        """Of each rank, the number of its machine."""
        self._others: list[Any] = [_hire(homes[home] or _here(), Rank, *make.args, gpus=gpus, **make.keywords)
                                   for home in self._home[1:]]
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

    def leave(self) -> None:
        """The run is over: delete the copies."""
        for copyist in self._copyists:
            copyist.leave.remote()
        if self._following:
            ray.wait(self._following, num_returns=len(self._following), timeout=_LAST_WORDS)

    def _meet(self) -> None:
        """Have every rank join, those on other machines when a copy of what there is by now is there."""
        catching_up = [copyist.catch_up.remote() for copyist in self._copyists]
        copies = [None, *(ray.get(copy) for copy in catching_up)]
        self._following = [copyist.follow.remote() for copyist in self._copyists]
        with tempfile.TemporaryDirectory(prefix="wm_rl-") as folder:
            meeting = f"tcp://{_free_address()}" if self._copyists else (Path(folder) / "meeting").as_uri()
            ranks = 1 + len(self._others)
            others = [other.follow.remote("join", (rank, ranks, meeting, self._patience, copies[self._home[rank]]))
                      for rank, other in enumerate(self._others, 1)]
            self._own.join(0, ranks, meeting, self._patience)
            _heed(others)
        self._met = True

    def _all(self, method: str, *arguments: Any) -> Any:
        """Have every rank do it. What the first one answers."""
        if not self._met:
            self._meet()
        if self._following and ray.wait(self._following, timeout=0)[0]:
            raise RuntimeError("a copy of the store is not kept any more")
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


def _here() -> str:
    return ray.get_runtime_context().get_node_id()


def _homes(nodes: int, gpus: int) -> list[str]:
    """Ids of this machine and of others that are alive and have GPUs if they must: ``nodes`` of them, or fewer."""
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus]
    return [_here(), *sorted(set(others) - {_here()})[: nodes - 1]]


def _hire(home: str, kind: type, *arguments: Any, gpus: int = 0, concurrency: int = 1, **named: Any) -> Any:
    """An actor on that machine, of whose calls so many may run at a time."""
    there = NodeAffinitySchedulingStrategy(home, soft=False)
    actor: Any = ray.remote(kind).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=there,
                                          max_concurrency=concurrency)
    return actor.remote(*arguments, **named)


def _free_address() -> str:
    """A port of this machine that others in the cluster can reach, ``host:port``."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return f"{address}:{probe.getsockname()[1]}"
