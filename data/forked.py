"""A forked process that may be killed, and what it says until then."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

Say = Callable[[dict[str, Any]], None]

_STOP = 1000
"""Descriptor from which a child learns that it is to stop."""


def told_to_stop(*, wait_s: float) -> bool:
    """In a child: its parent called ``stop``, now or within so many seconds."""
    return bool(select.select([_STOP], [], [], wait_s)[0])


class Child:
    """``work`` says JSON lines through a pipe, of 64 kB in all unless the parent already waits."""

    def __init__(self, work: Callable[[Say], None], before: Callable[[], None] | None = None) -> None:
        """``before`` runs first, in the child."""
        self._said, say = os.pipe()
        stopped, self._stop = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(say)
            os.close(stopped)
            return

        def speak(message: dict[str, Any]) -> None:
            os.write(say, json.dumps(message).encode() + b"\n")  # a short write to a pipe is whole or nothing

        try:
            os.dup2(stopped, _STOP)
            if before:
                before()
            work(speak)
        except BaseException:
            speak({"problems": [f"torn: {traceback.format_exc()[-3000:]}"]})
        finally:
            os._exit(0)

    def kill(self) -> None:
        """``kill -9``."""
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> list[dict[str, Any]]:
        """Tell it to stop, and wait."""
        with contextlib.suppress(BrokenPipeError):  # it is over already
            os.write(self._stop, b".")
        return self.wait()

    def wait(self) -> list[dict[str, Any]]:
        """All that it said, once it has ended. A signal other than SIGKILL is a problem."""
        with os.fdopen(self._said, "rb") as pipe:
            said = [json.loads(line) for line in pipe]
        _, status = os.waitpid(self.pid, 0)
        os.close(self._stop)
        died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else signal.SIGKILL
        return said if died == signal.SIGKILL else [*said, {"problems": [f"torn: a process died of signal {died}"]}]
