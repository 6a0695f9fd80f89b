import signal

import pytest

from wm_rl import interrupts


@pytest.fixture
def signals():
    """Handlers afterwards as they were, and no request to stop remembered."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.remember()
    yield
    interrupts.remember()
    for number, handler in before.items():
        signal.signal(number, handler)
