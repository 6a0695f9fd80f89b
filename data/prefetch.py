"""Batches read ahead by a thread, so that a learner does not wait for the disk."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from torch import Tensor

from data.sampler import Plan

Batch = TypeVar("Batch", covariant=True)


class Reader(Protocol[Batch]):
    """What is needed of a sampler."""

    def advise(self, plan: Plan) -> None:
        """Have planned windows fetched from disk."""
        ...

    def read(self, plan: Plan, into: Mapping[str, Tensor] | None = None) -> Batch:
        """Read them."""
        ...


def prefetch(
    reader: Reader[Batch], plans: Iterable[Plan], buffers: Callable[[], Mapping[str, Tensor]], *, depth: int = 2
) -> Iterator[Batch]:
    """The batch of every plan, in order, the same as without reading ahead.

    Up to ``depth`` batches are read while the caller works; one more is only asked of the disk. ``buffers`` makes the
    memory (pinned, for a GPU) that their pictures go round in: a batch is valid until the next one is asked for.
    """
    memory = itertools.cycle([buffers() for _ in range(depth + 2)])
    waiting: deque[Plan] = deque()
    ahead: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for plan in plans:
            reader.advise(plan)
            waiting.append(plan)
            if len(waiting) > 1:
                ahead.append(pool.submit(reader.read, waiting.popleft(), next(memory)))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        for plan in waiting:
            ahead.append(pool.submit(reader.read, plan, next(memory)))
        for future in ahead:
            yield future.result()
