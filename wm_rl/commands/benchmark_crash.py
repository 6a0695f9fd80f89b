"""``python main.py benchmark suite=crash``: kill -9 against the replay store, counted; ``results.json``."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from rich.table import Table

from data.crash import Tally, run_trials
from data.crash_faults import FAULTS
from data.types import UserError
from wm_rl.journal import Journal

_SHOWN = 20
"""Problems that the results quote."""


def benchmark_crash(*, folder: str, trials: int, seed: int, faults: bool) -> int:
    """Run the trials (``data.crash``), with ``faults`` also a tenth as many (at least five) for each planted bug.

    Returns 1 when anything was lost, torn or otherwise wrong, or a planted bug was not caught.

    Raises:
        UserError: no trials.
    """
    if trials < 1:
        raise UserError(f"trials: expected at least 1, got {trials}")
    run, started = Path(folder), time.monotonic()
    journal = Journal(run, [], enabled=True)

    def say(tally: Tally) -> None:
        if tally.trials * 10 % trials < 10:  # no live display: its thread would be forked
            journal.say(f"{tally.trials} of {trials} trials: {tally.acknowledged} acknowledged, {tally.lost} lost, "
                        f"{tally.torn} torn")

    with tempfile.TemporaryDirectory(dir=run) as stores:
        total = run_trials(Path(stores), trials=trials, seed=seed, fault=None, done=say)
    results = {
        "trials": trials, "seed": seed, "kills": sum(total.kills.values()), "acknowledged": total.acknowledged,
        "evicted": total.evicted, "live_reads": total.live_reads, "lost": total.lost, "torn": total.torn,
        "errors": total.errors, "problems": total.problems[:_SHOWN], "kills_by_call": dict(sorted(total.kills.items())),
        "seconds": time.monotonic() - started}
    caught: dict[str, dict[str, int]] = {}
    for name in FAULTS if faults else ():
        with tempfile.TemporaryDirectory(dir=run) as stores:
            planted = run_trials(Path(stores), trials=max(5, trials // 10), seed=seed, fault=name, done=lambda _: None)
        caught[name] = {"trials": planted.trials, "caught": planted.caught}
        journal.say(f"planted: {name}: caught in {planted.caught} of {planted.trials} trials")
    (run / "results.json").write_text(json.dumps(results | {"faults": caught}, indent=2))

    table = Table("trials", "kills", "acknowledged", "evicted", "lost", "torn", "errors", "live reads", title="crash")
    table.add_row(*(str(results[name]) for name in ("trials", "kills", "acknowledged", "evicted", "lost", "torn",
                                                    "errors", "live_reads")))
    journal.console.print(table)
    for problem in total.problems[:_SHOWN]:
        journal.say(problem)
    journal.say(f"results: {run / 'results.json'}")
    missed = any(planted["caught"] == 0 for planted in caught.values())
    return int(bool(total.problems) or missed)
