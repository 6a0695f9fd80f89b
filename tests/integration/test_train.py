"""The whole loop, small: every stage runs, is resumed after ``kill -9``, and ends where an uninterrupted run ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.store import ReplayStore
from wm_rl.loop import STAGES
from wm_rl.policy import TinyVLA

ROOT = Path(__file__).parents[2]
TINY = ["experiment=smoke", "loop.iterations=2", "loop.refit_every=1", "loop.updates_per_iteration=2",
        "cloning.steps=8", "world_model.steps=3", "world_model.round_steps=2", "evaluation.trials_per_task=2",
        "env.config.max_episode_steps=14", "stand_in.config.max_episode_steps=14", "env.workers=1",
        "stand_in.workers=1"]

pytestmark = [pytest.mark.sim, pytest.mark.slow, pytest.mark.xdist_group("train")]


def start(*words):
    return subprocess.Popen([sys.executable, "main.py", "train", *words], cwd=ROOT, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(*TINY, f"hydra.run.dir={folder}"))
    return folder


def test_it_leaves_what_it_promises(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert all(summary["gradient_share"][source] > 0 for source in ("sim", "real", "imagined"))
    assert sum(summary["gradient_share"].values()) == pytest.approx(1)
    everything = summary["success"]["sampled"]["all tasks"]
    assert everything["trials"] == 4
    assert {"estimate", "low", "high"} == set(everything["before"]) == set(everything["after"])
    assert set(summary["seconds"]) == {"record", "ingest", "demonstrate", "clone", "prefill", "world_model", "collect",
                                       "audit", "imagine", "update", "evaluate"}
    assert summary["world_model"]["psnr_model_1"] > 5
    page = (whole / "report.html").read_text()
    assert "stand-in" in page
    assert "Held against newly collected episodes" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (whole / "videos" / "after.mp4").stat().st_size > 1000
    store = ReplayStore.open(whole / "replay.zarr")
    told = {(row["source"], row["behaviour"]) for row in store.summary()}
    assert told == {("real", "cloned"), ("sim", "cloned"), ("sim", "logged"), ("imagined", "logged")}
    assert TinyVLA.load(whole / "policy").version == 4
    assert list((whole / "tensorboard").rglob("events.out.tfevents.*"))


def test_killed_in_every_stage_it_ends_the_same(whole, tmp_path):
    folder, words = tmp_path / "run", [*TINY, f"hydra.run.dir={tmp_path / 'run'}"]
    for stage in range(len(STAGES) + 2):  # the last two: in the second iteration, and in the evaluation
        process = start(*words)
        reached = {len(STAGES): f"{len(STAGES) - 1}000001.pt", len(STAGES) + 1: f"{len(STAGES) - 1}000002.pt"}.get(
            stage, f"{stage}000000.pt")
        before = time.monotonic()
        while stage > 0 and not (folder / "checkpoints" / reached).exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() - before < 200
            time.sleep(0.005)
        time.sleep(6.0 if stage == 0 else 0.15)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        words = [f"resume={folder}"]
        if stage == 0:  # as if it had been killed while the logs were written
            (folder / "logs" / "meta").mkdir(parents=True, exist_ok=True)
            (folder / "logs.partial" / "data").mkdir(parents=True, exist_ok=True)
    finish(start(*words))
    expected, got = ((run / "policy" / "policy.safetensors").read_bytes() for run in (whole, folder))
    assert got == expected
    first, second = (json.loads((run / "summary.json").read_text()) for run in (whole, folder))
    assert second["trials"] == first["trials"]
    assert second["store"] == first["store"]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, folder)]
    assert lines[0] == lines[1]


def test_interrupted_it_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    process = start(*TINY, "replay.mix.imagined=0", f"hydra.run.dir={folder}")
    before = time.monotonic()
    while not (folder / "checkpoints" / "3000000.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - before < 200
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"resume={folder}" in output.replace("\n", "")
    assert "Traceback" not in output


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_run_the_same_command_and_stop_together(strategy, tmp_path):
    """Only the first process is asked to stop, as Slurm may do it."""
    folder = tmp_path / "run"
    process = start(*TINY, "replay.mix.imagined=0", "runtime.devices=2", f"runtime.strategy={strategy}",
                    f"hydra.run.dir={folder}")
    before = time.monotonic()
    while not (folder / "checkpoints" / f"{len(STAGES) - 1}000001.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - before < 200
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    finish(start(f"resume={folder}"))
    assert json.loads((folder / "summary.json").read_text())["success"]
