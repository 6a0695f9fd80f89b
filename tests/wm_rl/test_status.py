"""What a run says of itself: of made files, and of a real run of the last stage in one process on a toy simulator."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from data.types import UserError
from tests.wm_rl.cluster import toy
from wm_rl import status
from wm_rl.commands.status import status as command
from wm_rl.commands.status import view
from wm_rl.commands.train import _describe
from wm_rl.improve import improve

ROOT = Path(__file__).parents[2]
FACTS = {"runtime": "ray", "stage": "improve", "iteration": 12, "iterations": 20, "updates_per_iteration": 10,
         "seconds": {"update": 30.0}, "doing": {"title": "improve", "done": 2, "total": 10},
         "passed": [[1000.0, 10, 10.0], [1050.0, 11, 20.0], [1100.0, 12, 30.0]], "live": {}}
LIVE = {"updates": 121, "collected": 200, "quarantined": 3, "rows_allowed": 4,
        "queues": {"requests for inference": 7, "updates that data pays for": 2},
        "members": [{"name": "collector 0", "up": True, "pid": 41, "node": "alpha", "restarts": 2, "silent": 0.4},
                    {"name": "the learner", "up": False, "pid": 42, "node": "beta", "restarts": 0, "silent": None}]}
ROW = {"kind": "train", "step": 11, "collected_success": 0.25, "control_steps": 100}
RAY_ROW = ROW | {"lag": 6.5, "control_steps_per_s": 80.0, "updates_per_s": 1.5, "trainer_utilisation": 0.97,
                 "restarts": 2, "lost_episodes": 1, "inference/batch_rows": 5.5, "inference/wait_p99_ms": 11.0,
                 "inference/latency_p99_ms": 21.0, "imagination_paused": 1.0, "imagined_ratio": 1.7,
                 "imagined_success": 0.5}


def make(folder, rows=(), **changes):
    """A run's files."""
    folder.mkdir(exist_ok=True)
    now = time.time()
    facts = {**FACTS, "state": "running", "why": "", "host": socket.gethostname(), "pid": os.getpid(),
             "begun": now - 60, "written": now} | changes
    (folder / status.NAME).write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st')
    return folder


def printed(folder):
    file = io.StringIO()
    Console(width=160, file=file).print(view(status.read(folder)))
    return file.getvalue()


def test_the_table_of_a_run_on_ray(tmp_path):
    text = printed(make(tmp_path / "run", [RAY_ROW], live=LIVE))
    for said in ("running", "improve (ray), improve 2 of 10", "12 of 20", "80.0 control steps/s, 1.50 updates/s",
                 "trainer busy 97%", "0.25 of collected episodes, 0.50 of imagined ones",
                 "6.5 updates",
                 "5.5 rows a batch", "at most 11 ms", "within 21 ms", "paused, error ratio 1.70",
                 "2 restarts, 1 episodes lost", "200 collected, 3 quarantined, 4 rows allowed",
                 "requests for inference", "updates that data pays for"):
        assert said in text
    lines = text.splitlines()
    [learner] = [line for line in lines if "the learner" in line]
    assert [word in learner for word in ("no", "42", "beta", "never")] == [True] * 4
    [collector] = [line for line in lines if "collector 0" in line]
    assert [word in collector for word in ("yes", "41", "alpha", "2", "0 s ago")] == [True] * 5


def test_rates_of_a_run_in_one_process_are_those_of_its_newest_iterations(tmp_path):
    rows = [{"kind": "train", "step": step, "control_steps": 10**step_power}
            for step, step_power in ((9, 5), (10, 2), (11, 3))]
    seen = status.read(make(tmp_path / "run", rows))
    # iterations 10 and 11 took 100 s: 1100 control steps, 20 updates that took 20 s
    assert seen.rates() == {"control_steps_per_s": 11.0, "updates_per_s": 0.2, "trainer_utilisation": 0.2}


def test_time_to_go_is_that_of_the_iterations_that_are_left(tmp_path):
    seen = status.read(make(tmp_path / "run", written=1130.0, pid=os.getpid()))
    assert seen.seconds_to_go() == 8 * 50 - 30
    assert status.read(make(tmp_path / "run", passed=[[1.0, 12, 0.0]])).seconds_to_go() is None
    assert status.read(make(tmp_path / "run", state="ended")).seconds_to_go() is None


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(("changes", "state", "said"), [
    ({}, "running", "running, last word"),
    ({"state": "ended"}, "ended", "Better than the baseline"),
    ({"state": "stopped"}, "stopped", "go on with: python main.py train resume="),
    ({"state": "failed", "why": "the disk is full"}, "failed", "failed 0:00:00 ago with the disk is full"),
    ({"pid": None}, "gone", "is gone, last word"),
    ({"host": "elsewhere", "written": 1000.0}, "silent", "on elsewhere: it hangs"),
    ({"host": "elsewhere"}, "running", "running"),
    ({"written": 1000.0}, "silent", "no word for"),
])
def test_what_became_of_a_run(changes, state, said, tmp_path, capsys):
    changes = {name: dead_pid() if name == "pid" else value for name, value in changes.items()}
    folder = make(tmp_path / "run", [ROW], **changes)
    (folder / "summary.json").write_text(json.dumps({"verdict": "Better than the baseline: 0.6 → 0.7"}))
    assert status.read(folder).state == state
    assert command(run=str(folder), once=True, every=1.0) == (0 if state in ("running", "ended") else 1)
    assert said in " ".join(capsys.readouterr().out.split())


