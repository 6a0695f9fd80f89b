"""A whole node dies under a run: the others take over what it did."""

import time

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.wm_rl.cluster import toy
from tests.wm_rl.cluster.processes import check_whole
from wm_rl.cluster import driver
from wm_rl.cluster.start import SWITCHES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def node_of(member):
    return ray.get(member.handle.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))


def test_what_a_dead_node_did_goes_on_elsewhere(tmp_path, monkeypatch):
    """Two raylets on this machine stand for two nodes; the head has no room for collectors."""
    for name, value in SWITCHES.items():
        monkeypatch.setenv(name, value)
    size = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
    doomed, seen = cluster.add_node(num_cpus=2, **size), {}
    checkpoint = driver._Driver._checkpoint

    def then_kill(self, iteration, learned):
        checkpoint(self, iteration, learned)
        if iteration == 1:
            seen["before"] = [node_of(member) for member in self.collectors]
            cluster.add_node(num_cpus=2, **size)
            cluster.remove_node(doomed, allow_graceful=False)
        if iteration == 10:
            since = time.monotonic()
            while not all(member.up and member.restarts for member in self.collectors):  # Ray may still hope
                assert time.monotonic() - since < 60
                self.crew.attend(0.1)
            seen["after"] = [node_of(member) for member in self.collectors]
            seen["deaths"] = [member.restarts for member in self.collectors]
            seen["head"] = node_of(self.writer)

    monkeypatch.setattr(driver._Driver, "_checkpoint", then_kill)
    try:
        loop = toy.loop(tmp_path / "run", iterations=10)
        loop.run(toy.runtime(address=cluster.address, collectors=2, inference_servers=2).improve)
    finally:
        ray.shutdown()
        cluster.shutdown()
    check_whole(tmp_path / "run", 10)
    assert set(seen["before"]) == {doomed.node_id}
    assert len(set(seen["after"]) - {doomed.node_id, seen["head"]}) == 1
    assert seen["deaths"] == [1, 1]
