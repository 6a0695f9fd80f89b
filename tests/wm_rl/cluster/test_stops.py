"""The driver is killed, or asked to stop: it leaves no process behind, and is resumed where it stood."""

import os
import signal

import pytest
import ray
from ray.cluster_utils import Cluster

from data.store import ReplayStore
from tests.wm_rl.cluster.processes import TAG, check_whole, start, tagged, wait_for, wait_until_gone
from wm_rl.checkpoint import load_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]
ACTORS = tuple(f"ray::{name}" for name in (
    "Collector", "Imaginer", "InferenceServer", "ModelLearner", "PolicyLearner", "Writer"))


def reached(folder, iteration):
    return lambda: (folder / "checkpoints" / f"{6_000_000 + iteration}.pt").exists()


def finish(folder, iterations, **settings):
    process = start(folder, iterations, **settings)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return check_whole(folder, iterations)


def check_streams(folder, before):
    """Whoever was started anew played on: the streams of before the stop are over."""
    progress = load_checkpoint(folder / "checkpoints")["progress"]["cluster"]
    assert progress["streams"] > before["streams"]
    assert progress["collected"] >= before["collected"]


def test_a_killed_driver_leaves_nobody_behind_and_resumes(tmp_path):
    folder, tag = tmp_path / "run", str(tmp_path)
    process = start(folder, 4, tag=tag)
    wait_for(reached(folder, 1), process=process)
    assert len(tagged(tag)) > 6
    process.kill()
    process.communicate()
    print(f"nobody left after {wait_until_gone(tag, seconds=30):.1f} s")
    before = load_checkpoint(folder / "checkpoints")["progress"]["cluster"]
    finish(folder, 4, tag=tag)
    check_streams(folder, before)
    wait_until_gone(tag, seconds=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop_it_saves_where_it_stands_and_resumes(number, tmp_path):
    """SIGINT goes to the whole group, as a terminal sends it; the others to the driver alone."""
    folder, tag = tmp_path / "run", str(tmp_path)
    process = start(folder, 4, tag=tag)
    wait_for(reached(folder, 1), process=process)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    wait_until_gone(tag, seconds=10)
    state = load_checkpoint(folder / "checkpoints")
    assert state["progress"]["iteration"] == state["learner"]["version"] // 4
    with ReplayStore.open(folder / "replay.zarr") as store:
        assert sum(state["progress"]["position"].values()) <= len(store)
    finish(folder, 4, tag=tag)
    check_streams(folder, state["progress"]["cluster"])


def test_on_a_joined_cluster_the_actors_of_a_killed_driver_end_too(tmp_path, monkeypatch):
    folder, tag = tmp_path / "run", str(tmp_path)
    monkeypatch.setenv(TAG, "cluster of " + tag)
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 3, "object_store_memory": 100 * 2**20, "include_dashboard": False})
    try:
        process = start(folder, 4, tag=tag, RAY_ADDRESS=cluster.address)
        wait_for(reached(folder, 1), process=process)

        def actors():
            return [name for name in tagged("cluster of " + tag).values() if name.startswith(ACTORS)]

        assert len(actors()) >= 6
        process.kill()
        process.communicate()
        took = wait_for(lambda: not actors() and not tagged(tag), seconds=30)
        print(f"its actors were gone after {took:.1f} s")
        finish(folder, 4, tag=tag, RAY_ADDRESS=cluster.address)
    finally:
        cluster.shutdown()
        ray.shutdown()
