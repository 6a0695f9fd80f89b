"""What a run spread over actors says of itself, one row per iteration of updates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from data.types import Source
from wm_rl.cluster.learning import Updates
from wm_rl.cluster.writer import Arrival
from wm_rl.improve import mean_metrics


class Tally:
    """Collects between two rows; what stays the same meanwhile keeps its last value."""

    def __init__(self) -> None:
        self._updates: list[Updates] = []
        self._arrivals: list[tuple[Arrival, float]] = []
        self._noted: dict[str, float] = {"collected_success": 0.0, "lag": 0.0}
        self._servers: dict[str, Mapping[str, float]] = {}
        self._collectors: dict[str, Mapping[str, float]] = {}
        self._since = time.monotonic()
        self.quarantined = 0

    def updated(self, updates: Updates) -> None:
        """After some updates."""
        self._updates.append(updates)

    def clear_updates(self) -> None:
        """What they made is lost."""
        self._updates = []

    def arrived(self, news: Sequence[Arrival], version: int) -> None:
        """Episodes came in while the policy was at ``version``."""
        self._arrivals += [(arrival, version - arrival.version) for arrival in news if arrival.stored]
        self.quarantined += sum(not arrival.stored for arrival in news)

    def served(self, name: str, report: Mapping[str, float]) -> None:
        """The newest word of an inference server."""
        self._servers[name] = report

    def collecting(self, name: str, status: Mapping[str, float]) -> None:
        """The newest word of a collector."""
        self._collectors[name] = status

    def note(self, metrics: Mapping[str, float]) -> None:
        """For the next rows."""
        self._noted |= metrics

    def queues(self) -> dict[str, float]:
        """How much waits where, by the newest word of everyone."""
        return {"requests for inference": sum(report.get("queue", 0.0) for report in self._servers.values()),
                "episodes being played": sum(status["playing"] for status in self._collectors.values())}

    def row(self, *, restarts: int, limit: int) -> dict[str, float]:
        """Everything since the last row."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        updates, self._updates = self._updates, []
        rows = [row for some in updates for row in some.metrics]
        simulated, imagined = ([(arrival, lag) for arrival, lag in self._arrivals if (arrival.source is Source.IMAGINED)
                                is dreamt] for dreamt in (False, True))
        self._arrivals = []
        if simulated:
            self._noted |= {"collected_success": _mean([arrival.success for arrival, _ in simulated]),
                            "lag": _mean([lag for _, lag in simulated])}
        if imagined:
            self._noted |= {"imagined_success": _mean([arrival.success for arrival, _ in imagined]),
                            "imagined_uncertainty": _mean([arrival.uncertainty for arrival, _ in imagined]),
                            "imagined_return": _mean([arrival.reward for arrival, _ in imagined])}
        steps = sum(arrival.steps for arrival, _ in simulated)
        served = {name: max(report.get(name, 0.0) for report in self._servers.values())
                  for name in ("queue", "wait_p99_ms", "latency_p99_ms", "pass_p99_ms")} if self._servers else {}
        batches = [report["batch_rows"] for report in self._servers.values() if "batch_rows" in report]
        return {**mean_metrics(rows), **self._noted, "control_steps": steps,
                "imagined_steps": sum(arrival.steps for arrival, _ in imagined),
                "control_steps_per_s": steps / seconds, "updates_per_s": len(rows) / seconds,
                "trainer_utilisation": sum(some.seconds for some in updates) / seconds, "collector_rows": limit,
                "restarts": restarts, "quarantined": self.quarantined,
                "lost_episodes": sum(status["lost"] for status in self._collectors.values()),
                "inference/batch_rows": _mean(batches) if batches else 0.0,
                **{f"inference/{name}": value for name, value in served.items()}}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
