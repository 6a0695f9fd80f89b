"""Learners on two nodes, each with a disk of its own: one learner, whichever node dies.

Two raylets on this machine stand for two nodes. Their folders differ, so nothing is read through a shared one.
"""

import contextlib
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from data.types import UserError
from tests import examples
from tests.wm_rl.cluster import toy
from tests.wm_rl.cluster.processes import check_whole, wait_for
from tests.wm_rl.cluster.test_ranks import grow, learn_alone, parts
from wm_rl.cluster import driver
from wm_rl.cluster.copying import Librarian
from wm_rl.cluster.learning import PolicyLearner
from wm_rl.cluster.start import SWITCHES


def test_more_nodes_than_learners_are_one_line():
    with pytest.raises(UserError, match=r"at most as many as runtime\.learners=2, got 3; type runtime\.learners=3"):
        toy.runtime(learners=2, learner_nodes=3)


@contextlib.contextmanager
def two_nodes(monkeypatch):
    """A head without room for collectors, and another node."""
    for name, value in SWITCHES.items():
        monkeypatch.setenv(name, value)
    size = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
    try:
        yield cluster, cluster.add_node(num_cpus=4, **size)
    finally:
        ray.shutdown()
        cluster.shutdown()


def node(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ranks_on_two_nodes_take_the_steps_of_one_process(tmp_path, monkeypatch):
    alone = learn_alone(tmp_path)
    with two_nodes(monkeypatch) as (cluster, other):
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        for strategy in ("ddp", "fsdp"):
            store, (fabric, learner, path, storage, replay) = parts(tmp_path / strategy, strategy)
            librarian = ray.remote(Librarian).options(num_cpus=0).remote(path)
            shared = PolicyLearner(fabric, learner, path, storage, replay, seed=3, ranks=3, nodes=2, patience=120.0,
                                   librarian=librarian, copies=tmp_path / "disk of the other node")
            assert shared._home == [0, 0, 1]
            assert [node(rank) == other.node_id for rank in shared._others] == [False, True]
            shared.update(3)
            (copy,) = (tmp_path / "disk of the other node").glob("*/replay.zarr")
            grow(store)
            shared.update(2)
            state = shared.state()
            for name, value in alone["policy"].items():
                torch.testing.assert_close(state["policy"][name], value, rtol=0, atol=1e-6)
            shared.leave()
            wait_for(lambda copy=copy: not copy.exists(), seconds=30)
            torch.distributed.destroy_process_group()
    before = examples.policy(0).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in alone["policy"].items())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_learners_node_and_a_copyist_die_and_the_run_ends(tmp_path, monkeypatch):
    checkpoint, seen = driver._Driver._checkpoint, {}
    with two_nodes(monkeypatch) as (cluster, doomed):

        def then_kill(self, iteration, learned):
            checkpoint(self, iteration, learned)
            if iteration == 1:
                kill_copyist(self)
            elif self.learner.restarts == 1 and "removed" not in seen:
                seen["removed"] = iteration
                cluster.add_node(num_cpus=4, object_store_memory=100 * 2**20)
                cluster.remove_node(doomed, allow_graceful=False)
            elif self.learner.restarts >= 2:
                seen["homes"] = {node(rank) for rank in members(self)} - {node(self.writer.handle)}

        def members(self):
            return ray.get(self.learner.handle.__ray_call__.remote(lambda learner: learner._others))

        def kill_copyist(self):
            (copyist,) = ray.get(self.learner.handle.__ray_call__.remote(lambda learner: learner._copyists))
            seen["home"] = node(copyist)
            ray.kill(copyist)

        monkeypatch.setattr(driver._Driver, "_checkpoint", then_kill)
        loop = toy.loop(tmp_path / "run", iterations=24)
        loop.run(toy.runtime(address=cluster.address, learners=2, learner_nodes=2, strategy="ddp",
                             copies=str(tmp_path / "disk of the other node")).improve)
        wait_for(lambda: not list(Path(tmp_path / "disk of the other node").iterdir()), seconds=30)
    _, told = check_whole(tmp_path / "run", 24)
    assert seen["home"] == doomed.node_id
    assert len(seen["homes"] - {doomed.node_id}) == 1, "its rank is on the node that came instead"
    assert told[-1]["restarts"] >= 3, "the learner twice, and the collector of that node"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_driver_without_room_for_its_imaginers_says_so(tmp_path, monkeypatch):
    with two_nodes(monkeypatch) as (cluster, _):
        loop = toy.loop(tmp_path / "run", imagined=0.3)
        with pytest.raises(UserError, match=r"a CPU for each of runtime\.imaginers=1 on the driver's machine, got 0"):
            loop.run(toy.runtime(address=cluster.address).improve)
