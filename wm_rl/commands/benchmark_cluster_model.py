"""``python main.py benchmark suite=cluster_model``: the model of a cluster, held against runs and a published scaling.

The parts are timed on this machine, then: (1) real ``runtime=ray`` runs beside what the model says of the same
settings; (2) AcceRL's published samples/s for 1 to 7 trainers beside it; (3) what it predicts for 1 to 512 devices.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data.types import UserError
from sim.figures import new_figure
from sim.vector import VectorEnv
from wm_rl.cluster.config import RayRuntime
from wm_rl.cluster_calibration import Calibration, calibrate, cores, free_cores
from wm_rl.cluster_model import ClusterModel, Prediction, predict
from wm_rl.journal import Journal
from wm_rl.loop import Loop
from wm_rl.throughput import Measurement, measure, prepare
from wm_rl.workers import one_core_each

ACCERL = (14.1, 28.8, 42.4, 60.3, 76.0, 90.8, 104.2)
"""Samples/s that arXiv 2603.18464 reports for 1 to 7 trainers."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A cluster that does not exist: what each device brings along, and links between them. All of it is assumed."""

    devices: Sequence[int]
    collectors: int
    """For each device."""
    rows: int
    inference_servers: int
    """For each device."""
    latency_ms: float
    """Of a control step."""
    link_gbit: float
    """Per second, of every node."""
    link_latency_ms: float
    seconds: float
    """Simulated."""

    def __post_init__(self) -> None:
        """Refuse what is no cluster."""
        if not self.devices or min(self.devices) < 1:
            raise UserError(f"scaling.devices: expected numbers of at least 1, got {list(self.devices)}")
        if self.seconds <= 0 or self.link_gbit <= 0:
            raise UserError("scaling.seconds and scaling.link_gbit must be positive, got "
                            f"{self.seconds} and {self.link_gbit}")

    def model(self, base: ClusterModel) -> ClusterModel:
        """One device of it, with the parts' times of ``base``."""
        return replace(base, collectors=self.collectors, rows=self.rows, servers=self.inference_servers, cores=None,
                       step_latency=self.latency_ms / 1e3, bandwidth=self.link_gbit * 1e9 / 8,
                       reduce_bandwidth=self.link_gbit * 1e9 / 8, latency=self.link_latency_ms / 1e3)


def benchmark_cluster_model(
    *, folder: str, loop: Callable[..., Loop], env: Callable[..., VectorEnv], runtime: RayRuntime,
    latencies_ms: Sequence[float], seconds: float, scaling: Scaling,
) -> int:
    """Print three tables, write ``results.json`` and ``cluster_model.png``.

    Raises:
        UserError: nothing to measure.
    """
    if seconds <= 0:
        raise UserError(f"seconds: expected more than 0, got {seconds}")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    prepared = prepare(loop, partial(env, latency_ms=0.0), runtime, run)
    with one_core_each(1) as pool:
        parts = pool.submit(_calibrate, loop, env, runtime, prepared, run).result()
    standing = loop(folder=prepared, env=env, fabric=runtime(), journal=Journal(run, [], enabled=False))
    rows = env.keywords["num_envs"] // runtime.collectors  # type: ignore[attr-defined]
    here = partial(parts.model, standing, runtime, rows=rows)
    journal.console.print(_parts(parts))
    compared = []
    for latency in latencies_ms:
        slow = partial(env, latency_ms=latency, num_envs=rows)
        what = Measurement(loop=loop, env=slow, runtime=runtime, local=runtime, seconds=seconds)
        free = [free_cores()]
        with one_core_each(1) as pool:  # a cluster of its own
            measured = pool.submit(measure, what, prepared, run / "running").result()
        free.append(free_cores())
        model = here(latency=latency / 1e3, cores=cores()).slowed(2 * cores() / sum(free))
        compared.append({"latency_ms": latency, "measured": measured, "free_cores": free,
                         "predicted": figures(predict(model, seconds=10 * seconds, warm_up=seconds))})
    published = accerl()
    model = scaling.model(here(latency=0.0, cores=None))
    scaled = [{"devices": n, **figures(predict(model.scaled(n), seconds=scaling.seconds, warm_up=scaling.seconds))}
              for n in scaling.devices]
    results = {"parts": parts.to_dict(), "compared": compared, "accerl": published, "scaled": scaled}
    (run / "results.json").write_text(json.dumps(results, indent=1))
    for table in (_compared(compared), _accerl(published), _scaled(scaled)):
        journal.console.print(table)
    draw(scaled, published, run / "cluster_model.png")
    journal.say(f"results: {run / 'results.json'}, {run / 'cluster_model.png'}")
    return 0


