"""Tasks that the policy fails at are collected more often: counts against weights worked out by hand, and resumed."""

from dataclasses import replace

import numpy as np
import pytest

from data.store import ReplayStore
from data.types import Source, UserError
from tests import examples
from tests.wm_rl.cluster import toy
from wm_rl.curriculum import rows_by_failure
from wm_rl.improve import improve

ROWS = ["easy", "hard", "new", "easy"]


def store_of_two_tasks(folder):
    """Even seeds succeed: ``easy`` 8 of 8, ``hard`` 2 of 8; and demonstrations of ``new``, which are not ours."""
    store = ReplayStore.create(folder, spec=examples.SPEC, statistics=examples.STATISTICS, embodiment="toy")
    played = [("easy", 2 * i) for i in range(8)] + [("hard", seed) for seed in (1, 3, 5, 8, 9, 11, 13, 2)]
    store.append([replace(examples.trajectory(seed, 5, Source.SIM), task=task) for task, seed in played])
    expert = examples.trajectory(1, 5, Source.SIM)
    store.append([replace(expert, task="new", policy_version=np.full(5, -1))])
    return store


def test_tasks_are_drawn_by_their_failures(tmp_path):
    store = store_of_two_tasks(tmp_path / "store")
    rows = rows_by_failure(store, ROWS, 20_000, seed=3)
    # 1 + 100 (failures + 1) / (episodes + 2): easy 0 of 8, hard 6 of 8, of new nothing is known
    weights = np.array([1 + 100 / 10, 1 + 700 / 10, 1 + 100 / 2])
    counts = [rows.count(0) + rows.count(3), rows.count(1), rows.count(2)]
    assert np.array(counts) / 20_000 == pytest.approx(weights / weights.sum(), abs=0.015)
    assert abs(rows.count(0) - rows.count(3)) <= 1  # both rows of a task take turns
    again = ReplayStore.open(tmp_path / "store")
    assert rows_by_failure(again, ROWS, 50, seed=3) == rows_by_failure(store, ROWS, 50, seed=3)
    assert rows_by_failure(store, ROWS, 50, seed=4) != rows_by_failure(store, ROWS, 50, seed=3)


class TwoTasks(toy.ToyEnv):
    """Row 0 plays ``easy``, which always succeeds, row 1 ``hard``, which never does."""

    row_tasks = ("easy", "hard")

    def won(self):
        return np.array([True, False])

    def _look(self):
        observation, info = super()._look()
        return observation, info | {"task": list(self.row_tasks)}


def collected(folder, *pieces):
    for iterations in pieces:
        loop = toy.loop(folder, iterations=iterations, kind=TwoTasks, episodes=12, updates=1)
        loop.config = replace(loop.config, collect_tasks="failures")
        loop.run(improve)
    table = ReplayStore.open(folder / "replay.zarr").episodes
    return table.task[4:].tolist()


def test_a_run_collects_more_of_what_it_fails_at_and_the_same_when_resumed(tmp_path):
    tasks = collected(tmp_path / "whole", 6)
    assert len(tasks) == 6 * 12
    assert tasks.count("hard") > 2 * tasks.count("easy") > 0
    assert collected(tmp_path / "resumed", 2, 3, 6) == tasks


def test_an_unknown_order_is_refused(tmp_path):
    loop = toy.loop(tmp_path / "run")
    with pytest.raises(UserError, match="collect_tasks must be one of even, failures, got 'fails'"):
        replace(loop.config, collect_tasks="fails")
