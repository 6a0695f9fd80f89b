"""The benchmark of the model of a cluster: what it says of AcceRL's figures, its picture, and the command itself."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data.types import UserError
from tests.wm_rl.test_cluster_model import ALONE
from wm_rl.cluster_calibration import cores, free_cores
from wm_rl.cluster_model import predict
from wm_rl.commands import benchmark_cluster_model as benchmark

ROOT = Path(__file__).parents[2]
SCALING = benchmark.Scaling(devices=[1, 2], collectors=2, rows=4, inference_servers=3, latency_ms=50.0, link_gbit=8.0,
                            link_latency_ms=0.5, seconds=10.0)


def test_accerls_trainers_beside_two_fits():
    found = benchmark.accerl()
    assert found["published"] == [14.1, 28.8, 42.4, 60.3, 76.0, 90.8, 104.2]
    for k, (truth, linear, sharded) in enumerate(
            zip(found["published"], found["linear"], found["sharded"], strict=True), start=1):
        assert linear == pytest.approx(14.1 * k, rel=3e-3)
        one, shared = found["seconds_per_sample"], found["shared_seconds_per_sample"]
        assert sharded == pytest.approx(k / (one - shared + shared / k), rel=3e-3)
        if k in (1, 7):  # fitted to
            assert sharded == pytest.approx(truth, rel=3e-3)


def test_a_scaled_device_brings_its_parts_and_links():
    model = SCALING.model(replace(ALONE, cores=2, update=0.4))
    assert (model.collectors, model.rows, model.servers, model.learners, model.cores) == (2, 4, 3, 1, None)
    assert (model.bandwidth, model.latency, model.step_latency, model.update) == (1e9, 0.0005, 0.05, 0.4)
    assert model.scaled(4).collectors == 8
    for wrong in ({"devices": []}, {"devices": [0]}, {"seconds": 0.0}, {"link_gbit": 0.0}):
        with pytest.raises(UserError):
            replace(SCALING, **wrong)


def test_its_picture_and_tables(tmp_path):
    model = SCALING.model(replace(ALONE, update=0.4, updates_per_episode=1.0))
    scaled = [{"devices": n, **benchmark.figures(predict(model.scaled(n), seconds=10.0, warm_up=5.0))} for n in (1, 2)]
    json.dumps(scaled)
    benchmark.draw(scaled, benchmark.accerl(), tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").width > 1000
    table = benchmark._scaled(scaled)
    assert table.row_count == 2
    measured = dict.fromkeys(benchmark._COMPARED, 1.0)
    assert benchmark._compared([{"latency_ms": 5.0, "measured": measured, "free_cores": [2.0, 1.5],
                                 "predicted": scaled[0]}]).row_count == 1


def test_free_cores_are_no_more_than_there_are():
    assert 0 < free_cores(0.5) <= cores() + 0.1


@pytest.mark.ray
@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_the_command_measures_and_predicts(tmp_path):
    small = ["env.tasks=[drawer-close-v3]", "env.num_envs=4", "env.config.max_episode_steps=14", "loop.cloning.steps=2",
             "loop.config.demonstrations_per_task=2", "loop.config.prefill_episodes=4", "seconds=1",
             "latencies_ms=[100]", "scaling.devices=[1,2]", "scaling.seconds=5", f"hydra.run.dir={tmp_path}/run"]
    result = subprocess.run([sys.executable, str(ROOT / "main.py"), "benchmark", "suite=cluster_model", *small],
                            text=True, capture_output=True, check=False, timeout=500,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    parts = found["parts"]
    assert all(parts[name] > 0 for name in ("step", "update", "append", "call", "send", "ask", "episode_steps"))
    assert parts["forward"][0] < parts["forward"][-1]
    assert parts["weights_bytes"] > 1e6
    [compared] = found["compared"]
    assert compared["measured"]["control_steps_per_s"] > 0
    assert compared["predicted"]["control_steps_per_s"] > 0
    assert [row["devices"] for row in found["scaled"]] == [1, 2]
    assert (tmp_path / "run" / "cluster_model.png").stat().st_size > 10_000
