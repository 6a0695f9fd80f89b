"""An inference server under load: many who ask, think and ask again, at one setting of size and age after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import ray

from data.types import Observation, Spec, UserError
from wm_rl.cluster.config import RayRuntime
from wm_rl.cluster.inference import InferenceServer, RemotePolicy
from wm_rl.cluster.start import cluster
from wm_rl.policy import TokenPolicy


@dataclass(frozen=True, kw_only=True)
class Load:
    """Who asks."""

    rows: int
    """Each asks alone, from a thread of its own, and waits for the answer."""
    thinking_ms: float
    """Between an answer and the next question: what the simulator takes for a chunk of actions."""
    seconds: float
    """At each setting, after a second to begin with."""

    def __post_init__(self) -> None:
        """Refuse a load that is none."""
        if self.rows < 1 or self.seconds <= 0 or self.thinking_ms < 0:
            raise UserError(f"expected load.rows of at least 1, load.seconds above 0 and load.thinking_ms of at least "
                            f"0, got {self.rows}, {self.seconds} and {self.thinking_ms}")


class _Server(InferenceServer):
    """One whose setting changes, so that it need not be started anew."""

    async def set(self, batch_size: int, max_age: float) -> None:
        """From now on; what was counted is forgotten."""
        self._batch_size, self._max_age = batch_size, max_age
        for kept in (self._rows, self._waits, self._latencies, self._passes):
            kept.clear()


class _Askers:
    """A process full of threads that ask."""

    def __init__(self, server: Any, spec: Spec, load: Load) -> None:
        self._server, self._spec, self._load = server, spec, load

    def ask(self, seconds: float) -> list[float]:
        """Seconds that each answer took, of all rows."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(self._load.rows) as pool:
            return [took for row in pool.map(lambda i: self._ask(i, until), range(self._load.rows)) for took in row]

    def _ask(self, row: int, until: float) -> list[float]:
        policy, looked, took = RemotePolicy(self._server, chunk=1), observation(self._spec, 1), []
        while time.monotonic() < until:
            begun = time.monotonic()
            policy.act(looked, [row])
            took.append(time.monotonic() - begun)
            time.sleep(self._load.thinking_ms / 1e3)
        return took


def observation(spec: Spec, rows: int) -> Observation:
    """Grey pictures."""
    shape = (rows, spec.image_size, spec.image_size, 3)
    return Observation(frames={camera: np.full(shape, 128, np.uint8) for camera in spec.cameras},
                       proprio=np.zeros((rows, spec.proprio_dim), np.float32), instruction=["close the drawer"] * rows,
                       slot=list(range(rows)))


def under_load(
    runtime: RayRuntime, make_policy: Callable[[], TokenPolicy], load: Load, settings: Sequence[tuple[int, float]]
) -> list[dict[str, float]]:
    """Figures of every setting (rows of a batch, age in ms), on a cluster as ``runtime`` says.

    ``bound_ms`` is what a request may wait: the age, and one forward pass for each batch that can be ahead of it.
    """
    policy = make_policy()
    with cluster(runtime, cpus=1) as here:
        serving: Any = ray.remote(_Server).options(**here, max_concurrency=1000)
        server = serving.remote(make_policy, batch_size=1, max_age=0.0)
        ray.get(server.load.remote(policy.state_dict(), 0))
        askers = ray.remote(_Askers).options(**here).remote(server, policy.spec, load)
        return [_measure(server, askers, load, *setting) for setting in settings]


def _measure(server: Any, askers: Any, load: Load, batch_size: int, age_ms: float) -> dict[str, float]:
    ray.get(askers.ask.remote(1.0))
    ray.get(server.set.remote(batch_size, age_ms / 1e3))
    took = 1e3 * np.array(ray.get(askers.ask.remote(load.seconds)))
    report = ray.get(server.report.remote())
    return {"batch_size": batch_size, "age_ms": age_ms, "answers_per_s": len(took) / load.seconds,
            "bound_ms": age_ms + ceil(load.rows / batch_size) * report["pass_p99_ms"],
            "round_trip_p50_ms": float(np.quantile(took, 0.5)), "round_trip_p99_ms": float(np.quantile(took, 0.99)),
            **{name: value for name, value in report.items() if name.endswith("_ms") or name == "batch_rows"}}


def pass_seconds(policy: TokenPolicy, rows: Sequence[int], *, repeats: int = 30) -> dict[int, float]:
    """Median time of a forward pass over that many rows, in this process."""
    found = {}
    for count in rows:
        act = partial(policy.act, observation(policy.spec, count), list(range(count)))
        act()
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            act()
            times.append(time.perf_counter() - begun)
        found[count] = float(np.median(times))
    return found
