"""Which tasks the next episodes are collected of: all alike, or those at which the policy fails more often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.draw import own_failures, task_weight
from data.store import ReplayStore

ORDERS = ("even", "failures")


def rows_by_failure(store: ReplayStore, row_tasks: Sequence[str], episodes: int, seed: int) -> list[int]:
    """Draw the task of each of ``episodes``, weighed as replay weighs tasks, and deal it to the rows that play it.

    It depends on ``seed`` and on what the store holds, which a resumed run finds again.
    """
    failures = own_failures(store.episodes)
    tasks = list(dict.fromkeys(row_tasks))
    rows = {task: [row for row, name in enumerate(row_tasks) if name == task] for task in tasks}
    weights = np.array([task_weight(failures.get(task, ())) for task in tasks])
    drawn = np.random.Generator(np.random.Philox(key=seed)).choice(len(tasks), episodes, p=weights / weights.sum())
    dealt = dict.fromkeys(tasks, 0)
    chosen = []
    for index in drawn.tolist():
        task = tasks[index]
        chosen.append(rows[task][dealt[task] % len(rows[task])])
        dealt[task] += 1
    return chosen
