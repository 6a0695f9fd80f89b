import os
import subprocess
import sys
from contextlib import contextmanager

from wm_rl.processes import descendants, holdings

CHILD = """
import subprocess, sys, time
kept, files = bytearray({bytes}), [open('/dev/null') for _ in range({files})]
kept[::4096] = b'x' * len(kept[::4096])
child = subprocess.Popen([sys.executable, '-c', 'import time; print(flush=True); time.sleep(60)']) if {child} else None
print('ready', child.pid if child else 0, flush=True)
time.sleep(60)
"""


@contextmanager
def process(**given):
    started = subprocess.Popen([sys.executable, "-c", CHILD.format(**{"bytes": 1, "files": 0, "child": 0} | given)],
                               stdout=subprocess.PIPE, text=True)
    line = ""
    while not line.startswith("ready"):
        line = started.stdout.readline()
    try:
        yield started.pid, int(line.split()[1])
    finally:
        for pid in (int(line.split()[1]), started.pid):
            if pid:
                os.kill(pid, 9)
        started.wait()


def test_children_and_their_children_are_found_and_nobody_else():
    with process(child=1) as (parent, child), process() as (other, _):
        python = os.path.basename(sys.executable)
        assert descendants(parent) == {parent: python, child: python}
        assert {os.getpid(), parent, child, other} <= set(descendants(os.getpid()))


def test_memory_and_open_files_are_counted():
    with process() as (small, _), process(bytes=50 * 2**20, files=30) as (large, _):
        one, other = holdings(small), holdings(large)
        assert 49 * 2**20 < other["private_bytes"] - one["private_bytes"] < 55 * 2**20
        assert other["open_files"] - one["open_files"] == 30
    assert holdings(large) is None
    assert large not in descendants(os.getpid())
