import contextlib
import signal

import pytest

from wm_rl import interrupts


def test_a_swallowed_interrupt_is_remembered():
    before = signal.getsignal(signal.SIGINT)
    try:
        interrupts.remember()
        interrupts.check()
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.remember()
        interrupts.check()
    finally:
        signal.signal(signal.SIGINT, before)