def _calibrate(
    loop: Callable[..., Loop], env: Callable[..., VectorEnv], runtime: RayRuntime, prepared: Path, run: Path
) -> Calibration:
    standing = loop(folder=prepared, env=env, fabric=runtime(), journal=Journal(run, [], enabled=False))
    standing.run(lambda _: None)  # reads the checkpoint
    scratch = run / "calibration.zarr"
    shutil.rmtree(scratch, ignore_errors=True)
    return calibrate(standing, partial(env, latency_ms=0.0, workers=0), runtime, scratch)


def figures(of: Prediction) -> dict[str, Any]:
    """JSON-able."""
    return {"control_steps_per_s": of.control_steps_per_s, "updates_per_s": of.updates_per_s,
            "samples_per_s": of.samples_per_s, "lag": of.lag, "trainer_utilisation": of.trainer_utilisation,
            "batch_rows": of.batch_rows, "wait_p99_ms": 1e3 * of.wait_p99, "utilisation": dict(of.utilisation),
            "bottleneck": of.bottleneck, "next_bottleneck": of.next_bottleneck}


# -- AcceRL -----------------------------------------------------------------------------------------------------------


def accerl() -> dict[str, Any]:
    """Published samples/s beside two predictions for trainers that never lack data.

    ``linear`` has one fitted number, the time of a sample on one trainer; all else is predicted. ``sharded`` adds work
    that the trainers share, as ZeRO's optimiser does, and is fitted to the first and the last figure.
    """
    n = len(ACCERL)
    one, last = 1 / ACCERL[0], n / ACCERL[-1]
    shared = (one - last) / (1 - 1 / n)
    return {"published": list(ACCERL),
            "linear": [_trainers(k, update=one, shared=0.0) for k in range(1, n + 1)],
            "sharded": [_trainers(k, update=one - shared, shared=shared) for k in range(1, n + 1)],
            "seconds_per_sample": one, "shared_seconds_per_sample": shared}


def _trainers(count: int, *, update: float, shared: float) -> float:
    model = ClusterModel(
        learners=count, servers=1, collectors=1, rows=1, cores=None, step_latency=1.0, step_compute=0.0, chunk=8,
        episode_steps=100, episode_spread=0.0, call=0.0, forward_fixed=0.1, forward_per_row=0.0, batch_size=8,
        max_age=0.3, append=0.0, update=update, update_sharded=shared, samples_per_update=1, publish_every=100,
        updates_per_episode=float("inf"), episodes_ahead=1, max_lag=float("inf"), report_every=1.0, driver_call=0.0,
        observation_bytes=0.0, episode_bytes=0.0, weights_bytes=0.0, bandwidth=float("inf"),
        reduce_bandwidth=float("inf"), latency=0.0)
    return predict(model, seconds=300.0, warm_up=10.0).samples_per_s


# -- tables and pictures ----------------------------------------------------------------------------------------------


