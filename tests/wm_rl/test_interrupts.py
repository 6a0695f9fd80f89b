import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wm_rl import interrupts

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("signals")


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_swallowed_request_is_remembered(number):
    interrupts.check()
    with contextlib.suppress(BaseException):
        signal.raise_signal(number)
    assert interrupts.seen()
    assert interrupts.exit_status() == 128 + number
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.remember()
    interrupts.check()


def test_where_it_would_do_harm_it_is_only_remembered():
    with interrupts.deferred():
        with interrupts.deferred():
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # Slurm sends both
        signal.raise_signal(signal.SIGINT)
    assert interrupts.exit_status() == 128 + signal.SIGUSR1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_within_it_a_part_may_be_interrupted_at_once():
    with interrupts.deferred():
        with pytest.raises(KeyboardInterrupt), interrupts.immediate():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # deferred again
        with pytest.raises(KeyboardInterrupt), interrupts.immediate():
            pytest.fail("a request that came before is raised first")


def test_the_second_ctrl_c_is_not_deferred():
    with interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_library_that_took_the_signals_gives_them_back():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    interrupts.listen()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_command_ends_with_the_status_that_a_shell_expects(number):
    code = ("import sys, time; from wm_rl import cli, interrupts; interrupts.remember()\n"
            "def job(): print('here', flush=True); time.sleep(60)\n"
            "cli._job = job; sys.exit(cli.run(['main.py', 'train']))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ)
    assert process.stdout.readline() == b"here\n"
    begun = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert time.monotonic() - begun < 20
    process.stdout.close()
