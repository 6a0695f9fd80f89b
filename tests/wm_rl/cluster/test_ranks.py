"""Several processes are one learner: the same steps as one, and all begin again when one dies."""

import dataclasses
import os
import signal
import time
from functools import partial

import pytest
import torch

from data.budget import StoreConfig
from data.types import Source, UserError
from tests import examples
from tests.wm_rl.cluster import toy
from tests.wm_rl.cluster.processes import check_whole, other_ranks
from wm_rl.cluster import driver
from wm_rl.cluster.crew import Crew
from wm_rl.cluster.learning import PolicyLearner
from wm_rl.cluster.start import cluster
from wm_rl.fabric import make_fabric
from wm_rl.objectives import Gipo
from wm_rl.policy import TinyVLA


def test_a_sharded_learner_of_one_is_one_line():
    with pytest.raises(UserError, match=r"type runtime\.learners=2"):
        toy.runtime(strategy="fsdp")
    with pytest.raises(UserError, match=r"runtime\.learners must be at least 1"):
        toy.runtime(learners=0)


@pytest.mark.parametrize(("accelerator", "gpus"), [("cpu", 0), ("cuda", 1), ("gpu", 1)])
def test_ray_gives_a_rank_the_gpu_that_its_fabric_asks_for(accelerator, gpus):
    fabric = partial(make_fabric, accelerator=accelerator, precision="32-true")
    assert dataclasses.replace(toy.runtime(), fabric=fabric).gpus == gpus


def parts(folder, strategy):
    """A new store, and what a ``PolicyLearner`` is made of."""
    folder.mkdir(exist_ok=True)
    examples.policy(0).save(folder / "warm_start")
    fabric = partial(make_fabric, accelerator="cpu", precision="32-true", strategy=strategy)
    learner = partial(driver._new_learner, examples.LEARNER, partial(TinyVLA.load, folder / "warm_start"),
                      Gipo(beta=0.5), examples.TRUST)
    store = examples.store(folder / f"{strategy}.zarr")
    return store, (fabric, learner, store.path, StoreConfig(), examples.REPLAY)


def grow(store):
    store.append([examples.trajectory(70 + i, 6, source) for i, source in enumerate((Source.SIM, Source.IMAGINED))])


def learn_alone(folder):
    """State after three updates, two more episodes, and two updates, in this process."""
    store, made_of = parts(folder, "auto")
    learner = PolicyLearner(*made_of, seed=3)
    learner.update(3)
    grow(store)
    learner.update(2)
    return learner.state()


def learn(here, folder, ranks, strategy, *, kill=None):
    """The same by actors; ``kill``: the rank that dies when there are more episodes."""
    crew = Crew(patience=120, max_restarts=1, say=print)
    store, made_of = parts(folder, strategy)
    states, updated = [], []

    def begin(member):
        if states:
            crew.ask(member, "load", states[-1])

    member = crew.hire("the learner", PolicyLearner, *made_of, seed=3, ranks=ranks, patience=120.0, begin=begin,
                       options=here)

    def until(done):
        end = time.monotonic() + 240
        while not done():
            assert time.monotonic() < end, "nobody answered"
            crew.attend(0.05)

    def step(count):
        until(lambda: not crew.busy(member, "load"))
        crew.ask(member, "update", count, returns=2, then=updated.append)
        until(lambda: not crew.busy(member, "update"))

    def save():
        told = len(states)
        crew.ask(member, "state", then=states.append)
        until(lambda: len(states) > told)

    step(3)
    save()
    grow(store)
    if kill is not None:
        victims = [member.pid, *other_ranks(member.pid)]
        assert len(victims) == ranks
        os.kill(victims[kill], signal.SIGKILL)
        step(2)  # fails, and all are replaced
        assert crew.restarts == 1
        assert len(updated) == 1
    step(2)
    save()
    assert len(updated) == 2
    driver.ray.kill(member.handle)
    return states[-1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ranks_take_the_steps_of_one_and_go_on_when_one_of_them_is_killed(tmp_path):
    alone = learn_alone(tmp_path)
    with cluster(toy.runtime(), cpus=1) as here:
        shared = [learn(here, tmp_path, 2, "ddp", kill=1), learn(here, tmp_path, 2, "fsdp", kill=0)]
    before = examples.policy(0).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in alone["policy"].items())
    for found in shared:
        assert found["version"] == alone["version"] == 5
        for name, value in alone["policy"].items():
            torch.testing.assert_close(found["policy"][name], value, rtol=0, atol=1e-6)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_run_with_two_learners_ends_though_one_dies(tmp_path, monkeypatch):
    checkpoint = driver._Driver._checkpoint

    def then_kill(self, iteration, learned):
        checkpoint(self, iteration, learned)
        if iteration == 1:
            os.kill(other_ranks(self.learner.pid)[0], signal.SIGKILL)

    monkeypatch.setattr(driver._Driver, "_checkpoint", then_kill)
    loop = toy.loop(tmp_path / "run", iterations=3)
    loop.run(toy.runtime(learners=2, strategy="fsdp").improve)
    _, told = check_whole(tmp_path / "run", 3)
    assert told[-1]["restarts"] == 1
