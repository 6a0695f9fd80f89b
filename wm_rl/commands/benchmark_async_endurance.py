"""``python main.py benchmark suite=async_endurance``: minutes of ``runtime=ray``; what its processes hold meanwhile."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.types import UserError
from sim.figures import new_figure
from sim.vector import VectorEnv
from wm_rl.cluster.config import RayRuntime
from wm_rl.journal import Journal
from wm_rl.loop import Loop
from wm_rl.processes import descendants, holdings
from wm_rl.throughput import Measurement, measure, prepare
from wm_rl.workers import one_core_each

_SAMPLES = 120
_PANELS = {"private_bytes": "private memory, MB", "shared_bytes": "object store in use, MB", "open_files": "open files"}
_GROWTH = 1.05
"""Most in the last quarter over most in the second above which something grows."""


def benchmark_async_endurance(
    *, folder: str, loop: Callable[..., Loop], env: Callable[..., VectorEnv], runtime: RayRuntime, latency_ms: float,
    minutes: float,
) -> int:
    """Run asynchronously for that long; 1 when memory or open files grew.

    Raises:
        UserError: no time.
    """
    if minutes <= 0:
        raise UserError(f"minutes: expected more than 0, got {minutes}")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    prepared = prepare(loop, partial(env, latency_ms=0.0), runtime, run)
    what = Measurement(loop=loop, env=partial(env, latency_ms=latency_ms), runtime=runtime, local=runtime,
                       seconds=60 * minutes)
    with one_core_each(1) as pool:
        results = pool.submit(_watched, what, prepared, run / "running").result()
    totals = {name: _quarters([sum(each[name] for each in sample["held"].values()) for sample in results["samples"]])
              for name in _PANELS if name != "shared_bytes"}
    totals["shared_bytes"] = _quarters([sample["object_store_bytes"] for sample in results["samples"]])
    results["most_in_each_quarter"] = totals
    grew = [name for name, quarters in totals.items() if quarters[3] > _GROWTH * max(quarters[1], 1)]
    (run / "results.json").write_text(json.dumps(results, indent=1))
    _draw(results["samples"], run / "async_endurance.png")
    figures = results["figures"]
    journal.say(f"{figures['seconds'] / 60:.0f} minutes, {figures['control_steps_per_s']:.0f} control steps/s, "
                f"{figures['updates_per_s']:.2f} updates/s, restarts {figures['restarts']:.0f}")
    for name, quarters in totals.items():
        journal.say(f"{_PANELS[name].split(',')[0]}: most in each quarter " + ", ".join(map(str, quarters)))
    journal.say("grew: " + ", ".join(grew) if grew else "nothing grew")
    journal.say(f"results: {run / 'results.json'}, {run / 'async_endurance.png'}")
    return int(bool(grew))


def _watched(what: Measurement, prepared: Path, scratch: Path) -> dict[str, Any]:
    """The measurement, and samples of what this process and all that it started hold."""
    samples: list[dict[str, Any]] = []
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(samples, done, what.seconds / _SAMPLES))
    watcher.start()
    try:
        figures = measure(what, prepared, scratch)
    finally:
        done.set()
        watcher.join()
    return {"figures": figures, "samples": samples}


def _watch(samples: list[dict[str, Any]], done: threading.Event, every: float) -> None:
    import ray
    from ray._private import internal_api

    begun = time.monotonic()
    while not done.wait(every):
        if not ray.is_initialized():
            continue
        held: dict[str, dict[str, int]] = {}
        for pid, name in descendants(os.getpid()).items():
            own = holdings(pid)
            if own is not None:
                held[f"{'driver' if pid == os.getpid() else name} {pid}"] = dict(own)
        state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
        stored = internal_api.get_memory_info_reply(state).store_stats.object_store_bytes_used
        samples.append({"minute": (time.monotonic() - begun) / 60, "held": held, "object_store_bytes": stored})


def _quarters(values: Sequence[int]) -> list[int]:
    ends = [len(values) * quarter // 4 for quarter in range(5)]
    return [max(values[begin:end], default=0) for begin, end in pairwise(ends)]


def _draw(samples: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, axes = new_figure(4 * len(_PANELS), 3.4, len(_PANELS))
    minutes = [sample["minute"] for sample in samples]
    for axis, (name, title) in zip(axes, _PANELS.items(), strict=True):
        scale = 1e6 if name.endswith("bytes") else 1
        if name == "shared_bytes":
            axis.plot(minutes, [sample["object_store_bytes"] / scale for sample in samples])
        else:
            for who in dict.fromkeys(who for sample in samples for who in sample["held"]):
                points = [(sample["minute"], sample["held"][who][name] / scale)
                          for sample in samples if who in sample["held"]]
                if len(points) > 1:
                    axis.plot(*zip(*points, strict=True), label=who.rsplit(" ", 1)[0], linewidth=1)
        axis.set(title=title, xlabel="minutes", ylim=(0, 1.1 * axis.dataLim.y1))
    axes[0].legend(fontsize=6, frameon=False, ncols=2)
    figure.savefig(path)
