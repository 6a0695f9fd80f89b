"""The last stage of the loop with its parts side by side: nobody waits for anybody but by choice.

The driver does no work itself. It starts the actors, hands out weights and world models as they appear (by reference:
whoever made them goes on), keeps the balance of collecting and updating, counts, and writes the checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ray
from lightning.fabric import Fabric
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from rich.markup import escape

from data.types import Source, UserError
from wm_rl import interrupts
from wm_rl.cluster.collecting import Collector
from wm_rl.cluster.config import RayRuntime
from wm_rl.cluster.copying import Librarian
from wm_rl.cluster.crew import Crew, Member
from wm_rl.cluster.dreams import Dreams
from wm_rl.cluster.inference import InferenceServer
from wm_rl.cluster.learning import PolicyLearner, Updates
from wm_rl.cluster.pace import Pace
from wm_rl.cluster.start import cluster
from wm_rl.cluster.tally import Tally
from wm_rl.cluster.writer import Writer
from wm_rl.learner import Learner, LearnerConfig
from wm_rl.loop import Loop
from wm_rl.objectives import Objective
from wm_rl.policy import TinyVLA, check_compatible
from wm_rl.trust import Trust

_TICK = 0.05
"""Longest time in s between two looks at what is to be done."""
_AHEAD = 2
"""Calls for updates that a learner has at a time: it begins the next while the driver hears of the last."""
_FAREWELL = 60.0
"""Longest time in s to wait until copies of the store are deleted."""
_REPORT_EVERY = 0.5
"""Seconds between two questions to an actor how it fares."""


def improve_on_cluster(loop: Loop, runtime: RayRuntime) -> None:
    """Run the updates that are not done yet, with everything they need around them."""
    if loop.progress["iteration"] < loop.config.iterations:
        loop.store().close()  # from here on another process writes
        cpus = runtime.collectors + runtime.imaginers
        with loop.timed("improve"), interrupts.deferred(), cluster(runtime, cpus=cpus) as here:
            interrupts.listen()  # Ray takes SIGTERM
            _check_room(runtime.imaginers if loop.imagines else 0)
            _Driver(loop, runtime, here).run()
    elif "learner" in loop.saved:
        loop.trained_policy().load_state_dict(loop.saved["learner"]["policy"])
        loop.trained_policy().version = loop.saved["learner"]["version"]
    loop.trained_policy().save(loop.folder / "policy")


class _Driver:
    """One run of the stage; ``counters`` go on where the last checkpoint left them."""

    def __init__(self, loop: Loop, runtime: RayRuntime, here: Mapping[str, Any]) -> None:
        self.loop, self.runtime, self.config = loop, runtime, loop.config
        self.updates = loop.config.iterations * loop.config.updates_per_iteration
        loop.progress.pop("cut", None)  # of an iteration in one process: here the version says where it stands
        self.counters: dict[str, Any] = loop.progress.setdefault("cluster", {
            "collected": loop.progress["iteration"] * loop.config.episodes_per_iteration, "streams": 0})
        self.learned: dict[str, Any] = loop.saved.get("learner", {})
        self.version = self.ordered = int(self.learned.get("version", 0))
        weights = self.learned["policy"] if self.learned else loop.trained_policy().state_dict()
        self.published: tuple[Any, int] = ray.put(weights), self.version
        self.asked = 0.0
        self.pace = Pace.of(runtime, loop.config, rows=self._rows(), collected=self.counters["collected"],
                            version=self.version)
        self.tally = Tally()
        self.crew = Crew(patience=10 * runtime.patience, max_restarts=runtime.max_restarts,
                         say=lambda text: loop.journal.say(escape(text)))
        self.dreams = Dreams(loop, self.crew, self.tally, self.counters, self._stream)
        self._hire(dict(here))

    def run(self) -> None:
        """Until the last iteration's checkpoint is written."""
        loop, crew = self.loop, self.crew
        with loop.journal.progress("improve", self.config.iterations - loop.progress["iteration"]) as self.bar:
            while loop.progress["iteration"] < self.config.iterations:
                crew.attend(_TICK)
                if interrupts.seen():
                    self._stop()
                self._update()
                if time.monotonic() - self.asked > _REPORT_EVERY:
                    self.asked = time.monotonic()
                    self._ask_how_they_fare()
        for member in (*self.collectors, *self.dreams.imaginers):
            ray.kill(member.handle)
        self._delete_copies()
        with contextlib.suppress(RayActorError):  # it died just now: the store's next writer seals what it left
            ray.get(self.writer.handle.close.remote(), timeout=self.crew.patience)
        loop.store().refresh()

    def _delete_copies(self) -> None:
        """Of the store, on other machines. What is left by one that cannot be asked is written over by the next run."""
        if self.runtime.learner_nodes > 1:
            with contextlib.suppress(RayActorError, RayTaskError, GetTimeoutError):
                ray.get(self.learner.handle.do.remote(self.learner.who, "leave"), timeout=_FAREWELL)

    def _stop(self) -> NoReturn:
        """A signal asked for it: wait for the updates underway, and write down where everything stands."""
        crew, learner = self.crew, self.learner

        def wait() -> None:
            while learner.up and any(crew.busy(learner, method) for method in ("load", "update", "state")):
                crew.attend(_TICK)

        wait()
        if learner.up:
            crew.ask(learner, "state", then=self._keep)
            wait()
        else:
            self._keep(self.learned)
        self._delete_copies()
        raise KeyboardInterrupt

    # -- who there is -----------------------------------------------------------------------------------------------

    def _hire(self, here: dict[str, Any]) -> None:
        """Start everyone. Those who read or write the store are beside it, collectors and servers anywhere."""
        loop, runtime, hire = self.loop, self.runtime, self.crew.hire
        policy, store, storage = loop.trained_policy(), loop.store(), loop.storage
        if self.pace.rows % runtime.rows_per_thread:
            raise UserError(f"expected rows of a collector that threads of runtime.rows_per_thread="
                            f"{runtime.rows_per_thread} can share, got env.num_envs={self.pace.rows}; type "
                            f"runtime.rows_per_thread=1, or another env.num_envs")
        check_compatible(policy, spec=store.spec, statistics=store.statistics, what="replay store")
        self.replay = loop.mixture(store)
        new_policy = partial(TinyVLA, policy.config, spec=policy.spec, statistics=policy.statistics, seed=0)
        self.writer = hire("the writer", Writer, store.path, storage, loop.folder / "quarantine",
                           begin=lambda member: None, options=here)
        self.servers = [hire(f"inference server {i}", InferenceServer, new_policy, batch_size=runtime.batch_size,
                             max_age=runtime.max_age_ms / 1e3, begin=self._send_weights,
                             options={"num_cpus": 0, "scheduling_strategy": "SPREAD", "max_concurrency": 1000})
                        for i in range(runtime.inference_servers)]

        def server(i: int) -> Any:
            return self.servers[i % len(self.servers)].handle

        # Before the collectors, which may be elsewhere and would take the CPUs that imaginers need here.
        self.dreams.hire(runtime, here, server, self.writer.handle)
        parts = 1 if _together(loop.make_env) else self.pace.rows // runtime.rows_per_thread
        make_rows = partial(_rows, loop.make_env, runtime.rows_per_thread)
        self.collectors = [hire(f"collector {i}", Collector, make_rows, server(i), self.writer.handle, parts=parts,
                                seed=loop.seed, chunk=policy.chunk, limit=self.pace.limit, begin=self._play,
                                options={"num_cpus": 1, "scheduling_strategy": "SPREAD", "max_concurrency": 2})
                           for i in range(runtime.collectors)]
        self.warm_start = _Sent(TinyVLA.load(loop.folder / "warm_start"))  # kept, for those who come instead of others
        learner = partial(_new_learner, loop.learner_config, self.warm_start, loop.objective, loop.trust)
        self.learner = hire("the learner", PolicyLearner, runtime.fabric, learner, store.path, storage, self.replay,
                            seed=loop.seed, ranks=runtime.learners, patience=self.crew.patience, gpus=runtime.gpus,
                            begin=self._resume_learner, options={**here, "num_gpus": runtime.gpus},
                            **self._elsewhere(here))

    def _elsewhere(self, here: dict[str, Any]) -> dict[str, Any]:
        """What the learner needs for ranks on other machines."""
        runtime = self.runtime
        if runtime.learner_nodes == 1:
            return {}
        librarian = self.crew.hire("the librarian", Librarian, self.loop.store().path, begin=lambda member: None,
                                   options={**here, "max_concurrency": 4})
        return {"nodes": runtime.learner_nodes, "librarian": librarian.handle,
                "copies": None if runtime.copies is None else Path(runtime.copies)}

    def _rows(self) -> int:
        keywords = getattr(self.loop.make_env, "keywords", {})
        return int(keywords.get("num_envs", 1))

    def _stream(self) -> int:
        """A number that no collector or imaginer of this run had before, so that no episode's seed comes twice."""
        self.counters["streams"] += 1
        return self.counters["streams"]

    def _play(self, member: Member) -> None:
        self.crew.ask(member, "play", self._stream(), patience=float("inf"))

    def _send_weights(self, member: Member) -> None:
        self.crew.ask(member, "load", *self.published)

    def _resume_learner(self, member: Member) -> None:
        """What was learned since the last checkpoint is lost with a learner that died, and nothing else."""
        if self.learned:
            self.crew.ask(member, "load", self.learned)
        self.version = self.ordered = int(self.learned.get("version", 0))
        self.tally.clear_updates()

    # -- updates ----------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        """Keep the learner busy while there is data for it: what it does next is ordered before it is done."""
        per_iteration = self.config.updates_per_iteration
        while self.crew.calls(self.learner, "update") < _AHEAD and self.learner.up and self._has_every_source():
            count = min(self.runtime.publish_every, per_iteration - self.ordered % per_iteration,
                        self.pace.updates_allowed(self.ordered))
            if count <= 0 or self.ordered >= self.updates:
                break
            self._order(count)
            if self.ordered % per_iteration == 0:
                self.crew.ask(self.learner, "state", then=partial(self._checkpoint, self.ordered // per_iteration))

    def _order(self, count: int) -> None:
        self.ordered += count
        weights = self.crew.ask(self.learner, "update", count, returns=2,
                                then=lambda updates: self._updated(updates, weights))

    def _has_every_source(self) -> bool:
        if self.ordered == 0:
            self.loop.store().refresh()
        present = self.loop.store().episodes.source
        return all((present == source).any() for source, weight in self.replay.mix.items() if weight > 0)

    def _updated(self, updates: Updates, weights: Any) -> None:
        self.version, self.published = updates.version, (weights, updates.version)
        self.tally.updated(updates)
        for server in self.servers:
            if not self.crew.busy(server, "load"):  # else the next publication is newer
                self._send_weights(server)

    def _checkpoint(self, iteration: int, learned: dict[str, Any]) -> None:
        metrics = self.tally.row(restarts=self.crew.restarts, limit=self.pace.limit)
        self.loop.journal.record("train", iteration - 1, metrics)
        self.loop.progress["iteration"] = iteration
        self._keep(learned)
        self.bar.advance(note=f"success {metrics['collected_success']:.2f}, lag {metrics['lag']:.0f}")

    def _keep(self, learned: dict[str, Any]) -> None:
        """Write the resume point: the learner's state, and everything else as it is now."""
        loop, self.learned = self.loop, learned
        if learned:
            loop.trained_policy().load_state_dict(learned["policy"])
            loop.trained_policy().version = learned["version"]
        self.counters |= self.dreams.owed()
        loop.store().refresh()
        loop.save(learned or None)

    # -- what comes in ----------------------------------------------------------------------------------------------

    def _ask_how_they_fare(self) -> None:
        ask, busy = self.crew.ask, self.crew.busy
        if not busy(self.writer, "report"):
            ask(self.writer, "report", then=self._arrived)
        for server in self.servers:
            if not busy(server, "report"):
                ask(server, "report", then=partial(self.tally.served, server.name))
        for collector in self.collectors:
            if not busy(collector, "status"):
                ask(collector, "status", then=partial(self._fares, collector), patience=self.runtime.patience)
        self.dreams.go_on()
        self.loop.journal.live = self._live()

    def _live(self) -> dict[str, Any]:
        """For whoever looks at the run from outside (``wm_rl.status``)."""
        queues = {**self.tally.queues(), "branches to imagine": self.dreams.branches_due}
        if math.isfinite(self.pace.ratio):
            queues["updates that data pays for"] = self.pace.updates_allowed(self.version)
        return {"updates": self.version, "collected": self.counters["collected"], "rows_allowed": self.pace.limit,
                "quarantined": self.tally.quarantined, "queues": queues, "members": self.crew.roll()}

    def _fares(self, collector: Member, status: dict[str, float]) -> None:
        """Replace a simulator that hangs; tell one that plays how many rows it may."""
        if status["quiet"] > self.runtime.patience:
            self.crew.replace(collector, f"its simulator has not moved for {status['quiet']:.0f} s")
            return
        self.tally.collecting(collector.name, status)
        self.crew.ask(collector, "limit", self.pace.limit)

    def _arrived(self, news: list[Any]) -> None:
        self.tally.arrived(news, self.version)
        simulated = [arrival for arrival in news if arrival.source is Source.SIM and arrival.stored]
        self.counters["collected"] += len(simulated)
        self.pace.arrived([self.version - arrival.version for arrival in simulated], self.version)
        if news:
            self.loop.store().refresh()
        self.dreams.arrived()


def _check_room(imaginers: int) -> None:
    """Raises ``UserError`` where this machine has too few CPUs for what must be beside the store."""
    here = ray.get_runtime_context().get_node_id()
    cpus = next(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here)
    if cpus < imaginers:
        raise UserError(f"expected a CPU for each of runtime.imaginers={imaginers} on the driver's machine, got {cpus} "
                        f"there; start Ray on it with --num-cpus={imaginers} or more, or type replay.mix.imagined=0")


def _together(make_env: Any) -> bool:
    """Whether its simulator steps all rows in one world (``RemoteEnv.rows_together``)."""
    return getattr(getattr(make_env, "func", None), "rows_together", False)


def _rows(make_env: Any, count: int, part: int) -> Any:
    """Part of the environment's rows, ``count`` each, in the process that asks; or all where they belong together."""
    return make_env() if _together(make_env) else make_env(workers=0, only=range(part * count, (part + 1) * count))


class _Sent:
    """A policy for actors on any machine: its weights come through Ray's object store, not from a folder."""

    def __init__(self, policy: TinyVLA) -> None:
        self._make = partial(TinyVLA, policy.config, spec=policy.spec, statistics=policy.statistics, seed=0)
        self._weights: Any = ray.put(policy.state_dict())
        self._version = policy.version

    def __call__(self) -> TinyVLA:
        policy = self._make()
        policy.load_state_dict(ray.get(self._weights))
        policy.version = self._version
        return policy


def _new_learner(
    config: LearnerConfig, warm_start: Callable[[], TinyVLA], objective: Objective, trust: Trust, fabric: Fabric
) -> Learner:
    """As it is before the first update: at the warm start."""
    return Learner(config, fabric=fabric, policy=warm_start(), reference=warm_start(), objective=objective, trust=trust)
