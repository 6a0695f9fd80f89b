"""A crash test: writers die of SIGKILL while a reader reads and a budget evicts; nothing acknowledged may be lost.

A trial is a store of its own and three rounds. In a round one to three processes append and say so through a pipe once
``append`` has returned; they are killed at a random moment, or each at a chosen write call of its own
(``data.crash_kill``). Then a process recovers the store, which may be killed as well. One reader lives through all
rounds and compares what it sees with what the episodes must be (``data.crash_content``).
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.crash_check import Acknowledged, check
from data.crash_content import SPEC, STATISTICS, Witness, config, episode
from data.crash_faults import FAULTS
from data.crash_kill import HOWS, Kill, kill_at
from data.forked import Child, Say, told_to_stop
from data.store import ReplayStore
from data.types import Source

ROUNDS, APPENDS = 3, 40
_WRITER_CALLS, _WRITER_RECORDS, _RECOVERY_CALLS = 600, 20, 120
"""The fatal call is one of this many first ones: all write calls of a writer, its records, all of a recovery."""


@dataclass
class Tally:
    """What trials came to."""

    trials: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """By the call that was fatal."""
    acknowledged: int = 0
    evicted: int = 0
    """Of the acknowledged ones, those that the budget removed."""
    live_reads: int = 0
    lost: int = 0
    torn: int = 0
    errors: int = 0
    caught: int = 0
    """Trials in which anything was wrong."""
    problems: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another's trials too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def run_trial(folder: Path, *, trial: int, seed: int, fault: str | None = None) -> Tally:
    """One trial in a new store below ``folder``; with a planted fault, what it breaks."""
    plant = FAULTS[fault] if fault else None
    rng = np.random.default_rng([seed, trial])
    path = folder / f"trial-{trial:05d}"
    ReplayStore.create(path, spec=SPEC, statistics=STATISTICS, embodiment="crash")
    reader = Child(partial(_read, path, trial), plant)
    said: list[dict[str, Any]] = []
    for life in range(ROUNDS):
        said += _kill_writers(path, rng, ROUNDS * trial + life, plant, first=10 * life, sync=trial % 10 == 9)
        kill = _kill(rng, 1 + int(rng.integers(_RECOVERY_CALLS))) if rng.random() < 0.5 else None
        said += Child(partial(_recover, path, kill), plant).wait()
    said += reader.stop()
    acknowledged: list[Acknowledged] = [tuple(message["ack"]) for message in said if "ack" in message]
    said += Child(partial(_recover, path, None), plant).wait()
    said += Child(lambda say: say(check(path, acknowledged)), None).wait()
    shutil.rmtree(path)

    problems = [problem for message in said for problem in message.get("problems", [])]
    kinds = Counter(problem.split(":")[0] for problem in problems)
    return Tally(
        trials=1, kills=Counter(message["kill"] for message in said if "kill" in message),
        acknowledged=sum(count for *_, count, _ in acknowledged),
        evicted=sum(message.get("evicted", 0) for message in said),
        live_reads=sum(message.get("reads", 0) for message in said), lost=kinds["lost"], torn=kinds["torn"],
        errors=kinds["error"], caught=bool(problems), problems=[f"trial {trial}: {text}" for text in problems])


def run_trials(folder: Path, *, trials: int, seed: int, fault: str | None, done: Callable[[Tally], None]) -> Tally:
    """That many trials; ``done`` sees the sum after each."""
    total = Tally()
    for trial in range(trials):
        total.add(run_trial(folder, trial=trial, seed=seed, fault=fault))
        done(total)
    return total


def _kill(rng: np.random.Generator, call: int, *, how: str | None = None, journal: bool = False) -> Kill:
    return Kill(call=call, how=how or str(rng.choice(HOWS)), journal=journal,
                bit=int(rng.integers(2**20)))


def _kill_writers(
    path: Path, rng: np.random.Generator, turn: int, plant: Callable[[], None] | None, *, first: int, sync: bool
) -> list[dict[str, Any]]:
    """A round of writers. Every fourth dies at a random moment; in the others the first goes through all calls."""
    moment = turn % 4 == 3
    sweep = turn - turn // 4
    kills: list[Kill | None] = [_kill(rng, 1 + sweep % _WRITER_CALLS,
                                      how=HOWS[(1 + sweep // _WRITER_CALLS) % len(HOWS)])]
    kills += [_kill(rng, 1 + int(rng.integers(_WRITER_RECORDS)), journal=True) for _ in range(rng.integers(3))]
    if moment:
        kills = [None for _ in kills]
    seeds = rng.integers(2**32, size=len(kills)).tolist()
    writers = [Child(partial(_write, path, first + i, seeds[i], kills[i], sync), plant) for i in range(len(kills))]
    if moment:
        time.sleep(0.01 + 0.1 * rng.random())
        for writer in writers:
            writer.kill()
    said = [message for writer in writers for message in writer.wait()]
    return [*said, *({"kill": "random moment"} for _ in writers if moment)]


def _write(path: Path, writer: int, seed: int, kill: Kill | None, sync: bool, say: Say) -> None:
    """Append until the end, or until killed; say what was acknowledged."""
    rng, numbers = np.random.default_rng(seed), Counter[Source]()
    if kill:
        kill_at(kill, lambda call: say({"kill": call}))
    store = ReplayStore.open(path, config(durability="sync" if sync else "process"))
    for append in range(APPENDS):
        source = Source.IMAGINED if rng.random() < 0.3 else Source.SIM
        if writer == 0 and append == 1:
            source = Source.REAL
        first, count = numbers[source], int(rng.integers(1, 4))
        store.append([episode(writer, source, number, first, count) for number in range(first, first + count)])
        numbers[source] += count
        say({"ack": (writer, source.value, first, count, store._writers[source].name)})
        if rng.random() < 0.05:
            store.seal()
    if rng.random() < 0.5:  # else it ends without a word, as if killed
        store.close()


def _recover(path: Path, kill: Kill | None, say: Say) -> None:
    if kill:
        kill_at(kill, lambda call: say({"kill": f"recovery: {call}"}))
    ReplayStore.open(path, config()).recover()


def _read(path: Path, seed: int, say: Say) -> None:
    """Look at what the others commit, again and again, until the first problem."""
    store = ReplayStore.open(path)
    witness, problems = Witness(store, seed), list[str]()
    while not problems and not told_to_stop(wait_s=0.004):
        store.refresh()
        problems = witness.look()
    say({"reads": witness.reads, "problems": [f"{problem} (live)" for problem in problems[:10]]})
