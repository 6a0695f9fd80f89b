"""How a run fares, for somebody in another terminal: the run writes, anybody reads.

``status.json`` in the run's folder is written every other second, whole or not at all, by the process that drives the
run, whatever stage it is in; ``metrics.jsonl`` beside it holds a row for every iteration. Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.types import UserError

NAME = "status.json"
_EVERY = 2.0
"""Seconds between two writings."""
_SILENT = 30.0
"""Age of the last word, in seconds, from which a driver is not believed to run."""
_ITERATIONS = 8
"""Newest iterations whose times are kept: rates and the time to go are of these."""

State = Literal["running", "ended", "stopped", "failed", "gone", "silent"]


@contextmanager
def told(folder: Path, describe: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Keep ``status.json`` up to date while the block runs, and say in it how the block ended.

    ``describe()`` is called in a thread. Of its keys ``iteration`` and ``seconds`` (by stage; ``update`` counts) are
    read here, the rest is written as it comes.
    """
    teller = _Teller(folder / NAME, describe)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_EVERY):
            teller.tell("running")

    teller.tell("running")
    thread = threading.Thread(target=beat, name="status", daemon=True)
    thread.start()
    ending: tuple[State, str] = ("ended", "")
    try:
        yield
    except KeyboardInterrupt:
        ending = "stopped", ""
        raise
    except BaseException as error:
        what = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        ending = "failed", f"{what}{error}".splitlines()[0]
        raise
    finally:
        over.set()
        thread.join()
        teller.tell(*ending)


class _Teller:
    def __init__(self, path: Path, describe: Callable[[], Mapping[str, Any]]) -> None:
        self._path, self._describe, self._begun = path, describe, time.time()
        self._passed: deque[tuple[float, int, float]] = deque(maxlen=_ITERATIONS + 1)

    def tell(self, state: State, why: str = "") -> None:
        now, facts = time.time(), dict(self._describe())
        iteration = facts.get("iteration", 0)
        if not self._passed or iteration != self._passed[-1][1]:
            self._passed.append((now, iteration, facts.get("seconds", {}).get("update", 0.0)))
        said = {"state": state, "why": why, "written": now, "begun": self._begun, "host": socket.gethostname(),
                "pid": os.getpid(), "passed": list(self._passed), **facts}
        partial = self._path.with_suffix(".partial")
        with suppress(OSError):  # a full disk is not this one's to complain of
            partial.write_text(json.dumps(said, default=float))
            partial.replace(self._path)


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a run's folder says."""

    folder: Path
    state: State
    why: str
    """Of a failure."""
    age: float
    """Seconds since the driver's last word."""
    facts: Mapping[str, Any]
    """``status.json``."""
    rows: Sequence[Mapping[str, Any]]
    """Rows of kind ``train``, the oldest first."""
    verdict: str
    """Of a run that ended; empty before."""

    @property
    def over(self) -> bool:
        """There will be nothing new."""
        return self.state not in ("running", "silent")

    def rates(self) -> dict[str, float]:
        """Control steps and updates per second, and the share of the time spent in updates.

        As the newest row says, or else between the ends of the newest iterations; empty before there are two.
        """
        named = ("control_steps_per_s", "updates_per_s", "trainer_utilisation")
        if self.rows and all(name in self.rows[-1] for name in named):
            return {name: self.rows[-1][name] for name in named}
        passed = self.facts["passed"]
        if len(passed) < 2 or "updates_per_iteration" not in self.facts:
            return {}
        (begun, first, busy), (ended, last, busier) = passed[0], passed[-1]
        steps = sum(row.get("control_steps", 0) for row in self.rows if first <= row["step"] < last)
        seconds = ended - begun
        return {"control_steps_per_s": steps / seconds, "trainer_utilisation": (busier - busy) / seconds,
                "updates_per_s": (last - first) * self.facts["updates_per_iteration"] / seconds}

    def seconds_to_go(self) -> float | None:
        """Until the last iteration ends, if they go on as the newest did; None where that is not known."""
        passed = self.facts["passed"]
        if self.over or len(passed) < 2:
            return None
        (begun, first, _), (ended, last, _) = passed[0], passed[-1]
        left = (self.facts["iterations"] - last) * (ended - begun) / (last - first)
        return max(0.0, left - (self.facts["written"] - ended))


def read(folder: Path) -> Status:
    """What the run in ``folder`` says now.

    Raises:
        UserError: there is no run, or one of a version that wrote no ``status.json``.
    """
    if not (folder / NAME).is_file():
        raise UserError(_no_run(folder))
    facts = json.loads((folder / NAME).read_text())
    age = max(0.0, time.time() - facts["written"])
    summary = folder / "summary.json"
    verdict = json.loads(summary.read_text())["verdict"] if facts["state"] == "ended" and summary.is_file() else ""
    return Status(folder=folder, state=_state(facts, age), why=facts["why"], age=age, facts=facts, rows=_rows(folder),
                  verdict=verdict)


def _state(facts: Mapping[str, Any], age: float) -> State:
    if facts["state"] != "running":
        return facts["state"]
    if facts["host"] == socket.gethostname() and not _is_there(facts["pid"]):
        return "gone"
    return "silent" if age > _SILENT else "running"


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Whole rows of kind ``train``."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.startswith('{"kind": "train"') and line.endswith("}")]


def _no_run(folder: Path) -> str:
    if (folder / "metrics.jsonl").is_file():
        return (f"{folder} holds a run that says nothing of itself: expected {folder / NAME}, which python main.py "
                f"train writes; type: python main.py train resume={folder}")
    runs = sorted({path.parent for depth in ("*", "*/*") for path in Path("runs").glob(f"{depth}/{NAME}")},
                  key=lambda path: (path / NAME).stat().st_mtime)
    hint = f"the newest here is run={runs[-1]}" if runs else "give the folder of a train run, e.g. run=runs/demo"
    return f"no run in {folder}: expected {folder / NAME}; {hint}"
