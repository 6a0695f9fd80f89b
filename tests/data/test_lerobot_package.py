"""The ``lerobot`` package itself opens what we write, and reads what we read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.lerobot import read_lerobot
from tests.data.lerobot_package import FINISHED, read_with_package

ROOT = Path(__file__).parents[2]
SMALL = ["env=robot_stand_in", "env.tasks=[drawer-close-v3,door-close-v3]", "env.num_envs=2", "env.workers=1",
         "env.config.max_episode_steps=20", "episodes=3"]


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.skipif("WITH_LEROBOT" not in os.environ, reason="takes a minute or two: type WITH_LEROBOT=1 to run it")
@pytest.mark.skipif(not FINISHED.exists(), reason="the lerobot package is not installed beside this project; type "
                    "python -m tests.data.lerobot_package (up to 6.5 GB)")
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_the_package_reads_what_we_read(version, tmp_path):
    folder = tmp_path / "set"
    subprocess.run([sys.executable, ROOT / "main.py", "collect", *SMALL, f"lerobot={folder}", f"format={version}",
                    f"hydra.run.dir={tmp_path}/run"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    read_with_package(folder, version, tmp_path / "read", tmp_path / "cache")
    theirs, about = np.load(tmp_path / "read.npz"), json.loads((tmp_path / "read.json").read_text())
    ours = read_lerobot(folder)
    episodes = list(ours.episodes())
    rows = [len(episode.action) for episode in episodes]
    assert (about["episodes"], about["frames"]) == (3, sum(rows))
    assert about["package"].startswith({"v2.1": "0.3", "v3.0": "0.4"}[version])
    assert about["rows_of_second"] == rows[1]
    assert (about["fps"], about["cameras"], about["robot"]) == (ours.fps, ours.cameras, ours.info["robot_type"])
    assert about["tasks"] == [episode.instruction for episode, many in zip(episodes, rows, strict=True)
                              for _ in range(many)]
    assert len(set(about["tasks"])) > 1
    np.testing.assert_array_equal(theirs["observation.state"], np.concatenate([each.state for each in episodes]))
    np.testing.assert_array_equal(theirs["action"], np.concatenate([each.action for each in episodes]))
    np.testing.assert_array_equal(theirs["episode_index"], np.repeat(range(3), rows))
    np.testing.assert_allclose(theirs["timestamp"], np.concatenate([each.timestamp for each in episodes]), atol=1e-6)
    np.testing.assert_allclose(about["action_mean"], theirs["action"].astype("f8").mean(0), rtol=1e-6)
    for key in ours.cameras:
        size = ours.info["features"][key]["shape"][0]
        frames = np.concatenate([ours.frames(episode, key, size) for episode in episodes])
        difference = np.abs(theirs[key].transpose(0, 2, 3, 1) * 255 - frames)
        print(f"{version} {key}: {frames.shape}, pictures differ by at most {difference.max():g} of 255")
        assert frames.std() > 20  # pictures of something
        assert difference.max() <= 1  # two decoders' rounding
