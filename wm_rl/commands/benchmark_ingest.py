"""``python main.py benchmark suite=ingest``: robot logs into a store beside decoding them, and memory as they grow.

Time is a ratio: ingesting and decoding alone take turns, each with two processes; the median over rounds counts. Other
work on the machine disturbs the wall clock's more than that of CPU time.
Memory is the sum of the proportional set sizes (PSS) of every process of the command, ten times a second.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data.store import ReplayStore
from data.types import UserError
from wm_rl.journal import Journal
from wm_rl.made_logs import RATE, make_bags, make_lerobot

ROOT = Path(__file__).parents[2]
PROCESSES = 2
RATIO_BAR, MEMORY_BAR = 0.8, 1024.0
"""What is aimed at: decoding alone takes at least this share of ingestion's time; MB at most."""
_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Made:
    """A log, and how to ingest it."""

    name: str
    source: Path
    settings: tuple[str, ...]
    files: Sequence[Path]
    """With pictures."""
    pictures: int


def benchmark_ingest(*, folder: str, episodes: int, seconds: float, rounds: int, longer: int) -> int:
    """Make the logs in ``folder``, measure, print a table, write ``results.json``.

    Raises ``UserError`` for settings that measure nothing.
    """
    if episodes < 2 or rounds < 1 or longer < 2 or seconds * RATE < 4:
        raise UserError(f"suite=ingest needs 2 episodes of 4 rows, a round and longer=2, got episodes={episodes}, "
                        f"seconds={seconds:g}, rounds={rounds}, longer={longer}")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    sizes = {"": (episodes, seconds), f", {longer} times as many episodes": (episodes * longer, seconds),
             f", one episode {longer} times as long": (1, seconds * longer)}
    results: dict[str, Any] = {"episodes": episodes, "seconds": seconds, "processes": PROCESSES, "logs": {}}
    with journal.progress("measurements", 2 * (rounds + len(sizes) - 1)) as bar:
        for kind in ("rosbag2 MCAP, JPEG", "LeRobot v2.1, H.264"):
            for suffix, size in sizes.items():
                made = _make(run / "logs", kind, *size)
                measured = []
                for number in range(rounds if not suffix else 1):
                    alone = _alone(made) if number % 2 else {}
                    taken = _ingest(made, run / "store.zarr")
                    measured.append({**taken, **(alone or _alone(made))})
                    bar.advance()
                results["logs"][kind + suffix] = _summary(made, measured)
    (run / "results.json").write_text(json.dumps(results, indent=2))
    table = Table("640 x 480 pictures, 15 Hz", "episodes", "pictures", "seconds", "decoding alone / ingestion: wall",
                  "CPU", "CPU, half-size JPEG", "peak memory, MB")
    for name, row in results["logs"].items():
        table.add_row(name, str(row["episodes"]), str(row["pictures"]), f"{row['ingestion_s']:.1f}",
                      *(f"{row[ratio]:.2f}" if ratio in row else ""
                        for ratio in ("ratio", "cpu_ratio", "reduced_cpu_ratio")),
                      f"{row['peak_mb']:.0f}")
    journal.console.print(table)
    journal.say(f"meant to be at least {RATIO_BAR:g}, and at most {MEMORY_BAR:g} MB whatever the length; medians over "
                f"{rounds} rounds, {PROCESSES} processes; results: {run / 'results.json'}")
    return 0


def _make(folder: Path, kind: str, episodes: int, seconds: float) -> Made:
    pictures = episodes * round(seconds * RATE)
    place = folder / f"{kind.split()[0]}_{episodes}_{seconds:g}"
    if kind.startswith("LeRobot"):
        files = make_lerobot(place, episodes, seconds)
        return Made(name=kind, source=place / "set", settings=(), files=files, pictures=pictures)
    files = make_bags(place, episodes, seconds)
    return Made(name=kind, source=place / "bags", settings=(f"mapping={place / 'mapping.yaml'}",), files=files,
                pictures=pictures)


def _ingest(made: Made, store: Path) -> dict[str, float]:
    """Seconds, of CPU too, and most memory in MB of one ``python main.py ingest`` into a fresh store; what is in it."""
    shutil.rmtree(store, ignore_errors=True)
    command = [sys.executable, str(ROOT / "main.py"), "ingest", f"source={made.source}", f"store={store}",
               f"workers={PROCESSES}", f"hydra.run.dir={store.parent / 'ingest'}", *made.settings]
    seconds, of_cpu, peak, _ = _watch([command])
    with ReplayStore.open(store) as replay:
        steps = sum(len(replay.trajectory(index)) for index in range(len(replay)))
        found = {"ingestion_s": seconds, "ingestion_cpu_s": of_cpu, "peak_mb": peak, "episodes": len(replay),
                 "steps": steps}
    if steps + len(made.files) != made.pictures:
        raise AssertionError(f"{made.source}: {steps} steps of {made.pictures} pictures")
    shutil.rmtree(store)
    return found


def _alone(made: Made) -> dict[str, float]:
    """What decoding takes, and of JPEG also at reduced size, as ingestion does."""
    found = _decode(made)
    if made.files[0].suffix == ".mcap":
        found |= {f"reduced_{name}": value for name, value in _decode(made, "--reduced").items()}
    return found


def _decode(made: Made, *options: str) -> dict[str, float]:
    """Seconds, of CPU too, that the same number of processes need to decode the pictures and nothing else."""
    commands = [[sys.executable, "-m", "wm_rl.plain_decoding", *options, *map(str, files)]
                for files in (made.files[i::PROCESSES] for i in range(PROCESSES)) if files]
    seconds, of_cpu, _, said = _watch(commands)
    if sum(map(int, said)) != made.pictures:
        raise AssertionError(f"{made.source}: {said} of {made.pictures} pictures were decoded")
    return {"decoding_s": seconds, "decoding_cpu_s": of_cpu}


def _watch(commands: Sequence[Sequence[str]]) -> tuple[float, float, float, list[str]]:
    """Run the commands beside each other.

    Seconds until all have ended, of CPU in all their processes, most memory in MB, and what they printed.
    """
    begun, cpu, peak = time.perf_counter(), _children_s(), 0.0
    children = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True)
                for command in commands]
    while any(child.poll() is None for child in children):
        peak = max(peak, sum(_memory_mb(child.pid) for child in children))
        time.sleep(_EVERY_S)
    seconds = time.perf_counter() - begun
    said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise UserError(f"{' '.join(commands[0])} failed: {said[0][-500:]}")
    return seconds, _children_s() - cpu, peak, said


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory_mb(session: int) -> float:
    """Proportional set size of every process of a session."""
    kilobytes = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.getsid(int(process.name)) == session:
                line = next(line for line in (process / "smaps_rollup").read_text().splitlines()
                            if line.startswith("Pss:"))
                kilobytes += int(line.split()[1])
        except (OSError, StopIteration):  # it has ended
            continue
    return kilobytes / 1024


def _summary(made: Made, measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    found = {name: float(np.median([each[name] for each in measured])) for name in measured[0]}
    found["peak_mb"] = max(each["peak_mb"] for each in measured)
    for kind in ("", "reduced_"):
        for name, clock in (("ratio", "s"), ("cpu_ratio", "cpu_s")):
            if f"{kind}decoding_{clock}" in found:
                found[kind + name] = float(np.median([each[f"{kind}decoding_{clock}"] / each[f"ingestion_{clock}"]
                                                      for each in measured]))
    return {**found, "episodes": int(found["episodes"]), "steps": int(found["steps"]), "pictures": made.pictures,
            "rounds": measured}
