"""Damaged logs of every format through the whole of ``ingest``; ``python -m tests.logs.faults`` prints the table.

The mapping is proposed for the intact log. Then every case damages a copy, ingests it into a fresh store, lets the
store check itself, and compares what is in it with the intact log's rows: an observation may be an older row, as far
as ``max_gap`` allows; a value that no row has is *altered*, a row put together from rows further apart is *torn*.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from data.logs import hdf5_process
from data.logs.mapping import read_mapping
from data.types import UserError
from data.verify import verify
from tests.logs import hostile, makers
from tests.logs.command import contents, ingest

WAIT_S = 60.0
"""Longest that a case may take."""
OUTCOMES = ("whole", "in part", "refused", "altered", "torn", "traceback", "crash", "time-out")
NEVER = ("torn", "traceback", "crash", "time-out")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is done to a log."""

    fault: str
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of it."""

    outcome: str
    said: str
    """The line of a refusal, or the traceback."""
    rows: int
    """In the store."""
    seconds: float


def cases(kind: str, cuts: int, flips: int) -> list[Case]:
    """Of one format."""
    return [*(Case(fault="cut", number=i) for i in np.linspace(0, 49, cuts).astype(int)),
            *(Case(fault="flip", number=i) for i in range(flips)),
            *(Case(fault=name) for name in hostile.faults(kind))]


def damage(kind: str, source: Path, case: Case) -> None:
    """Cut the bytes of all files together at one of 50 places, flip one bit, or do what the name says."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    place = total * case.number // 50 if case.fault == "cut" else random.Random(case.number).randrange(total)
    if case.fault not in ("cut", "flip"):
        hostile.damage(kind, source, case.fault)
        return
    for file in files:
        content = bytearray(file.read_bytes())
        if place < len(content):
            break
        place -= len(content)
    if case.fault == "cut":
        del content[place:]
    else:
        content[place] ^= 1 << random.Random(-case.number).randrange(8)
    file.write_bytes(content)


class Bench:
    """One format: an intact log, its mapping, and the store that it makes."""

    def __init__(self, kind: str, folder: Path) -> None:
        """``folder`` is made."""
        self.kind, self.folder = kind, folder
        self.intact = makers.write(kind, folder / "intact", makers.demos())
        folder.joinpath("inspected").mkdir()
        self.mapping: str | None = None
        if not kind.startswith("LeRobot"):
            ingest(action="inspect", source=str(self.intact), folder=str(folder / "inspected"))
            self.mapping = str(folder / "inspected/mapping.yaml")
        self.reach = 1
        if self.mapping is not None:
            asked = read_mapping(self.mapping)
            self.reach = round(asked.max_gap * asked.rate) + 1
        self.ingest(self.intact, folder / "store")
        self.expected = contents(folder / "store")
        shutil.rmtree(folder / "store")

    def ingest(self, source: Path, store: Path) -> str:
        """With the intact log's mapping; what the command prints."""
        return ingest(source=str(source), store=str(store), mapping=self.mapping, workers=1,
                      folder=str(self.folder / "inspected"), logs={"image_size": 16, "action_range": "range"})

    def run(self, case: Case) -> Result:
        """Everything, in this process."""
        begun, box = time.perf_counter(), self.folder / "box"
        shutil.rmtree(box, ignore_errors=True)
        source = box / "in/deep/logs"
        shutil.copytree(self.intact, source)
        damage(self.kind, source, case)
        beside, here = hostile.around(source), os.getcwd()
        os.chdir(box)
        said, outcome = "", ""
        try:
            said = self.ingest(source, box / "store")
        except UserError as error:
            said, outcome = str(error), "refused"
        except Exception:
            said, outcome = traceback.format_exc(), "traceback"
        finally:
            os.chdir(here)
        if _THROWN:
            said, outcome = _THROWN.pop(), "traceback"
        if outcome == "refused" and ("\n" in said or not said.isprintable()):
            outcome = "traceback"
        if new := set(hostile.around(source)) ^ set(beside):
            said, outcome = f"beside the log changed: {', '.join(new)}", "torn"
        found = contents(box / "store") if (box / "store/zarr.json").exists() else []
        problems = [] if outcome or not found else verify(box / "store", repair=False).damaged
        if problems or (outcome == "refused" and found):
            said, outcome = f"store: {problems or 'not empty after a refusal'}", "torn"
        outcome = outcome or self._judge(found)
        return Result(outcome=outcome, said=said, rows=sum(len(state) for state, _, _ in found),
                      seconds=time.perf_counter() - begun)

    def _judge(self, found: list[tuple[np.ndarray, ...]]) -> str:
        if not found:
            return "torn"  # a success without an episode
        worst = max((compare(episode, self.expected, self.reach) for episode in found), key=OUTCOMES.index)
        if worst == "whole" and len(found) < len(self.expected):
            return "in part"
        return worst


def compare(found: tuple[np.ndarray, ...], expected: list[tuple[np.ndarray, ...]], reach: int) -> str:
    """The best that an intact episode says of this one: whole, in part, torn, or altered."""
    return min((_compare(found, one, reach) for one in expected), key=("whole", "in part", "torn", "altered").index)


