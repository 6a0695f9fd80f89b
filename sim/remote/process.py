"""One simulator process as its caller sees it: started, asked, and killed when it does not answer."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.types import UserError
from sim.remote import protocol
from sim.remote.protocol import Block, Description, GoneError

ROOT = Path(__file__).resolve().parents[2]
_GRACE = 5.0
"""Seconds that a process which overran its time has to end by itself, which leaves a trace in its log."""
_LAST_WORDS = 4000
"""Bytes of its log that an error quotes."""


class LostError(RuntimeError):
    """The process died, overran its time, or its simulator raised: the ``reason``, one line, and what was said last."""

    def __init__(self, reason: str, said: str) -> None:
        super().__init__(f"{reason}\n{said}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to run."""

    python: Path
    factory: str
    """``module:function`` in the simulator's Python; ``sim.remote.serve`` says what it returns."""
    config: Mapping[str, Any]
    """JSON-able; given to the factory."""
    name: str
    """Of the simulator, for errors."""
    start_seconds: float
    """Longest start: imports, building, compiling."""
    call_seconds: float
    """Longest step, reset or other call."""
    environment: Mapping[str, str]
    """Variables beside the caller's own."""


class SimulatorProcess:
    """Starts at once and builds in the background; ``wait_until_made`` before anything else."""

    description: Description
    has_expert: bool
    has_snapshots: bool
    block: Block

    def __init__(self, program: Program) -> None:
        self._program = program
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._connection, theirs = socket.socketpair()
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONHOME", "VIRTUAL_ENV")}
        with theirs:
            self._child = subprocess.Popen(
                [program.python, "-m", "sim.remote.serve", str(theirs.fileno()), program.factory],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
                start_new_session=True,  # what it starts ends with it
                env={**kept, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1",
                     **program.environment})
        self._limit = program.start_seconds

    def wait_until_made(self) -> None:
        """Wait for the simulator. Raises ``LostError``, and ``UserError`` for what its configuration has wrong."""
        hello, _ = self._receive()
        if hello.get("protocol") != protocol.VERSION:
            raise UserError(f"expected {self._program.python} to speak version {protocol.VERSION} of the simulator "
                            f"protocol, got {hello.get('protocol')}; let both sides use one checkout of this project")
        self.ask("make", config=dict(self._program.config))
        answer, _ = self.answer()
        self._limit = self._program.call_seconds
        self.description = Description(**answer["description"])
        self.has_expert, self.has_snapshots = answer["expert"], answer["snapshots"]
        _, (descriptor,), _, _ = socket.recv_fds(self._connection, 1, 1)
        memory = mmap.mmap(descriptor, protocol.block_bytes(self.description))
        os.close(descriptor)
        self.block = protocol.map_block(memory, self.description)

    def ask(self, call: str, arrays: Mapping[str, np.ndarray] | None = None, **arguments: Any) -> None:
        """Send a call. A process that is gone says so when it should answer."""
        with contextlib.suppress(GoneError):
            protocol.send(self._connection, {"call": call, "seconds": self._limit, **arguments}, arrays)

    def answer(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Wait for what a call gives. Raises ``LostError``, and ``UserError`` for what a user can mend."""
        answer, arrays = self._receive()
        if "bad_input" in answer:
            raise UserError(answer["bad_input"])
        if "crash" in answer:
            said = answer["crash"].rstrip()
            raise LostError(f"{self._program.name} failed: {said.splitlines()[-1]}", said)
        return answer, arrays

    def close(self) -> None:
        """Let it end by itself, then kill it and all that it started. May be called twice."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=_GRACE)
        self.kill()
        self._log.close()

    def kill(self) -> None:
        """End it, and all that it started, now."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def _receive(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            return protocol.receive(self._connection, self._limit + _GRACE)
        except TimeoutError:
            raise self._lost(f"gave no answer within {self._limit:g} s") from None
        except GoneError:
            raise self._lost("died") from None

    def _lost(self, what: str) -> LostError:
        """Say what is known of its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._child.wait(timeout=1.0)
            what = f"{what} (exit code {code}; -9 is often memory)"
        self._log.seek(0)
        lines = self._log.read()[-_LAST_WORDS:].decode(errors="replace").rstrip().splitlines()
        if any(line.startswith("Timeout (") for line in lines):  # it ended itself and left a trace
            what = f"gave no answer within {self._limit:g} s"
        return LostError(f"the process of {self._program.name} {what}; it said last: {(lines or ['nothing'])[-1]}",
                         "\n".join(lines))
