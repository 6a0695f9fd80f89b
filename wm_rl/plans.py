"""Which windows each rank reads: the first rank draws for all, so that the shares make up one batch.

Ranks that look at a growing store at different moments see different episodes of it, and may number them differently.
So the first rank says which windows it drew by what is the same for every reader: segment, row in it, first decision.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from lightning.fabric import Fabric

from data.sampler import DecisionSampler, Plan
from data.store import ReplayStore
from data.types import UserError

_PAUSE = 0.02
"""Seconds between two looks for what is on its way."""


class Windows(NamedTuple):
    """A plan as one rank tells it to another; one entry per window."""

    segment: list[str]
    row: np.ndarray
    committed: np.ndarray
    """When, in ns: what tells the stores of two runs apart."""
    start: np.ndarray


def plans(
    fabric: Fabric, sampler: DecisionSampler, steps: range, *, version: int, patience: float = 0.0
) -> Iterable[Plan]:
    """A rank's plans of the batches ``steps``, for a policy that is at ``version`` before the first of them.

    Every rank calls it. The batches are those that one process would draw from what the first rank sees of the store.
    ``patience``: seconds that a rank which reads a copy of the store waits for what is on its way there.
    """
    drawn = (sampler.plan(step, version=version + i, now=time.time()) for i, step in enumerate(steps))
    if fabric.world_size == 1:
        return drawn
    told = fabric.broadcast([describe(plan) for plan in drawn] if fabric.is_global_zero else [])
    return [plan.share(fabric.global_rank, fabric.world_size) for plan in find(told, sampler.store, patience)]


def describe(plan: Plan) -> Windows:
    """What ``find`` finds again, in this process or another."""
    place = plan.table.place[plan.episodes]
    return Windows([plan.segments[i].name for i in place.tolist()], plan.table.row[plan.episodes],
                   plan.table.code("commit_time")[plan.episodes], plan.starts)


def find(told: Sequence[Windows], store: ReplayStore, patience: float = 0.0) -> list[Plan]:
    """Plans of windows that another process drew from the same store, which is refreshed where they are newer.

    ``patience``: seconds until they must be there.

    Raises:
        UserError: this process reads another store, or something was evicted before it was read.
    """
    names = [name for windows in told for name in windows.segment]
    rows, committed = (np.concatenate([getattr(windows, name) for windows in told]) for name in ("row", "committed"))
    episodes = _index(store, names, rows)
    due = time.monotonic() + patience
    while episodes is None:
        store.refresh()
        episodes = _index(store, names, rows)
        if time.monotonic() >= due:
            break
        if episodes is None:
            time.sleep(_PAUSE)
    if episodes is None or (store.episodes.code("commit_time")[episodes] != committed).any():
        raise UserError(f"a rank cannot find the episodes that the first one drew in its {store.path}: expected all "
                        "ranks to read one store; put them on one machine or its folder on a shared file system")
    ends = np.cumsum([len(windows.row) for windows in told])[:-1]
    return [Plan(own, windows.start, store.episodes, store.segments)
            for own, windows in zip(np.split(episodes, ends), told, strict=True)]


def _index(store: ReplayStore, names: Sequence[str], rows: np.ndarray) -> np.ndarray | None:
    """Number of each episode, by segment and row in it; None where one is not there."""
    places = {segment.name: i for i, segment in enumerate(store.segments)}
    if not len(store) or any(name not in places for name in names):
        return None
    known = (store.episodes.place << 32) + store.episodes.row
    wanted = (np.array([places[name] for name in names], np.int64) << 32) + rows
    order = known.argsort()
    found = order[np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)]
    return found if (known[found] == wanted).all() else None
