"""Several processes are one learner: the same steps as one, and all begin again when one dies."""

import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from data.budget import StoreConfig
from data.types import Source, UserError
from tests import examples
from tests.wm_rl.cluster import toy
from tests.wm_rl.cluster.test_driver import check_whole
from wm_rl.cluster import driver
from wm_rl.cluster.crew import Crew
from wm_rl.cluster.learning import PolicyLearner
from wm_rl.cluster.ranks import Ranks
from wm_rl.cluster.start import cluster
from wm_rl.fabric import make_fabric
from wm_rl.objectives import Gipo


class FakeCrew:
    """Notes what is asked, and of whom; nobody answers."""

    patience = 9.0

    def __init__(self):
        self.asked, self.replaced = [], []

    def busy(self, member, method):
        return not member.up or (member, method) in self.asked

    def ask(self, member, method, *arguments, **how):
        self.asked.append((member, method))

    def replace(self, member, why):
        member.up, member.restarts = False, member.restarts + 1
        self.replaced.append(member.name)


def test_they_begin_together_and_none_survives_another():
    crew, members = FakeCrew(), [SimpleNamespace(name=i, up=False, restarts=0) for i in range(3)]
    ranks, begun = Ranks(crew, members), []
    for i in range(3):
        assert not ranks.together(lambda: begun.append(1))
        assert crew.asked == []
        members[i].up = True
    assert not ranks.together(lambda: begun.append(1))
    assert crew.asked == [(member, "join") for member in members]
    assert not ranks.together(lambda: begun.append(1))  # they have not met yet
    crew.asked.clear()  # now they have
    assert ranks.together(lambda: begun.append(1))
    members[1].up, members[1].restarts = False, 1
    assert ranks.ask("state", then=print) is None
    assert crew.asked == []
    for _ in range(2):
        assert not ranks.together(lambda: begun.append(1))
        assert crew.replaced == [0, 2]
    for member in members:
        member.up = True
    ranks.together(lambda: begun.append(1))
    assert crew.asked == [(member, "join") for member in members]
    assert len(begun) == 2


def test_a_sharded_learner_of_one_is_one_line():
    with pytest.raises(UserError, match=r"type runtime\.learners=2"):
        toy.runtime(strategy="fsdp")
    with pytest.raises(UserError, match=r"runtime\.learners must be at least 1"):
        toy.runtime(learners=0)


def learn(here, folder, ranks, strategy, *, kill=None):
    """State after three updates, two more episodes, and two updates; ``kill``: the rank that dies in between."""
    crew = Crew(patience=120, max_restarts=1, say=print)
    fabric = partial(make_fabric, accelerator="cpu", precision="32-true", strategy=strategy)
    learner = partial(driver._new_learner, examples.LEARNER, folder / "warm_start", Gipo(beta=0.5), examples.TRUST)
    store = examples.store(folder / f"{ranks}-{strategy}-{kill}.zarr")
    members = [crew.hire(f"rank {i}", PolicyLearner, fabric, learner, store.path, StoreConfig(), examples.REPLAY,
                         seed=3, begin=lambda member: None, options=here) for i in range(ranks)]
    group, states = Ranks(crew, members), []

    def until(done):
        end = time.monotonic() + 240
        while not done():
            assert time.monotonic() < end, "nobody answered"
            crew.attend(0.05)

    def step(count):
        told = len(states)
        until(lambda: group.together(lambda: states[-1] if states else None))
        group.ask("update", count, returns=2, then=lambda updates: None)
        until(lambda: not group.busy("update"))
        group.ask("state", then=states.append)
        until(lambda: len(states) > told)

    step(3)
    store.append([examples.trajectory(70 + i, 6, source) for i, source in enumerate((Source.SIM, Source.IMAGINED))])
    if kill is not None:
        os.kill(members[kill].pid, signal.SIGKILL)
        crew.ask(members[kill], "ready")
        until(lambda: crew.restarts)
    step(2)
    for member in members:
        driver.ray.kill(member.handle)
    return states[-1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ranks_take_the_steps_of_one_and_go_on_when_one_of_them_is_killed(tmp_path):
    examples.policy(0).save(tmp_path / "warm_start")
    with cluster(toy.runtime(), cpus=1) as here:
        alone = learn(here, tmp_path, 1, "auto")
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
            os.kill(self.learner._members[1].pid, signal.SIGKILL)

    monkeypatch.setattr(driver._Driver, "_checkpoint", then_kill)
    loop = toy.loop(tmp_path / "run", iterations=3)
    loop.run(toy.runtime(learners=2, strategy="fsdp").improve)
    _, told = check_whole(tmp_path / "run", 3)
    assert told[-1]["restarts"] == 2
