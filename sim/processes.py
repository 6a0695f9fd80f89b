"""Where the rows of a ``VectorEnv`` live: in this process, or in one of their own. Both answer the same calls."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sim.task import TaskConfig
from sim.worker import Rows


class Local:
    """Rows in this process."""

    def __init__(self, rows: Mapping[int, str], config: TaskConfig) -> None:
        self.rows, self._answer = rows, None
        self._rows = Rows(rows, config)

    def send(self, method: str, argument: Any) -> None:
        """Do it; ``receive`` hands the answer over."""
        self._answer = getattr(self._rows, method)(argument)

    def receive(self) -> Any:
        """The answer to what was sent last."""
        return self._answer

    def close(self) -> None:
        """Free what the rows hold."""
        self._rows.close()


class Remote:
    """Rows in a process of their own."""

    def __init__(self, rows: Mapping[int, str], config: TaskConfig) -> None:
        self.rows = rows
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        threads = {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}  # processes are the parallelism
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sim.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **threads, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        self.send("make", (dict(rows), config))

    def send(self, method: str, argument: Any) -> None:
        """Ask; ``receive`` waits for the answer. RuntimeError when the process is gone."""
        try:
            self._connection.send((method, argument))
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        """The answer to what was sent last. RuntimeError when the process is gone, or failed."""
        try:
            status, result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if status == "error":
            raise RuntimeError(f"the simulation process of {self._who()} failed:\n{result}")
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _who(self) -> str:
        return f"rows {min(self.rows)}-{max(self.rows)} ({', '.join(sorted(set(self.rows.values())))})"

    def _died(self) -> RuntimeError:
        try:
            code: int | str = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "unknown"
        return RuntimeError(f"the simulation process of {self._who()} died (exit code {code}; -9 is often memory)")
