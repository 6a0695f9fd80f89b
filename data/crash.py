"""A crash test: writers die of SIGKILL while a reader reads and a budget evicts; nothing acknowledged may be lost.

A trial is a store of its own and three rounds. In a round one to three processes append and say so through a pipe once
``append`` has returned; they are killed at a random moment, or each at a chosen write call of its own
(``data.crash_kill``). Then a process recovers the store, which may be killed as well. One reader lives through all
rounds and compares what it sees with what the episodes must be (``data.crash_content``).
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.crash_check import check
from data.crash_content import SPEC, STATISTICS, Witness, config, episode
from data.crash_faults import FAULTS
from data.crash_kill import BEFORE, HALF, SPOILT, Kill, kill_at
from data.store import ReplayStore
from data.types import Source

ROUNDS, APPENDS = 3, 40
_CALLS, _RECORDS, _RECOVERY = 500, 12, 120
"""Write calls of a writer, records among them, and write calls of a recovery within which the fatal one is chosen."""

Say = Callable[[dict[str, Any]], None]


@dataclass
class Tally:
    """What trials came to; the sum of two is that of all their trials."""

    trials: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """By the call that was fatal."""
    acknowledged: int = 0
    evicted: int = 0
    """Of the acknowledged ones, those that the budget removed."""
    lost: int = 0
    torn: int = 0
    errors: int = 0
    live_reads: int = 0
    caught: int = 0
    """Trials in which anything was wrong."""
    problems: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another's trials too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def run_trial(folder: Path, *, trial: int, seed: int, fault: str | None = None) -> Tally:
    """One trial in a new store below ``folder``, which stays there when something was wrong."""
    rng = np.random.default_rng([seed, trial])
    path = folder / f"{trial:05d}"
    ReplayStore.create(path, spec=SPEC, statistics=STATISTICS, embodiment="crash")
    tally, said = Tally(trials=1), []
    reader = _Child(lambda say: _read(path, trial, say, reader_stop), fault)
    for life in range(ROUNDS):
        said += _round(path, rng, 10 * life, fault, sync=trial % 10 == 9)
        recovery = None
        if rng.random() < 0.5:
            recovery = Kill(call=1 + int(rng.integers(_RECOVERY)), how=str(rng.choice([BEFORE, HALF, SPOILT])),
                            journal=False, bit=int(rng.integers(2**20)))
        said += _Child(lambda say, kill=recovery: _recover(path, kill, say), fault).wait()
    said += reader.stop()
    acknowledged = [tuple(message["ack"]) for message in said if "ack" in message]
    said += _Child(lambda say: _recover(path, None, say), fault).wait()
    said += _Child(lambda say: say(check(path, acknowledged)), None).wait()
    for message in said:
        if "kill" in message:
            tally.kills[message["kill"]] += 1
        tally.live_reads += message.get("reads", 0)
        tally.evicted += message.get("evicted", 0)
        tally.problems += [f"trial {trial}: {problem}" for problem in message.get("problems", [])]
    tally.acknowledged = sum(count for *_, count, _ in acknowledged)
    for kind in ("lost", "torn", "error"):
        pass
    return tally
