"""One forward pass for many who ask: a policy behind a queue that is flushed by size or age.

``InferenceServer`` runs as an asyncio actor, ``RemotePolicy`` is what those who ask hold in its place.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import ray

from data.types import Action, Observation
from wm_rl.cluster.crew import Actor
from wm_rl.policy import TokenPolicy

_KEPT = 10_000
"""Newest requests and batches that the figures speak of."""


class _Request(NamedTuple):
    observation: Observation
    seeds: Sequence[int] | None
    answer: asyncio.Future[tuple[Action, int]]
    arrived: float


class InferenceServer(Actor):
    """Answers with what the policy would answer alone; weights change between two forward passes, never in one.

    Those who ask before the first weights were loaded wait for them, as they do when a dead server was replaced.

    A request whose batch has room waits at most ``max_age`` plus one forward pass until its own begins: when it is
    ``max_age`` old, either the server is free and begins, or it is in a forward pass, and begins after it. A batch has
    room for all where no more than ``batch_size`` rows ask at a time.
    """

    def __init__(self, make_policy: Callable[[], TokenPolicy], *, batch_size: int, max_age: float) -> None:
        """``batch_size`` in rows, ``max_age`` in seconds."""
        self._policy, self._batch_size, self._max_age = make_policy(), batch_size, max_age
        self._loaded = asyncio.Event()
        self._waiting: deque[_Request] = deque()
        self._arrival = asyncio.Event()
        self._next: tuple[dict[str, Any], int] | None = None
        self._serving: asyncio.Task[None] | None = None
        self._rows, self._waits, self._latencies, self._passes = (deque[float](maxlen=_KEPT) for _ in range(4))
        self._answered = 0

    async def do(self, who: tuple[int, int], method: str, *arguments: Any) -> Any:
        """As any actor."""
        answer = super().do(who, method, *arguments)
        return await answer if inspect.isawaitable(answer) else answer

    async def act(self, observation: Observation, seeds: Sequence[int] | None) -> tuple[Action, int]:
        """Tokens, actions and log-probs of every row, and the version of the policy that chose them."""
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        answer: asyncio.Future[tuple[Action, int]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(observation, seeds, answer, time.monotonic()))
        self._arrival.set()
        return await answer

    async def load(self, weights: dict[str, Any], version: int) -> None:
        """Act with these from the next forward pass on."""
        self._next = weights, version
        self._loaded.set()

    async def report(self) -> dict[str, float]:
        """Version, requests answered and waiting, rows per batch; quantiles in ms of waits, answers, forward passes."""
        found: dict[str, float] = {"version": self._policy.version if self._next is None else self._next[1],
                 "requests": self._answered, "queue": len(self._waiting)}
        if not self._rows:
            return found
        quantiles = {f"{name}_p{percent}_ms": 1e3 * float(np.quantile(values, percent / 100))
                     for name, values in (("wait", self._waits), ("latency", self._latencies), ("pass", self._passes))
                     for percent in (50, 99)}
        return found | {"batch_rows": float(np.mean(self._rows)), **quantiles}

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        await self._loaded.wait()
        while True:
            batch = await self._next_batch()
            if self._next is not None:
                (weights, self._policy.version), self._next = self._next, None
                self._policy.load_state_dict(weights)
            begun, version = time.monotonic(), self._policy.version
            try:
                answers = await loop.run_in_executor(None, _act, self._policy, batch)
            except Exception as error:
                for request in batch:
                    request.answer.set_exception(error)
                continue
            ended = time.monotonic()
            self._passes.append(ended - begun)
            self._rows.append(sum(len(request.observation.slot) for request in batch))
            for request, answer in zip(batch, answers, strict=True):
                self._answered += 1
                self._waits.append(begun - request.arrived)
                self._latencies.append(ended - request.arrived)
                if not request.answer.done():  # whoever asked may be gone
                    request.answer.set_result((answer, version))

    async def _next_batch(self) -> list[_Request]:
        """Wait for ``batch_size`` rows, or until the first request is ``max_age`` old; take whole requests."""
        while True:
            rows = sum(len(request.observation.slot) for request in self._waiting)
            left = self._waiting[0].arrived + self._max_age - time.monotonic() if self._waiting else None
            if rows >= self._batch_size or (left is not None and left <= 0):
                break
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                continue
        batch, rows = [self._waiting.popleft()], 0
        rows = len(batch[0].observation.slot)
        while self._waiting and (self._waiting[0].seeds is None) == (batch[0].seeds is None):
            rows += len(self._waiting[0].observation.slot)
            if rows > self._batch_size:
                break
            batch.append(self._waiting.popleft())
        return batch


class RemotePolicy:
    """A ``Policy`` that lives elsewhere. ``version`` is that of its last answer."""

    def __init__(
        self, server: Any, *, chunk: int, waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """``server``: handle of an ``InferenceServer``. ``waiting()`` is entered while it is waited for."""
        self._server, self.chunk, self.version, self._waiting = server, chunk, 0, waiting

    def act(self, observation: Observation, seeds: Sequence[int] | None) -> Action:
        """Ask, and wait for the answer; a server that died is asked again when it is back."""
        with self._waiting():
            action, self.version = ray.get(self._server.act.options(max_task_retries=-1).remote(observation, seeds))
        return action


def _act(policy: TokenPolicy, batch: Sequence[_Request]) -> list[Action]:
    """One forward pass, padded to a power of two rows (kernels are cached per shape), cut into the answers."""
    counts = [len(request.observation.slot) for request in batch]
    own = np.arange(sum(counts))
    index = np.concatenate([own, np.zeros((1 << (len(own) - 1).bit_length()) - len(own), np.int64)])
    looked = [request.observation for request in batch]
    instructions = [text for each in looked for text in each.instruction]
    slots = [slot for each in looked for slot in each.slot]
    seeds = [seed for request in batch for seed in request.seeds or ()]
    together = policy.act(Observation(
        frames={camera: np.concatenate([each.frames[camera] for each in looked])[index]
                for camera in looked[0].frames},
        proprio=np.concatenate([each.proprio for each in looked])[index],
        instruction=[instructions[i] for i in index], slot=[slots[i] for i in index],
    ), [seeds[i] for i in index] if seeds else None)
    ends = np.cumsum(counts)
    return [Action(token=together.token[a:b], action=together.action[a:b], log_prob=together.log_prob[a:b],
                   value=together.value[a:b]) for a, b in zip(ends - counts, ends, strict=True)]
