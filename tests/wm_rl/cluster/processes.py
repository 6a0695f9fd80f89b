"""What a run leaves among the machine's processes, and what it says of itself."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from data.store import ReplayStore
from wm_rl.checkpoint import load_checkpoint
from wm_rl.policy import TinyVLA

ROOT = Path(__file__).parents[3]
TAG = "WM_RL_TEST"


def tagged(tag):
    """Name of every process that has ``WM_RL_TEST=tag`` in its environment, by its id; zombies have none."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TAG}={tag}\0".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
    return found


def other_ranks(pid):
    """Processes of the ranks that belong to the first one's."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended just now
            name, state = (folder / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            parents[int(folder.name)] = name, state.split()[1]
    return [other for other, (name, parent) in parents.items()
            if pid in parents and name.startswith("ray::Rank") and parent == parents[pid][1]]


def start(folder, iterations, *, tag, **environment):
    """The toy's last stage in a process of its own, the leader of its group as a terminal would have it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.wm_rl.cluster.toy", str(folder), str(iterations)], cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), TAG: tag, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(what, *, process=None, seconds=300):
    """Until ``what()`` is true; returns how long that took."""
    begun = time.monotonic()
    while not what():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() - begun < seconds, f"not within {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - begun


def wait_until_gone(tag, *, seconds):
    """Until no process has that tag; returns how long that took."""
    begun = time.monotonic()
    while left := tagged(tag):
        assert time.monotonic() - begun < seconds, f"still there after {seconds} s: {left}"
        time.sleep(0.1)
    return time.monotonic() - begun


def rows(folder, kind="train"):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def check_whole(folder, iterations):
    """It ended, once through, with what it should have left."""
    store, told = ReplayStore.open(folder / "replay.zarr"), rows(folder)
    assert [row["step"] for row in told] == list(range(iterations))
    assert TinyVLA.load(folder / "policy").version == 4 * iterations
    assert load_checkpoint(folder / "checkpoints")["learner"]["version"] == 4 * iterations
    simulated = np.flatnonzero(store.episodes.source == "sim")[4:]  # after those that were there
    assert len(simulated) >= 4 * iterations
    seeds = [store.provenance(i)["seed"] for i in simulated]
    assert len(set(seeds)) == len(seeds), "an episode was played twice"
    for i in simulated:
        trajectory = store.trajectory(i)
        assert len(trajectory) == 4 + trajectory.provenance["seed"] % 5
        assert (trajectory.policy_version >= 0).all()
        assert (trajectory.policy_version <= 4 * iterations).all()
        assert (np.diff(trajectory.policy_version) >= 0).all() or any(row["restarts"] for row in told)
    assert all(row["trainer_utilisation"] > 0 for row in told)
    return store, told
