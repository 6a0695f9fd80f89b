"""The benchmarks of ``docs/scaling.md`` as a user types them, with less of everything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SMALL = ["env.tasks=[drawer-close-v3]", "env.config.max_episode_steps=8", "loop.cloning.steps=2", "env.num_envs=4",
         "loop.config.demonstrations_per_task=4", "loop.config.prefill_episodes=2", "loop.replay.windows=2",
         "loop.config.episodes_per_iteration=4", "loop.config.updates_per_iteration=2"]
SUITES = {
    "throughput": [*SMALL, "latencies_ms=[5]", "repeats=1", "seconds=1", "env.workers=1"],
    "inference": ["env.config.max_episode_steps=8", "batch_sizes=[1,4]", "ages_ms=[0,5]", "load.rows=4",
                  "load.seconds=1"],
    "async_endurance": [*SMALL, "latency_ms=5", "minutes=0.3"],
}

pytestmark = [pytest.mark.ray, pytest.mark.sim, pytest.mark.slow, pytest.mark.xdist_group("ray")]


@pytest.mark.parametrize("suite", SUITES)
def test_it_runs_and_leaves_its_results(suite, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "benchmark", f"suite={suite}", f"hydra.run.dir={tmp_path}",
         *SUITES[suite]], cwd=tmp_path, check=False, text=True, capture_output=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    grew = suite == "async_endurance" and done.returncode == 1  # a start is no endurance
    assert done.returncode == 0 or grew, done.stdout + done.stderr
    assert json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / f"{suite}.png").stat().st_size > 1000
