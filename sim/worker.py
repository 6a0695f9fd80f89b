"""A process that plays several environments, spoken to over a socket.

Started as ``python -m sim.worker <file descriptor>`` rather than through ``multiprocessing``, so that it imports
neither the caller's main module nor torch. It leaves when the other end of the socket closes, however that happens.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from sim.perturbation import Perturbation
from sim.task import TaskConfig


class Rows:
    """Some rows of a ``VectorEnv``: the same calls here or behind a socket, each with an argument per row."""

    def __init__(self, tasks: Mapping[int, str], config: TaskConfig) -> None:
        self._tasks = {row: config.make(task) for row, task in tasks.items()}

    def reset(self, seeds: Mapping[int, int]) -> dict[int, tuple]:
        """Restart rows with their seeds."""
        return {row: tuple(self._tasks[row].reset(seed)) for row, seed in seeds.items()}

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, tuple]:
        """One control step of each row given."""
        return {row: tuple(self._tasks[row].step(action)) for row, action in actions.items()}

    def expert(self, rows: Iterable[int]) -> dict[int, np.ndarray]:
        """Ask the scripted expert's action for each row."""
        return {row: self._tasks[row].expert_action() for row in rows}

    def perturb(self, perturbations: Mapping[int, Perturbation]) -> dict[int, None]:
        """From each row's next reset on."""
        for row, perturbation in perturbations.items():
            self._tasks[row].perturb(perturbation)
        return dict.fromkeys(perturbations)

    def snapshot(self, rows: Iterable[int]) -> dict[int, dict[str, Any]]:
        """All that decides what each row does next."""
        return {row: self._tasks[row].snapshot() for row in rows}

    def restore(self, snapshots: Mapping[int, Mapping[str, Any]]) -> dict[int, tuple]:
        """Put rows where their snapshots were taken."""
        return {row: tuple(self._tasks[row].restore(snapshot)) for row, snapshot in snapshots.items()}

    def close(self) -> None:
        """Free the GL contexts."""
        for task in self._tasks.values():
            task.close()


def serve(connection: Connection) -> None:
    """Answer ``(method, argument)`` with ``("ok", result)`` or ``("error", traceback)`` until the socket closes."""
    rows = None
    try:
        while True:
            method, argument = connection.recv()
            try:
                if method == "make":
                    rows, result = Rows(*argument), None
                else:
                    result = getattr(rows, method)(argument)
            except Exception:
                connection.send(("error", traceback.format_exc()))
            else:
                connection.send(("ok", result))
    except (EOFError, OSError):
        pass  # the caller closed, or is gone
    finally:
        if rows is not None:
            rows.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the caller decides when we end
    serve(Connection(int(sys.argv[1])))
