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
_PANELS = {"private_bytes": "private memory, MB", "object_store_bytes": "object store in use, MB",
           "open_files": "open files"}
_GROWTH = {"private_bytes": (1.05, 5e6), "object_store_bytes": (1.05, 5e6), "open_files": (1.0, 0)}
"""Something grows where most in the last quarter is more than this multiple of, and this much above, most in the second
quarter; of each process."""


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
    samples = results["samples"]
    totals = {name: _quarters([_total(sample, name) for sample in samples]) for name in _PANELS}
    results["most_in_each_quarter"] = totals
    results["grew"] = grew = _grew(samples)
    (run / "results.json").write_text(json.dumps(results, indent=1))
    _draw(samples, run / "async_endurance.png")
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


def _total(sample: Mapping[str, Any], name: str) -> int:
    """Of all processes; the object store is one thing."""
    return sample[name] if name in sample else sum(own[name] for own in sample["held"].values())


def _grew(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who held more in the last quarter of the time than in the second."""
    series: dict[tuple[str, str], list[int]] = {}
    for name in _PANELS:
        for i, sample in enumerate(samples):
            values = {"": sample[name]} if name in sample else {who: own[name] for who, own in sample["held"].items()}
            for who, value in values.items():
                series.setdefault((who, name), [0] * len(samples))[i] = value
    quarters = {key: _quarters(values) for key, values in series.items()}
    return [f"{_PANELS[name].split(',')[0]} {who}".strip() for (who, name), most in quarters.items()
            if most[1] and most[3] > max(_GROWTH[name][0] * most[1], _GROWTH[name][1] + most[1])]


def _quarters(values: Sequence[int]) -> list[int]:
    """Most of it in each quarter of the time."""
    ends = [len(values) * quarter // 4 for quarter in range(5)]
    return [max(values[begin:end], default=0) for begin, end in pairwise(ends)]


def _draw(samples: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, axes = new_figure(4 * len(_PANELS), 3.4, len(_PANELS))
    minutes = [sample["minute"] for sample in samples]
    for axis, (name, title) in zip(axes, _PANELS.items(), strict=True):
        scale = 1e6 if name.endswith("bytes") else 1
        if name == "object_store_bytes":
            axis.plot(minutes, [sample[name] / scale for sample in samples])
        else:
            for who in dict.fromkeys(who for sample in samples for who in sample["held"]):
                points = [(sample["minute"], sample["held"][who][name] / scale)
                          for sample in samples if who in sample["held"]]
                if len(points) > 1:
                    axis.plot(*zip(*points, strict=True), label=who.rsplit(" ", 1)[0], linewidth=1)
        axis.set(title=title, xlabel="minutes", ylim=(0, 1.1 * axis.dataLim.y1))
    axes[0].legend(fontsize=6, frameon=False, ncols=2)
    figure.savefig(path)
