"""A discrete-event model of ``runtime=ray``: how fast a cluster would be, how stale its data, what holds it back.

Every row of a simulator, inference server, link, writer, learner and the driver is a process of SimPy; they follow the
rules of ``wm_rl.cluster``, whose ``Pace`` decides here too. Nothing is computed: work only takes time. Imagination and
faults are left out. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simpy

from data.types import UserError
from wm_rl.cluster.pace import Pace
from wm_rl.cluster_stations import Processor, Server, SharingProcessor, Station

UNDERWAY = 2
"""Episodes on their way to the writer above which a row waits, as in ``wm_rl.cluster.collecting``."""
REPORT_EVERY = 0.5
"""Seconds between two questions of the driver, as in ``wm_rl.cluster.driver``."""

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, kw_only=True)
class ClusterModel:
    """A cluster and what it does."""

    learners: int
    """Ranks, which take every update together."""
    servers: int
    collectors: int
    rows: int
    """Of one collector, each at its own pace."""
    cores: int | None
    """Processors that everybody shares; None: each actor has one of its own."""
    step_latency: float
    """Of a control step, on top of ``step_compute``: spent elsewhere, by no processor of ours."""
    step_compute: float
    chunk: int
    """Control steps per decision."""
    episode_steps: float
    episode_spread: float
    """Lengths of episodes are uniform in ``episode_steps × (1 ± episode_spread)``."""
    call: float
    """Computing that a call for inference costs the collector, apart from the forward pass."""
    forward_fixed: float
    forward_per_row: float
    batch_size: int
    """Rows; batches are padded to a power of two, as ``wm_rl.cluster.inference`` does."""
    max_age: float
    append: float
    """Time that the writer takes for an episode."""
    update: float
    """Time of an update on one rank, whatever their number."""
    update_sharded: float
    """Further work of an update, which the ranks share: a sharded optimiser's."""
    samples_per_update: float
    """Decisions in one rank's share of a batch."""
    publish_every: int
    updates_per_episode: float
    episodes_ahead: int
    """Episodes that collectors may be ahead of the learner."""
    max_lag: float
    report_every: float
    driver_call: float
    """Time that the driver takes to ask one actor how it fares, and to deal with the answer."""
    observation_bytes: float
    episode_bytes: float
    weights_bytes: float
    """Also of the gradients that the ranks reduce."""
    bandwidth: float
    """Of a server's link, and of the one to the node of writer, driver and first learner; bytes/s, may be infinite."""
    reduce_bandwidth: float
    """Between learners."""
    latency: float
    """Of any link."""

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        for name in ("learners", "servers", "collectors", "rows", "chunk", "batch_size", "publish_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of a modelled cluster must be at least 1, got {getattr(self, name)}")
        for name in ("update", "report_every", "bandwidth", "reduce_bandwidth", "updates_per_episode"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} of a modelled cluster must be positive, got {getattr(self, name)}")
        if not (self.episode_steps >= 1 and 0 <= self.episode_spread < 1):
            raise UserError("expected episode_steps of at least 1 and episode_spread in [0, 1), got "
                            f"{self.episode_steps} and {self.episode_spread}")

    def reduce(self) -> float:
        """Time of an all-reduce over a ring: every link carries 2 (n − 1)/n of the gradients in 2 (n − 1) messages."""
        n = self.learners
        return 2 * (n - 1) / n * self.weights_bytes / self.reduce_bandwidth + 2 * (n - 1) * self.latency

    def slowed(self, factor: float) -> ClusterModel:
        """All computing takes that many times as long, as where other work has its share of the processors."""
        return replace(self, **{name: factor * getattr(self, name) for name in (
            "step_compute", "call", "forward_fixed", "forward_per_row", "append", "update", "update_sharded",
            "driver_call")})

    def scaled(self, devices: int) -> ClusterModel:
        """That many times everything; every rank has its share of data, so an episode pays for fewer global updates."""
        return replace(self, learners=devices * self.learners, servers=devices * self.servers,
                       collectors=devices * self.collectors, episodes_ahead=devices * self.episodes_ahead,
                       updates_per_episode=self.updates_per_episode / devices)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What happened between the warm-up and the end."""

    control_steps_per_s: float
    episodes_per_s: float
    updates_per_s: float
    samples_per_s: float
    """Decisions that the learners were trained on, those seen again counted again."""
    lag: float
    """Mean over arrived episodes, in updates; NaN where none arrived."""
    trainer_utilisation: float
    utilisation: Mapping[str, float]
    """Share of the time in which a resource works, by its name; a mean where there are several of a kind.

    ``collectors`` are their processors, ``simulators`` the share of a row's time that its simulator takes.
    """
    batch_rows: float
    wait_p99: float
    """99 % of the requests for inference waited at most this long for their forward pass to begin."""
    stations: Mapping[str, Station]

    @property
    def bottleneck(self) -> str:
        """The busiest resource. Who waits for a shared core counts as busy, so the cores come first where both are."""
        return self._busiest()[0]

    @property
    def next_bottleneck(self) -> str:
        """The busiest but one."""
        return self._busiest()[1]

    def _busiest(self) -> list[str]:
        return sorted(self.utilisation, key=lambda name: (-round(self.utilisation[name], 2), name != "cores"))


def predict(model: ClusterModel, *, seconds: float, warm_up: float, seed: int = 0) -> Prediction:
    """Let ``model`` run for ``warm_up`` simulated seconds, then for ``seconds`` that count."""
    cluster = _Cluster(model, seed)
    cluster.env.run(until=warm_up)
    cluster.forget()
    cluster.env.run(until=warm_up + seconds)
    return cluster.prediction(seconds)


class _Cluster:
    def __init__(self, model: ClusterModel, seed: int) -> None:
        self.model, self.env, self.draw = model, simpy.Environment(), np.random.default_rng(seed)
        cores = None if model.cores is None else simpy.Resource(self.env, model.cores)
        self.machine = Station(self.env)  # its cores, where they are shared

        def processor() -> Processor | SharingProcessor:
            return Processor(self.env) if cores is None else SharingProcessor(self.env, cores, self.machine)

        self.servers = [Server(self.env, processor(), batch_size=model.batch_size, max_age=model.max_age,
                               fixed=model.forward_fixed, per_row=model.forward_per_row)
                        for _ in range(model.servers)]
        self.server_links = [Processor(self.env) for _ in range(model.servers)]
        self.link, self.reducing = Processor(self.env), Processor(self.env)
        self.updating, self.sleeping = Station(self.env), Station(self.env)
        self.writer, self.driver = processor(), processor()
        self.ranks = [processor() for _ in range(model.learners if cores else 1)]
        self.pace = Pace(ratio=model.updates_per_episode, max_lag=model.max_lag, rows=model.rows,
                         slack=model.episodes_ahead, collected=0, version=0, allowed_rows=model.rows)
        self.version = 0
        self.news: list[float] = []
        self.told, self.raised = self.env.event(), self.env.event()
        self.sending: set[int] = set()
        self.limit = model.rows
        self.steps, self.updates, self.lags = 0, 0, list[float]()
        self.env.process(self._drive())
        self.env.process(self._learn())
        self.players = [processor() for _ in range(model.collectors)]
        for i, own in enumerate(self.players):
            for row in range(model.rows):
                self.env.process(self._play(i, row, own))

    def forget(self) -> None:
        """Count from now on."""
        self.steps, self.updates, self.lags = 0, 0, list[float]()
        for station in self._stations().values():
            station.forget()
        for server in self.servers:
            server.forget()

    def _stations(self) -> dict[str, Station]:
        return {"cores": self.machine, "writer": self.writer.station, "driver": self.driver.station,
                "link to the writer": self.link.station, "all-reduce": self.reducing.station,
                "updates": self.updating, "sleeping": self.sleeping,
                **{f"server {i}": server.station for i, server in enumerate(self.servers)},
                **{f"link of server {i}": link.station for i, link in enumerate(self.server_links)},
                **{f"collector {i}": own.station for i, own in enumerate(self.players)}}

    # -- who does what ----------------------------------------------------------------------------------------------

    def _play(self, collector: int, row: int, own: Processor | SharingProcessor) -> Process:
        """One row: episodes for ever. The first is begun somewhere in its middle."""
        model, i = self.model, collector % self.model.servers
        underway: list[simpy.Process] = []
        share = self.draw.uniform()
        while True:
            while row >= self.limit:
                yield self.raised
            spread = model.episode_steps * model.episode_spread
            left = max(1, round(share * self.draw.uniform(model.episode_steps - spread, model.episode_steps + spread)))
            share, versions = 1.0, list[int]()
            while left > 0:
                yield from own.work(model.call)
                yield from self._carry(self.server_links[i], model.observation_bytes)
                versions.append((yield self.servers[i].ask()))
                steps = min(model.chunk, left)
                yield self.env.timeout(model.latency)
                number = self.sleeping.enter()
                yield self.env.timeout(steps * model.step_latency)
                self.sleeping.leave(number)
                yield from own.work(steps * model.step_compute)
                self.steps += steps
                left -= steps
            underway = [sent for sent in underway if sent.is_alive]
            underway.append(self.env.process(self._send(sum(versions) / len(versions))))
            if len(underway) > UNDERWAY:
                yield underway[0]

    def _send(self, version: float) -> Process:
        yield from self._carry(self.link, self.model.episode_bytes)
        yield from self.writer.work(self.model.append)
        self.news.append(version)

    def _carry(self, link: Processor, size: float) -> Process:
        yield from link.work(size / self.model.bandwidth)
        if self.model.latency:
            yield self.env.timeout(self.model.latency)

    def _learn(self) -> Process:
        model = self.model
        work = model.update + model.update_sharded / model.learners
        while True:
            count = min(model.publish_every, self.pace.updates_allowed(self.version))
            if count <= 0:
                yield self.told
                continue
            for _ in range(count):
                number = self.updating.enter()
                yield self.env.all_of([self.env.process(rank.work(work)) for rank in self.ranks])
                yield from self.reducing.work(model.reduce())
                self.updating.leave(number)
                self.updates += 1
                self.version += 1
            for i in set(range(model.servers)) - self.sending:
                self.sending.add(i)
                self.env.process(self._publish(i, self.version))

    def _publish(self, i: int, version: int) -> Process:
        yield from self._carry(self.link, self.model.weights_bytes)
        self.servers[i].version = version
        self.sending.discard(i)

    def _drive(self) -> Process:
        """Hear of arrivals and tell collectors their limits, every so often or as fast as asking everybody goes."""
        actors = self.model.collectors + self.model.servers + 1
        while True:
            begun = self.env.now
            yield from self.driver.work(actors * self.model.driver_call)
            yield self.env.timeout(max(0.0, begun + self.model.report_every - self.env.now))
            news, self.news = self.news, []
            lags = [self.version - version for version in news]
            self.lags += lags
            self.pace.arrived(lags, self.version)
            before, self.limit = self.limit, self.pace.limit
            self.told.succeed()
            self.told = self.env.event()
            if self.limit > before:
                self.raised.succeed()
                self.raised = self.env.event()

    # -- what came of it --------------------------------------------------------------------------------------------

    def prediction(self, seconds: float) -> Prediction:
        model, stations = self.model, self._stations()
        busy = {name: station.busy() / seconds for name, station in stations.items()}
        several = {"collectors": "collector ", "inference": "server ", "links of servers": "link of server "}
        utilisation = {kind: float(np.mean([value for name, value in busy.items() if name.startswith(prefix)]))
                       for kind, prefix in several.items()}
        training = self.updating.number()
        utilisation |= {name: busy[name] for name in ("link to the writer", "writer", "driver", "all-reduce")}
        utilisation["updates"] = training - busy["all-reduce"]
        utilisation["simulators"] = (self.sleeping.number() / model.collectors + utilisation["collectors"]) / model.rows
        if model.cores is not None:
            utilisation["cores"] = busy["cores"] / model.cores
        waits = [wait for server in self.servers for wait in server.waits]
        batches = [rows for server in self.servers for rows in server.batches]
        return Prediction(
            control_steps_per_s=self.steps / seconds, episodes_per_s=len(self.lags) / seconds,
            updates_per_s=self.updates / seconds,
            samples_per_s=self.updates * model.learners * model.samples_per_update / seconds,
            lag=float(np.mean(self.lags)) if self.lags else math.nan, trainer_utilisation=training,
            utilisation=utilisation, batch_rows=float(np.mean(batches)) if batches else 0.0,
            wait_p99=float(np.quantile(waits, 0.99)) if waits else 0.0, stations=stations)
