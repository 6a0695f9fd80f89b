"""A learner that is replaced takes the updates that the one before it would have taken, from the same batches."""

import copy
from functools import partial

import torch
from lightning.fabric import Fabric

from data.budget import StoreConfig
from data.store import ReplayStore
from data.types import Source
from tests import examples
from tests.wm_rl.cluster import toy
from tests.wm_rl.test_resume import equal
from wm_rl.cluster.imagining import ModelLearner
from wm_rl.cluster.learning import PolicyLearner
from world_model.config import ImaginationConfig
from world_model.learner import WorldModelLearner


def learner(store):
    return PolicyLearner(partial(Fabric, accelerator="cpu", devices=1), examples.learner, store, StoreConfig(),
                         examples.REPLAY, seed=5)


def more(store):
    """What a writer appends meanwhile."""
    with ReplayStore.open(store) as replay:
        replay.append([examples.trajectory(100 + i, 6, Source.SIM) for i in range(3)])


def test_from_a_checkpoint_it_draws_the_same_batches_of_the_same_store(tmp_path):
    examples.store(tmp_path / "store").close()
    one = learner(tmp_path / "store")
    one.update(2)
    saved = copy.deepcopy(one.state())  # as it is after a message
    more(tmp_path / "store")
    expected, _ = one.update(3)
    successor = learner(tmp_path / "store")
    successor.load(saved)
    got, weights = successor.update(3)
    assert (got.version, got.metrics) == (expected.version, expected.metrics)
    assert got.version == 5
    assert equal(successor.state(), one.state())
    assert all(torch.equal(value, one.state()["policy"][name]) for name, value in weights.items())


def test_the_world_models_learner_goes_on_from_what_it_published(tmp_path):
    examples.store(tmp_path / "store").close()
    with ReplayStore.open(tmp_path / "store") as store:
        model = partial(WorldModelLearner, toy.MODEL, spec=store.spec, statistics=store.statistics, seed=3)
    config = ImaginationConfig(horizon=3, micro_batch=2, sources=("sim",))
    one = ModelLearner(model, config, tmp_path / "store", StoreConfig())
    _, published = one.refit(2)
    more(tmp_path / "store")
    expected = one.audit(3), *one.refit(2)
    successor = ModelLearner(model, config, tmp_path / "store", StoreConfig())
    successor.load(published)
    assert equal((successor.audit(3), *successor.refit(2)), expected)