def test_the_live_view_ends_with_the_run_or_by_ctrl_c(tmp_path, capsys, monkeypatch):
    folder = make(tmp_path / "run", [ROW])
    looks = iter([lambda: None, lambda: make(folder, [ROW], state="ended", iteration=20)])
    monkeypatch.setattr(time, "sleep", lambda seconds: next(looks)())
    assert command(run=str(folder), once=False, every=1.0) == 0
    assert "20 of 20" in capsys.readouterr().out

    def interrupt(seconds):
        raise KeyboardInterrupt

    make(folder, [ROW])
    monkeypatch.setattr(time, "sleep", interrupt)
    assert command(run=str(folder), once=False, every=1.0) == 0


def test_no_run_is_one_line_that_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run in runs/x: expected runs/x/status.json; give the folder"):
        status.read(Path("runs/x"))
    for name, age in (("old", 100), ("new", 0)):
        (tmp_path / "runs" / "train").mkdir(parents=True, exist_ok=True)
        path = make(tmp_path / "runs" / "train" / name) / status.NAME
        os.utime(path, (time.time() - age,) * 2)
    with pytest.raises(UserError, match="the newest here is run=runs/train/new"):
        status.read(Path("runs/x"))
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="says nothing of itself"):
        status.read(tmp_path / "earlier")
    with pytest.raises(UserError, match="every: expected seconds above 0"):
        command(run="runs/train/new", once=True, every=0.0)


@pytest.mark.parametrize(("error", "state", "why"), [
    (None, "ended", ""), (KeyboardInterrupt(), "stopped", ""), (ValueError("a\nb"), "failed", "ValueError: a"),
    (UserError("no room"), "failed", "no room")])
def test_how_the_block_ended_is_told(error, state, why, tmp_path):
    def block():
        with status.told(tmp_path, lambda: {"iteration": 3}):
            assert status.read(tmp_path).state == "running"
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(type(error)):
            block()
    seen = status.read(tmp_path)
    assert (seen.state, seen.why, seen.facts["iteration"]) == (state, why, 3)


def test_whoever_reads_while_it_is_written_sees_a_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "_EVERY", 0.0005)
    stop, read = threading.Event(), []
    big = {"iteration": 0, "ballast": list(range(20_000))}

    def reader():
        while not stop.is_set():
            read.append(status.read(tmp_path).facts["ballast"][-1])

    with status.told(tmp_path, lambda: big):
        thread = threading.Thread(target=reader)
        thread.start()
        time.sleep(1.0)
        stop.set()
        thread.join()
    assert len(read) > 5
    assert set(read) == {19_999}


def test_a_disk_that_is_full_does_not_stop_a_run(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    with status.told(tmp_path, lambda: {"iteration": 0}):
        monkeypatch.setattr(Path, "write_text", refuse)


def test_a_real_run_with_a_toy_simulator_is_seen_from_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "_EVERY", 0.01)
    loop, seen = toy.loop(tmp_path / "run", iterations=3), []
    record = loop.journal.record

    def look(kind, step, metrics):
        record(kind, step, metrics)
        time.sleep(0.1)
        seen.append(status.read(loop.folder))

    monkeypatch.setattr(loop.journal, "record", look)
    with status.told(loop.folder, partial(_describe, loop, "local")):
        loop.run(improve)
    assert [one.facts["iteration"] for one in seen] == [0, 1, 2]
    assert all(one.state == "running" and one.facts["stage"] == "improve" for one in seen)
    assert seen[1].facts["doing"] == {"title": "improve", "done": 1, "total": 3}
    assert not seen[0].rates()
    rates = seen[2].rates()
    assert rates["updates_per_s"] > 0
    assert rates["control_steps_per_s"] > 0
    assert 0 < rates["trainer_utilisation"] <= 1
    end = status.read(loop.folder)
    assert (end.state, end.facts["stage"], end.facts["iteration"]) == ("ended", "evaluate", 3)
    assert "3 of 3" in printed(loop.folder)


def test_the_command_leaves_nothing_behind_and_imports_no_torch(tmp_path):
    make(tmp_path / "run", [ROW], state="ended")
    before = sorted(tmp_path.rglob("*"))
    words = [sys.executable, "-X", "importtime", str(ROOT / "main.py"), "status", "run=run", "once=true"]
    result = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "12 of 20" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert not [line for line in result.stderr.splitlines() if line.endswith("| torch")]
    result = subprocess.run([sys.executable, str(ROOT / "main.py"), "status", "run=nowhere"], cwd=tmp_path, text=True,
                            capture_output=True, check=False, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
