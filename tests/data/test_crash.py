"""A handful of the trials that ``python main.py benchmark suite=crash`` and ``suite=endurance`` run."""

import json
import os
import signal

import pytest

from data.crash import run_trial
from data.crash_faults import FAULTS
from data.crash_kill import HOWS, Kill, kill_at
from data.endurance import run_day
from wm_rl.commands.benchmark_crash import benchmark_crash


def test_nothing_acknowledged_is_lost_or_torn(tmp_path):
    assert benchmark_crash(folder=str(tmp_path), trials=3, seed=1, faults=False) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["problems"] == []
    assert results["acknowledged"] > 20
    assert results["kills"] >= 5
    assert results["live_reads"] > 20
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_bug_is_caught(tmp_path, fault):
    for trial in range(12):
        if run_trial(tmp_path, trial=trial, seed=4, fault=fault).caught:
            return
    pytest.fail("not caught in 12 trials")


@pytest.mark.parametrize("how", HOWS)
def test_a_process_dies_at_the_chosen_call(tmp_path, how):
    said, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        kill_at(Kill(call=2, how=how, journal=False, bit=0), lambda name: os.write(say, name.encode()) and None)
        descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.pwrite(descriptor, b"abcd", 0)
        os.pwrite(descriptor, b"efgh", 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    os.close(say)
    assert os.read(said, 99).decode() == f"pwrite, {how}"
    os.close(said)
    left = {"before": b"", "half": b"ef", "spoilt": b"dfgh", "after": b"efgh"}[how]
    assert (tmp_path / "file").read_bytes() == b"abcd" + left


def test_minutes_of_writing_stays_within_the_budget(tmp_path):
    results = run_day(tmp_path / "s", hours=0.06)
    assert results["problems"] == []
    assert results["segments_evicted"] > 5
    assert results["most_bytes"] <= results["budget_bytes"]
    writer = results["samples"]["writer"]
    for name in ("open_files", "mappings", "files"):
        assert max(sample[name] for sample in writer[72:]) <= 1.2 * max(sample[name] for sample in writer[24:48]), name
