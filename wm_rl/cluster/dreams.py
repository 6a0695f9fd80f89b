"""The driver's half of imagination: when the world model is audited, refitted and played in, and by whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import ray

from wm_rl.cluster.config import RayRuntime
from wm_rl.cluster.crew import Crew, Member
from wm_rl.cluster.imagining import Imaginer, ModelLearner
from wm_rl.cluster.tally import Tally
from wm_rl.loop import Loop
from world_model.audit import Drift
from world_model.learner import WorldModelLearner


class Dreams:
    """Hands the world model's learner and the imaginers their work. Does nothing in a loop without imagination."""

    def __init__(
        self, loop: Loop, crew: Crew, tally: Tally, counters: Mapping[str, Any], stream: Callable[[], int]
    ) -> None:
        """``counters`` are those of the run (``owed`` is what they keep of this), ``stream`` gives a new number."""
        self._loop, self._crew, self._tally, self._counters, self._stream = loop, crew, tally, counters, stream
        self._rounds = counters["collected"] // loop.config.episodes_per_iteration
        self.branches_due: int = counters.get("branches_due", 0)
        self._model_due: list[str] = list(counters.get("model_due", []))
        self._underway: dict[str, int] = {}
        self.imaginers: list[Member] = []

    def hire(self, runtime: RayRuntime, here: dict[str, Any], server: Callable[[int], Any], writer: Any) -> None:
        """Start everyone; imaginer ``i`` asks ``server(i)`` what to do."""
        loop, hire = self._loop, self._crew.hire
        if not loop.imagines:
            return
        store = loop.store()
        self._state = ray.put(loop.model().state_dict())
        model = partial(WorldModelLearner, loop.world_model_config, spec=store.spec, statistics=store.statistics,
                        seed=loop.seed)
        self.modeller = hire("the world model's learner", ModelLearner, model, loop.imagination_config, store.path,
                              loop.storage, begin=self._send_model, options=here)
        self.imaginers = [hire(f"imaginer {i}", Imaginer, model, loop.imagination_config, store.path, loop.storage,
                               server(i), writer, seed=loop.seed, chunk=loop.trained_policy().chunk,
                               begin=self._begin, options={**here, "num_cpus": 1})
                          for i in range(runtime.imaginers)]

    def owed(self) -> dict[str, Any]:
        """What a resumed run has to do before anything new."""
        return {"branches_due": self.branches_due + sum(self._underway.values()), "model_due": self._model_due}

    def arrived(self) -> None:
        """Episodes did: for each iteration's worth of them audit, refit and imagine as ``runtime=local`` does."""
        due = self._counters["collected"] // self._loop.config.episodes_per_iteration
        while self._loop.imagines and self._rounds < due:
            self._round(self._rounds)
            self._rounds += 1

    def go_on(self) -> None:
        """Give work to whoever has none."""
        ask, busy = self._crew.ask, self._crew.busy
        for imaginer in self.imaginers:
            if self.branches_due and not busy(imaginer, "imagine") and not busy(imaginer, "load"):
                self._underway[imaginer.name], self.branches_due = self.branches_due, 0
                ask(imaginer, "imagine", self._stream(), self._underway[imaginer.name],
                    then=partial(self._imagined, imaginer))
        if self._model_due and not any(busy(self.modeller, method) for method in ("load", "audit", "refit")):
            self._work_on_model(self._model_due[0])

    def _send_model(self, member: Member) -> None:
        self._crew.ask(member, "load", self._state)

    def _begin(self, imaginer: Member) -> None:
        self.branches_due += self._underway.pop(imaginer.name, 0)  # what one that died did not finish
        self._send_model(imaginer)

    def _round(self, number: int) -> None:
        loop = self._loop
        drifted = not self._drift().within(loop.imagination_config.max_ratio)
        if drifted or number % loop.imagination_config.audit_every == 0:
            self._put_down("audit")
        if number > 0 and number % loop.config.refit_every == 0:
            self._put_down("refit")
        paused = number > 0 and drifted
        self._tally.note({"imagined_ratio": self._drift().ratio, "imagination_paused": float(paused)})
        if not paused:
            self.branches_due += loop.config.branches_per_iteration

    def _imagined(self, imaginer: Member, _: None) -> None:
        del self._underway[imaginer.name]

    def _put_down(self, work: str) -> None:
        """For the world model's learner; what is put down already is done once."""
        if work not in self._model_due:
            self._model_due.append(work)

    def _work_on_model(self, work: str) -> None:
        """It stays put down until it is done: a successor does what a learner that died did not finish."""
        if work == "audit":
            self._crew.ask(self.modeller, "audit", self._loop.config.episodes_per_iteration, then=self._audited)
            return
        state = self._crew.ask(self.modeller, "refit", self._loop.world_model_config.round_steps, returns=2,
                               then=lambda metrics: self._refitted(metrics, state))

    def _drift(self) -> Drift:
        return Drift(**self._loop.progress["drift"])

    def _audited(self, metrics: dict[str, float]) -> None:
        self._model_due.remove("audit")
        self._loop.progress["drift"] = asdict(self._drift().update(metrics))
        self._tally.note(metrics)

    def _refitted(self, metrics: dict[str, float], state: Any) -> None:
        self._model_due.remove("refit")
        self._state = state
        for imaginer in self.imaginers:
            if imaginer.up:
                self._send_model(imaginer)
        model = self._loop.model()
        model.load_state_dict(ray.get(state))  # the checkpoint's copy
        self._loop.journal.record("world_model", model.version - 1, metrics)
