"""Ranks that see a growing store at different moments read one batch between them."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sampler import DecisionSampler
from data.store import ReplayStore
from data.types import Source, UserError
from tests import examples
from wm_rl import plans as planning


def fabric(rank, ranks, told):
    """A rank of a group in which the first speaks first."""
    def broadcast(words):
        if rank == 0:
            told.append(words)
        return told[-1]

    return SimpleNamespace(global_rank=rank, world_size=ranks, is_global_zero=rank == 0, broadcast=broadcast)


def windows(sampler, plan):
    """Where each window lies, whoever numbers the episodes."""
    return [(plan.segments[plan.table.place[e]].name, int(plan.table.row[e]), int(s))
            for e, s in zip(plan.episodes, plan.starts, strict=True)]


@settings(max_examples=20)
@given(ranks=st.integers(2, 5), late=st.lists(st.sampled_from(list(Source)), max_size=4), seed=st.integers(0, 99))
def test_shares_are_the_batch_of_one_process_whatever_each_saw(tmp_path_factory, ranks, late, seed):
    folder = tmp_path_factory.mktemp("plans") / "replay.zarr"
    writer = examples.store(folder)
    samplers = [DecisionSampler(ReplayStore.open(folder), examples.REPLAY, chunk=2, seed=seed) for _ in range(ranks)]
    for i, source in enumerate(late):  # the first rank sees what the last ones do not yet
        writer.append([examples.trajectory(100 + i, 6, source)])
        samplers[0].store.refresh()
        samplers[i % ranks].store.refresh()
    alone = DecisionSampler(samplers[0].store, examples.REPLAY, chunk=2, seed=seed)
    told, shares = [], []
    for rank, sampler in enumerate(samplers):
        shares.append(list(planning.plans(fabric(rank, ranks, told), sampler, range(4, 7), version=9)))
    for step in range(3):
        whole = alone.plan(4 + step, version=9 + step)
        expected = windows(alone, whole)
        assert [w for share, sampler in zip(shares, samplers, strict=True)
                for w in windows(sampler, share[step])] == expected
        read = np.concatenate([sampler.read(share[step]).proprio.numpy()
                               for share, sampler in zip(shares, samplers, strict=True)])
        assert np.array_equal(read, alone.read(whole).proprio.numpy())
    writer.close()
    shutil.rmtree(folder)


def test_a_rank_that_reads_another_store_says_so(tmp_path):
    mine, other = examples.store(tmp_path / "mine"), examples.store(tmp_path / "other")
    plan = DecisionSampler(mine, examples.REPLAY, chunk=2, seed=0).plan(0)
    with pytest.raises(UserError, match="expected all ranks to read one store"):
        planning.find([planning.describe(plan)], other)