def _compare(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...], reach: int) -> str:
    if len(found) != len(expected):
        return "altered"
    rows = []
    for values, intact in zip(found, expected, strict=True):
        if values.shape[1:] != intact.shape[1:]:
            return "altered"
        mine, theirs = (each.reshape(len(each), -1).astype("f8") for each in (values, intact))
        near = np.abs(mine[:, None] - theirs[None]) <= 1e-5
        same = (near | np.isnan(mine)[:, None] | np.isnan(theirs)[None]).all(2)  # NaN: perhaps clipped
        if not same.any(1).all():
            return "altered"
        here = rows[0][: len(same), None] if rows else 0  # of rows that are alike, the nearest
        rows.append(np.where(same, np.abs(np.arange(len(intact)) - here), len(intact)).argmin(1))
    steps = len(rows[1])
    spread = max(np.ptp([each[:steps] for each in rows], axis=0).max(), abs(rows[0][-1] - rows[2][-1]))
    if spread > reach or any((np.diff(each) < 0).any() for each in rows):
        return "torn"
    exact = all((np.diff(each) == 1).all() for each in rows) and spread == 0
    return "whole" if exact and len(found[0]) == len(expected[0]) else "in part"


# Workers as threads: a process for each of ten thousand cases would take hours


_THROWN: list[str] = []


class _Thread(threading.Thread):
    def __init__(self, target: Callable, args: tuple, daemon: bool) -> None:
        self._theirs = [Connection(os.dup(each.fileno())) for each in args if isinstance(each, Connection)]
        ours = iter(self._theirs)
        super().__init__(target=target, daemon=daemon,
                         args=tuple(next(ours) if isinstance(each, Connection) else each for each in args))

    def run(self) -> None:
        try:
            super().run()
        except BrokenPipeError:
            pass  # who listened has left with an error of its own
        except Exception:
            _THROWN.append(traceback.format_exc())
        finally:
            for each in self._theirs:
                each.close()

    def terminate(self) -> None:
        """Its pipe is closed at the other end."""


class _Threads:
    Pipe, Process = staticmethod(multiprocessing.Pipe), _Thread


def _serve(kind: str, folder: Path, todo: list[Case], pipe: Connection) -> None:
    """In a process of its own: a case may crash it."""
    os.setsid()
    multiprocessing.get_context = lambda method: _Threads  # type: ignore[assignment]
    hdf5_process.WAIT_S = 5.0
    bench = Bench(kind, folder)
    for case in todo:
        pipe.send(bench.run(case))


def run(kind: str, todo: list[Case], folder: Path) -> Iterator[tuple[Case, Result]]:
    """Every case and what became of it. A case that crashes the process, or takes too long, costs only itself."""
    left, attempt = list(todo), itertools.count()
    while left:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(kind, folder / f"{kind}_{next(attempt)}".replace(" ", "_"), left, theirs))
        process.start()
        theirs.close()
        lost = "time-out"
        try:
            while left:
                if not ours.poll(WAIT_S):
                    break
                result = ours.recv()
                yield left.pop(0), result
        except EOFError:
            lost = "crash"
        if left:
            yield left.pop(0), Result(outcome=lost, said=str(process.exitcode), rows=0, seconds=WAIT_S)
        process.kill()
        process.join()
        ours.close()


def table(counts: dict[str, dict[str, Counter]]) -> list[str]:
    """Markdown: a line per format, and in it the outcomes of each kind of fault."""
    faults = next(iter(counts.values()))
    often, never = OUTCOMES[: -len(NEVER)], OUTCOMES[-len(NEVER) :]
    lines = ["| format | " + " | ".join(f"{fault}: {', '.join(often)}" for fault in faults)
             + f" | {', '.join(never)} |", "|---" * (len(faults) + 2) + "|"]
    for kind, found in counts.items():
        cells = [", ".join(str(found[fault][outcome]) for outcome in often) for fault in faults]
        total = sum(found.values(), Counter())
        lines.append(f"| {kind} | " + " | ".join([*cells, ", ".join(str(total[outcome]) for outcome in never)]) + " |")
    return lines


def main(cuts: int = 50, flips: int = 1000, kinds: tuple[str, ...] = tuple(makers.WRITERS)) -> int:
    """Print the table, then the named faults; 1 when something happened that must never happen."""
    counts: dict[str, dict[str, Counter]] = {}
    named: dict[str, dict[str, str]] = {}
    bad = 0
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for kind in kinds:
            begun, counts[kind] = time.perf_counter(), {"cuts": Counter(), "flips": Counter(), "named": Counter()}
            for case, result in run(kind, cases(kind, cuts, flips), Path(scratch)):
                counts[kind][{"cut": "cuts", "flip": "flips"}.get(case.fault, "named")][result.outcome] += 1
                if case.fault not in ("cut", "flip"):
                    named.setdefault(case.fault, {})[kind] = result.outcome
                if result.outcome in NEVER:
                    bad += 1
                    print(f"{kind}, {case}: {result.outcome}: {result.said}", file=sys.stderr)
            print(f"{kind}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
            for folder in Path(scratch).iterdir():
                shutil.rmtree(folder)
    print("\n".join(table(counts)), "\n")
    print("| fault | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 1) + "|")
    for fault, found in named.items():
        print(f"| {fault} | " + " | ".join(found.get(kind, "") for kind in kinds) + " |")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*(int(word) for word in sys.argv[1:3]), *([tuple(sys.argv[3:])] if len(sys.argv) > 3 else [])))
