"""``python main.py benchmark suite=endurance``: a day of writing to the replay store; ``results.json`` and a plot."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.endurance import run_day
from data.types import UserError
from wm_rl.journal import Journal

_PANELS = {"rss_kb": "resident memory, MB", "open_files": "open files", "mappings": "mappings",
           "files": "files in the store", "bytes": "bytes in the store, MB"}


def benchmark_endurance(*, folder: str, hours: float) -> int:
    """Write that many hours' worth of steps (``data.endurance``); 1 when the budget was exceeded or a read torn.

    Raises:
        UserError: no time.
    """
    if hours <= 0:
        raise UserError(f"hours: expected more than 0, got {hours}")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    with tempfile.TemporaryDirectory(dir=run) as stores:
        results = run_day(Path(stores) / "replay.zarr", hours=hours)
    (run / "results.json").write_text(json.dumps(results, indent=1))
    _plot(run / "endurance.png", results)
    journal.say(f"{results['steps']} steps in {results['appends']} appends, {results['segments_evicted']} segments "
                f"evicted, {results['windows_read']} windows read, {results['seconds']:.0f} s")
    journal.say(f"at most {results['most_bytes']} of {results['budget_bytes']} bytes; frames 1/{results['scale']:.0f} "
                "of full size")
    for who, samples in results["samples"].items():
        for name in _PANELS:
            values = [sample[name] for sample in samples if name in sample]
            if values:
                journal.say(f"{who}: {_PANELS[name].split(',')[0]}: {_quarters(values)}")
    for problem in results["problems"]:
        journal.say(problem)
    journal.say(f"results: {run / 'results.json'}, {run / 'endurance.png'}")
    return int(bool(results["problems"]) or results["most_bytes"] > results["budget_bytes"])


def _quarters(values: list[int]) -> str:
    """Most of it in each quarter of the time."""
    ends = [len(values) * quarter // 4 for quarter in range(5)]
    most = [max(values[begin:end], default=0) for begin, end in pairwise(ends)]
    return "most in each quarter " + ", ".join(map(str, most))


def _plot(file: Path, results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure  # late: importing matplotlib takes half a second

    figure = Figure(figsize=(4 * len(_PANELS), 3.2), layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    for axis, (name, title) in zip(axes, _PANELS.items(), strict=True):
        divisor = {"rss_kb": 1e3, "bytes": 1e6}.get(name, 1)
        for who, samples in results["samples"].items():
            points = [(sample["hour"], sample[name] / divisor) for sample in samples if name in sample]
            if points:
                axis.plot(*zip(*points, strict=True), label=who)
        if name == "bytes":
            axis.axhline(results["budget_bytes"] / divisor, color="black", linestyle=":", label="budget")
        axis.set(title=title, xlabel="hours", ylim=(0, 1.1 * axis.dataLim.y1))
        axis.legend()
    figure.savefig(file, dpi=100)
