"""The simulator's side: ``python -m sim.remote.serve <file descriptor> <module>:<factory>``, in the simulator's Python.

To bring another simulator, write a module that its Python can import, with a factory that takes a configuration (plain
values) and returns a ``Simulator``. Raise ``protocol.BadInputError`` for what a user can mend; anything else counts as
a crash, after which this process is replaced. Import nothing of this project but ``sim.remote`` there.

The process leaves when its caller is gone, however that happened. What it prints belongs to a log that errors quote.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.metadata
import mmap
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from sim.remote import protocol
from sim.remote.protocol import Answers, BadInputError, Block, Description, GoneError


class Simulator(Protocol):
    """Some rows of a simulator. ``n`` rows are asked together; ``mask`` says which of them a call is about.

    A row that is not asked may go on inside, where the simulator has no other way, but is not shown: its answers stay
    as they are. A finished row is not asked again before it is reset, and the caller sees no automatic reset: a
    simulator that resets by itself shows the final observation of the old episode.
    """

    description: Description

    def reset(self, mask: np.ndarray, seeds: np.ndarray, answers: Answers) -> Mapping[int, str]:
        """Begin an episode in the rows of ``mask``, each from its seed (int64 ``[n]``), and show its first observation.

        Returns the instruction of each of these rows.
        """
        ...

    def step(self, actions: np.ndarray, mask: np.ndarray, answers: Answers) -> None:
        """One control step of the rows of ``mask`` with normalised ``actions`` (float32 ``[n, a]``); show the end."""
        ...

    def close(self) -> None:
        """Free what must be freed before the process ends."""
        ...


class Changeable(Protocol):
    """A simulator that can differ from its nominal form, in the ``factors`` of its description."""

    def perturb(self, row: int, changes: Mapping[str, Any]) -> None:
        """The row, which is reset or restored next, differs from nominal by ``changes`` and by nothing else.

        They are checked: values by factor, as in ``sim.perturbation``, tuples as lists. Drawing from ranges is done
        where this is called from.
        """
        ...


class Demonstrating(Protocol):
    """A simulator with a scripted expert."""

    def expert(self, mask: np.ndarray, actions: np.ndarray) -> None:
        """Write what it would do now in the rows of ``mask`` into ``actions``: float32 ``[n, a]``, within [-1, 1]."""
        ...


class Restorable(Protocol):
    """A simulator whose rows can be put back."""

    def snapshot(self, row: int) -> Mapping[str, np.ndarray]:
        """All that decides how the row goes on, as numeric arrays."""
        ...

    def restore(self, row: int, snapshot: Mapping[str, np.ndarray], answers: Answers) -> str:
        """Go on from a ``snapshot`` of any row of the same task: show what it showed. Returns the instruction."""
        ...


def serve(connection: socket.socket, factory: str) -> None:
    """Answer calls until the caller has gone."""
    protocol.send(connection, {"protocol": protocol.VERSION, "python": platform.python_version()})
    served = _Served(connection, factory)
    try:
        while True:
            call, arrays = protocol.receive(connection)
            try:
                with _limit(call["seconds"]):
                    answer, result = getattr(served, call["call"])(call, arrays)
            except BadInputError as error:
                protocol.send(connection, {"bad_input": str(error)})
            except (Exception, SystemExit):  # SystemExit is how a missing Isaac Sim ends
                protocol.send(connection, {"crash": traceback.format_exc()})
            else:
                protocol.send(connection, answer, result)
                served.hand_over()
    except GoneError:
        pass
    finally:
        served.close()


class _Served:
    """The calls, by name: each takes the message and its arrays and returns those of the answer."""

    def __init__(self, connection: socket.socket, factory: str) -> None:
        self._connection, self._factory = connection, factory
        self._simulator: Any = None
        self._block: Block
        self._unsent: int | None = None
        """Descriptor of the shared memory, before the caller has it."""

    def make(self, call: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
        """Build the simulator and the shared memory."""
        module, _, name = self._factory.partition(":")
        self._simulator = getattr(importlib.import_module(module), name)(call["config"])
        description: Description = self._simulator.description
        size = protocol.block_bytes(description)
        self._unsent = os.memfd_create("simulator")
        os.ftruncate(self._unsent, size)
        self._block = protocol.map_block(mmap.mmap(self._unsent, size), description)
        return {"description": description.to_dict(), "expert": hasattr(self._simulator, "expert"),
                "snapshots": hasattr(self._simulator, "snapshot")}, {}

    def hand_over(self) -> None:
        """The shared memory follows the answer to ``make``."""
        if self._unsent is not None:
            socket.send_fds(self._connection, [b"m"], [self._unsent])
            os.close(self._unsent)
            self._unsent = None

    def reset(self, call: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
        block = self._block
        for row in np.flatnonzero(block.mask).tolist():
            self._perturb(row, call["changes"][row])
        told = self._simulator.reset(block.mask, block.seeds, block.sides[call["side"]])
        return {"instructions": {str(row): text for row, text in told.items()}}, {}

    def step(self, call: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
        self._simulator.step(self._block.actions, self._block.mask, self._block.sides[call["side"]])
        return {}, {}

    def expert(self, call: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
        self._simulator.expert(self._block.mask, self._block.expert)
        return {}, {}

    def snapshot(self, call: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
        return {}, dict(self._simulator.snapshot(call["row"]))

    def restore(self, call: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
        self._perturb(call["row"], call["changes"])
        return {"instruction": self._simulator.restore(call["row"], arrays, self._block.sides[call["side"]])}, {}

    def drive(self, call: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
        """Step the rows of the mask ``call["steps"]`` times without the caller, to measure what a worker costs."""
        began = time.perf_counter()
        for _ in range(call["steps"]):
            self._simulator.step(self._block.actions, self._block.mask, self._block.sides[call["side"]])
        return {"elapsed": time.perf_counter() - began}, {}

    def _perturb(self, row: int, changes: Mapping[str, Any]) -> None:
        if self._simulator.description.factors:
            self._simulator.perturb(row, changes)

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """End this process, with a trace of where it was, when the block takes longer; also when it holds the GIL."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _leave_with(parent: int) -> None:
    """End this process once its caller's is gone; a closed socket alone would not tell in the middle of a call."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the caller decides when we end
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
