import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARENT = """
import os, sys, time
from wm_rl.workers import one_core_each
from tests.wm_rl.test_workers import write_number_and_sleep
if __name__ == "__main__":
    with one_core_each(1) as pool:
        pool.submit(write_number_and_sleep, sys.argv[1]).result()
"""


def write_number_and_sleep(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def running(number):
    """Neither gone nor a zombie."""
    stat = Path(f"/proc/{number}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_does_not_outlive_a_killed_parent(tmp_path):
    script, note = tmp_path / "parent.py", tmp_path / "number"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script), str(note)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    before = time.monotonic()
    while not (note.exists() and note.read_text()):
        assert parent.poll() is None
        assert time.monotonic() - before < 60
        time.sleep(0.05)
    worker = int(note.read_text())
    assert running(worker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while running(worker):
        assert time.monotonic() - before < 90
        time.sleep(0.05)
