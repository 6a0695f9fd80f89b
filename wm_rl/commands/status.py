"""``python main.py status run=<folder>``: how a run fares, read from what it writes, in a terminal of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from data.types import UserError
from wm_rl.status import Status, read


def status(*, run: str, once: bool, every: float) -> int:
    """Show the run in ``run`` every ``every`` seconds until it is over, or ``once``.

    Returns 1 when the run stopped, failed, or its driver is gone or silent, else 0. Raises ``UserError`` where there is
    no run.
    """
    if not every > 0:
        raise UserError(f"every: expected seconds above 0, got {every}")
    folder, console = Path(run), Console()
    seen = read(folder)
    if once:
        console.print(view(seen))
        return _code(seen)
    with Live(view(seen), console=console, auto_refresh=False) as screen:
        try:
            while not seen.over:
                time.sleep(every)
                seen = read(folder)
                screen.update(view(seen), refresh=True)
        except KeyboardInterrupt:
            return 0
    return _code(seen)


def _code(seen: Status) -> int:
    return int(seen.state not in ("running", "ended"))


def view(seen: Status) -> RenderableType:
    """Everything as tables, the sentence that matters most first."""
    parts: list[RenderableType] = [Text(_headline(seen)), _facts(seen)]
    live = seen.facts.get("live", {})
    if live and not seen.over:
        parts += [_queues(live["queues"]), _members(live["members"])]
    return Group(*parts)


def _headline(seen: Status) -> str:
    ago, again = f"{_time(seen.age)} ago", f"go on with: python main.py train resume={seen.folder}"
    return {
        "running": f"{seen.folder}: running, last word {ago}",
        "ended": f"{seen.folder}: ended {ago}. {seen.verdict}",
        "stopped": f"{seen.folder}: stopped {ago}; {again}",
        "failed": f"{seen.folder}: failed {ago} with {seen.why}; {again}",
        "gone": f"{seen.folder}: its driver (process {seen.facts['pid']}) is gone, last word {ago}; {again}",
        "silent": f"{seen.folder}: no word for {_time(seen.age)} from its driver, process {seen.facts['pid']} on "
                  f"{seen.facts['host']}: it hangs, or that machine is gone",
    }[seen.state]


def _facts(seen: Status) -> Table:
    facts, live = seen.facts, seen.facts.get("live", {})
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    doing = facts.get("doing", {})
    underway = f", {doing['title']} {doing['done']:.0f} of {doing['total']:.0f}" if doing else ""
    table.add_row("stage", f"{facts.get('stage', '')} ({facts.get('runtime', '')}){underway}")
    table.add_row("iteration", f"{facts.get('iteration', 0)} of {facts.get('iterations', 0)}")
    left = seen.seconds_to_go()
    if left is not None:
        table.add_row("to go", f"{_time(left)}, then the evaluation")
    rates = seen.rates()
    if rates:
        table.add_row("rates", f"{rates['control_steps_per_s']:.1f} control steps/s, {rates['updates_per_s']:.2f} "
                               f"updates/s, trainer busy {rates['trainer_utilisation']:.0%}")
    for name, value in _latest(seen.rows[-1] if seen.rows else {}):
        table.add_row(name, value)
    if live:
        table.add_row("episodes", f"{live['collected']} collected, {live['quarantined']} quarantined, "
                                  f"{live['rows_allowed']} rows allowed to a collector")
    return table


def _latest(row: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What the newest iteration's row says, by subject."""
    if "collected_success" in row:
        yield "success", f"{row['collected_success']:.2f} of collected episodes" + (
            f", {row['imagined_success']:.2f} of imagined ones" if "imagined_success" in row else "")
    if "lag" in row:
        yield "lag", f"{row['lag']:.1f} updates"
    if "inference/batch_rows" in row:
        yield "inference", (f"{row['inference/batch_rows']:.1f} rows a batch; 99 % wait at most "
                            f"{row.get('inference/wait_p99_ms', 0.0):.0f} ms, are answered within "
                            f"{row.get('inference/latency_p99_ms', 0.0):.0f} ms")
    if "imagination_paused" in row:
        yield "imagination", (f"{'paused' if row['imagination_paused'] else 'on'}, error ratio "
                              f"{row.get('imagined_ratio', float('nan')):.2f}")
    if "restarts" in row:
        yield "faults", f"{row['restarts']:.0f} restarts, {row.get('lost_episodes', 0):.0f} episodes lost"


def _queues(queues: Mapping[str, float]) -> Table:
    table = Table("waiting", "now")
    for name, depth in queues.items():
        table.add_row(name, f"{depth:.0f}")
    return table


def _members(members: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("who", "up", "process", "node", "restarts", "last answer")
    for member in members:
        silent = "never" if member["silent"] is None else f"{member['silent']:.0f} s ago"
        table.add_row(member["name"], "yes" if member["up"] else "no", f"{member['pid']}", member["node"],
                      f"{member['restarts']}", silent)
    return table


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
