"""How fast the last stage of the loop goes, asynchronously and not: the same parts, task, data and machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from data.types import UserError
from sim.vector import VectorEnv
from wm_rl.cluster.config import RayRuntime
from wm_rl.improve import improve
from wm_rl.journal import Journal
from wm_rl.loop import Loop

_WARM_UP = {"synchronous": 1, "asynchronous": 2}
"""First iterations, which do not count: kernels are chosen, and rows that began together drift apart."""
_FEWEST = 2
"""Iterations measured, however long they take."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to be compared."""

    variation: float = 0.0
    """Of a step's latency, as ``LatentVectorEnv`` takes it; the synchronous loop beside it has it too."""
    rows: int = 1
    """Rows, as a multiple of the synchronous loop's."""
    rows_per_thread: int = 1
    """See ``RayRuntime``, as the next."""
    updates_per_episode: float | None = None
    """See ``RayRuntime``; null is the synchronous loop's ratio, ``.inf`` lets the learner always have enough."""

    def __post_init__(self) -> None:
        """Refuse what can not be run."""
        if self.rows < 1:
            raise UserError(f"rows of an arm: expected at least 1, got {self.rows}")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What to run: ``runtime`` null is the synchronous loop."""

    loop: Callable[..., Loop]
    env: Callable[..., VectorEnv]
    """With every row and its latency."""
    runtime: RayRuntime | None
    local: RayRuntime
    """Whose Fabric the synchronous loop takes."""
    seconds: float
    """Shortest time measured."""


class _EnoughError(Exception):
    """It was measured."""


class _Watch(Journal):
    """Keeps when each iteration ended, and ends the run when there are enough of them."""

    def __init__(self, folder: Path, *, warm_up: int, seconds: float) -> None:
        super().__init__(folder, [], enabled=False)
        self._warm_up, self._seconds = warm_up, seconds
        self.began = time.monotonic()
        self.rows: list[dict[str, float]] = []
        self.loop: Loop

    def record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing is written."""
        if kind != "train":
            return
        spent = self.loop.progress["seconds"]
        self.rows.append({**metrics, **_ticks(), "at": time.monotonic(), "update_s": spent.get("update", 0.0)})
        measured = self.rows[self._warm_up - 1:]
        if len(measured) > _FEWEST and measured[-1]["at"] - measured[0]["at"] >= self._seconds:
            raise _EnoughError


def prepare(make_loop: Callable[..., Loop], make_env: Callable[..., VectorEnv], runtime: RayRuntime, run: Path) -> Path:
    """Do the stages before the last one, without latency, once; the folder that every measurement begins from."""
    whole, folder = run / "prepared", run / "prepared.partial"
    if not whole.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        loop = make_loop(folder=folder, env=make_env, fabric=runtime(), journal=Journal(folder, [], enabled=True))
        loop.run(lambda _: None)
        loop.store().close()
        folder.rename(whole)
    return whole


def measure(what: Measurement, prepared: Path, scratch: Path) -> dict[str, float]:
    """Rates of the last stage in a copy of ``prepared``, which is deleted afterwards.

    ``start_up_s`` is the time until the first iteration is done. ``trainer_utilisation`` is the share of the time that
    the learner spends on updates, reading their batches included; ``machine_busy`` that of all cores, by anybody.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(prepared, scratch)
    warm_up = _WARM_UP["asynchronous" if what.runtime else "synchronous"]
    watch = _Watch(scratch, warm_up=warm_up, seconds=what.seconds)
    try:
        loop = what.loop(folder=scratch, env=what.env, fabric=what.local(), journal=watch)
        watch.loop = loop
        loop.run(what.runtime.improve if what.runtime else improve)
    except _EnoughError:
        return _figures(watch.rows[warm_up - 1:], loop.config.updates_per_iteration,
                        asynchronous=what.runtime is not None) | {"start_up_s": watch.rows[0]["at"] - watch.began}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    raise UserError("the run ended before it was measured; type a larger loop.config.iterations")


def _figures(rows: Sequence[Mapping[str, float]], updates: int, *, asynchronous: bool) -> dict[str, float]:
    """Of the iterations after the first of ``rows``."""
    seconds = rows[-1]["at"] - rows[0]["at"]
    measured = rows[1:]
    count = updates * len(measured)
    if asynchronous:
        lengths = [later["at"] - earlier["at"] for earlier, later in pairwise(rows)]
        updating = sum(row["trainer_utilisation"] * length for row, length in zip(measured, lengths, strict=True))
    else:
        updating = rows[-1]["update_s"] - rows[0]["update_s"]
    steps = sum(row["control_steps"] for row in measured)
    own = {name: sum(row[name] for row in measured) / len(measured) for name in _ALSO if name in measured[0]}
    return {"seconds": seconds, "iterations": len(measured), "updates_per_s": count / seconds,
            "control_steps_per_s": steps / seconds, "trainer_utilisation": updating / seconds,
            "update_s": updating / count, **own,
            "machine_busy": (rows[-1]["busy"] - rows[0]["busy"]) / (rows[-1]["ticks"] - rows[0]["ticks"])}


_ALSO = ("lag", "collected_success", "inference/batch_rows", "inference/wait_p99_ms", "inference/latency_p99_ms",
         "inference/pass_p99_ms", "collector_rows", "restarts")


def _ticks() -> dict[str, float]:
    """Of this machine's cores since it was started: all, and those not idle."""
    values = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return {"ticks": sum(values), "busy": sum(values) - values[3] - values[4]}