def _parts(parts: Calibration) -> Table:
    table = Table("part", "time", title="measured on this machine")
    for name, seconds in (("forward pass, 1 row", parts.forward[0]), ("forward pass, 16 rows", parts.forward[-1]),
                          ("control step", parts.step), ("update", parts.update),
                          ("append of an episode", parts.append),
                          ("call with an observation", parts.call), ("call with an episode", parts.send)):
        table.add_row(name, f"{1e3 * seconds:.2f} ms")
    return table


_COMPARED = {"control_steps_per_s": ("control steps/s", 1), "updates_per_s": ("updates/s", 2),
             "trainer_utilisation": ("trainer utilisation", 2), "lag": ("lag, updates", 1)}


def _compared(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("latency", "free cores", *(title for title, _ in _COMPARED.values()), "bottleneck",
                  title="measured → predicted")
    for row in rows:
        free = " to ".join(f"{count:.1f}" for count in sorted(row["free_cores"]))
        table.add_row(f"{row['latency_ms']:g} ms", free, *(
            f"{row['measured'][name]:.{digits}f} → {row['predicted'][name]:.{digits}f}"
            for name, (_, digits) in _COMPARED.items()), row["predicted"]["bottleneck"])
    return table


def _accerl(published: Mapping[str, Any]) -> Table:
    table = Table("trainers", "published", "linear", "error", "sharded optimiser", "error", title="AcceRL, samples/s")
    for k, (truth, linear, sharded) in enumerate(
            zip(published["published"], published["linear"], published["sharded"], strict=True), start=1):
        table.add_row(str(k), f"{truth:.1f}", f"{linear:.1f}", f"{linear / truth - 1:+.1%}", f"{sharded:.1f}",
                      f"{sharded / truth - 1:+.1%}")
    return table


def _scaled(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("devices", "samples/s", "control steps/s", "lag, updates", "trainer utilisation", "bottleneck",
                  "next", title="predicted")
    for row in rows:
        busy = row["utilisation"]
        table.add_row(str(row["devices"]), f"{row['samples_per_s']:.0f}", f"{row['control_steps_per_s']:.0f}",
                      f"{row['lag']:.1f}", f"{row['trainer_utilisation']:.0%}",
                      *(f"{row[which]} {busy[row[which]]:.0%}" for which in ("bottleneck", "next_bottleneck")))
    return table


def draw(scaled: Sequence[Mapping[str, Any]], published: Mapping[str, Any], path: Path) -> None:
    """Throughput with the bottlenecks' names, lag, and the published scaling."""
    figure, (samples, lag, trainers) = new_figure(15, 4.2, columns=3)
    devices = [row["devices"] for row in scaled]
    rates = [row["samples_per_s"] for row in scaled]
    samples.loglog(devices, rates, "o-", base=2, label="predicted")
    samples.loglog(devices, [rates[0] * n / devices[0] for n in devices], ":", color="black", base=2, label="linear")
    named = ""
    for row in scaled:
        if row["bottleneck"] != named:
            named = row["bottleneck"]
            samples.axvline(row["devices"], color="0.7", linewidth=0.8, zorder=0)
            samples.text(1.08 * row["devices"], 0.03, named, rotation=90, color="0.4",
                         transform=samples.get_xaxis_transform())
    samples.set(xlabel="devices", ylabel="samples/s", title="throughput, and what holds it back", xticks=devices)
    samples.set_xticklabels(map(str, devices), fontsize=8)
    samples.legend()
    lag.semilogx(devices, [row["lag"] for row in scaled], "o-", base=2)
    lag.set(xlabel="devices", ylabel="updates", title="lag of arriving episodes", ylim=(0, None), xticks=devices)
    lag.set_xticklabels(map(str, devices), fontsize=8)
    counts = np.arange(1, len(published["published"]) + 1)
    for name, style in (("published", "ko"), ("linear", "C0--"), ("sharded", "C1-")):
        trainers.plot(counts, published[name], style, label=name)
    trainers.set(xlabel="trainers", ylabel="samples/s", title="AcceRL's trainers", ylim=(0, None))
    trainers.legend()
    figure.savefig(path)
