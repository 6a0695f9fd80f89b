"""What the ingestion benchmark measures with; the docs test runs the whole of it, small."""

import sys

from wm_rl.commands.benchmark_ingest import _watch
from wm_rl.made_logs import make_bags, make_lerobot
from wm_rl.plain_decoding import main

GRANDCHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(300 << 20); import time; " \
             "time.sleep(1.5)'])"


def test_memory_is_that_of_all_processes_of_a_command():
    seconds, of_cpu, peak, said = _watch([[sys.executable, "-c", GRANDCHILD], [sys.executable, "-c", "print(3)"]])
    assert said[1] == "3\n"
    assert 300 < peak < 400
    assert seconds > 1.5
    assert of_cpu > 0


def test_every_picture_of_the_logs_is_decoded(tmp_path, capsys):
    for make in (make_bags, make_lerobot):
        files = make(tmp_path / make.__name__, 2, 1.0)
        assert len(files) == 2
        assert make(tmp_path / make.__name__, 2, 1.0) == files
        assert main([str(file) for file in files]) == 0
        assert capsys.readouterr().out == "30\n"
