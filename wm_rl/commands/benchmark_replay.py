"""``python main.py benchmark suite=replay``: the replay store beside other ways to read and write the same bytes.

Every figure is a ratio: all methods take turns within a round, a round gives one ratio, the median over rounds counts.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from rich.table import Table

from data.budget import StoreConfig
from data.draw import Limits
from data.layout import chunk_file, field_table
from data.mapping import will_need
from data.sampler import DecisionSampler, Plan, ReplayConfig, StepSampler
from data.store import ReplayStore
from data.types import Behaviour, Source, Spec, Success, Trajectory, UserError
from wm_rl.commands.replay_index import measure_index, unit_statistics
from wm_rl.journal import Journal

WINDOW, BATCH = 16, 32
DIMENSIONS = 7
TOGETHER = 8
"""Episodes of an append, as a vector environment finishes them."""
MIX = {"sim": 0.5, "real": 0.3, "imagined": 0.2}
SMALL = ("proprio", "action", "log_prob", "action_token", "reward", "terminated")
BARS = {"sampler, wall": 0.9, "sampler, CPU": 0.9, "against zarr-python": 30.0, "against tensorstore": 4.0,
        "cold, wall": 0.9, "append, CPU": 0.6}
"""What the store is meant to reach; the table says what it does."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Pictures of one size."""

    image_size: int
    cameras: int


def benchmark_replay(
    *, folder: str, scenarios: Sequence[Scenario], rounds: int, seconds_per_round: float, megabytes: int,
    index_episodes: int,
) -> int:
    """Measure every scenario, then large indices; print a table, write ``results.json``.

    ``megabytes`` is the size of the store that is read. Raises ``UserError`` for settings that measure nothing.
    """
    if rounds < 3 or not scenarios:
        raise UserError(f"suite=replay needs at least one scenario and 3 rounds, got {len(scenarios)} and {rounds}")
    run = Path(folder)
    run.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run / "stores", ignore_errors=True)  # of a benchmark that was stopped
    journal = Journal(run, [], enabled=True)
    results: dict[str, Any] = {"window": WINDOW, "batch": BATCH, "rounds": rounds, "scenarios": []}
    with journal.progress("scenarios", len(scenarios)) as bar:
        for scenario in scenarios:
            measured = _scenario(run / "stores", scenario, rounds, seconds_per_round, megabytes)
            results["scenarios"].append({"image_size": scenario.image_size, "cameras": scenario.cameras, **measured})
            bar.advance()
    results["index"] = measure_index(run / "stores", index_episodes, rounds)
    shutil.rmtree(run / "stores")
    (run / "results.json").write_text(json.dumps(results, indent=2))
    table = Table("pictures", *(f"{s.cameras} x {s.image_size} px" for s in scenarios), "meant to be at least")
    for name in [*BARS, f"append of {TOGETHER}, CPU", "decisions, wall", "decisions, CPU"]:
        table.add_row(name, *(_ratio(measured.get(name)) for measured in results["scenarios"]),
                      f"{BARS[name]:g}" if name in BARS else "")
    journal.console.print(table)
    index = results["index"]
    journal.say(f"{index['episodes']:,} episodes: opened in {index['open_seconds']:.2f} s "
                f"({index['open_cpu_seconds']:.2f} of CPU), a draw takes "
                f"{index['draw_ratio']:.2f} times that of {index['small_episodes']:,}")
    journal.say("ratios of throughput, medians over rounds; 'sampler' and 'cold' are beside np.memmap, 'append' beside "
                "pwrite; 'decisions' is the learner's sampler beside the same np.memmap copy")
    return 0


def _ratio(value: float | None) -> str:
    return "not installed" if value is None else f"{value:.2f}"


def _scenario(folder: Path, scenario: Scenario, rounds: int, seconds: float, megabytes: int) -> dict[str, float]:
    spec = Spec(cameras=tuple(f"camera{i}" for i in range(scenario.cameras)), image_size=scenario.image_size,
                proprio_names=tuple(f"p{i}" for i in range(DIMENSIONS)),
                action_names=tuple(f"a{i}" for i in range(DIMENSIONS)), control_hz=10.0)
    path = folder / f"{scenario.cameras}x{scenario.image_size}"
    steps = 63
    episodes = max(24, megabytes * 2**20 // ((steps + 1) * scenario.cameras * scenario.image_size**2 * 3))
    together = _measure_writing(path, spec, episodes, steps, TOGETHER)
    shutil.rmtree(path)
    alone = _measure_writing(path, spec, episodes, steps, 1)
    store = ReplayStore.open(path)
    sampler = StepSampler(store, sources=MIX, context=1, horizon=WINDOW - 1, seed=0, priority_exponent=0.6,
                          limits=Limits(max_lag=episodes, capacity={"sim": episodes}))
    decisions = DecisionSampler(store, ReplayConfig(
        windows=BATCH, decisions=WINDOW - 1, discount=0.99, mix=MIX, max_lag=episodes,
        capacity=dict.fromkeys(MIX)), chunk=1, seed=0, priority_exponent=0.6)
    for each in (sampler, decisions):
        each.episodes.update(version=episodes)
        each.episodes.set_priority(np.arange(episodes), np.linspace(0.5, 2, episodes))
    buffers, decision_buffers = sampler.buffers(BATCH, pin=False), decisions.buffers(pin=False)
    plans = [sampler.plan(i, BATCH, version=episodes) for i in range(64)]
    others = _Others(store)

    def read_steps(i: int) -> None:
        sampler.read(sampler.plan(i, BATCH, version=episodes), buffers)

    methods: dict[str, Callable[[int], Any]] = {
        "memmap": lambda i: others.memmap(plans[i % 64]), "steps": read_steps,
        "decisions": lambda i: decisions.read(decisions.plan(i, version=episodes), decision_buffers)}
    fast = _interleaved(methods, rounds, seconds)
    slow = _interleaved({"steps": read_steps, "zarr": lambda i: others.zarr(plans[i % 64]), **(
        {"tensorstore": lambda i: others.tensorstore(plans[i % 64])} if others.has_tensorstore else {})}, rounds, 0)
    result = {f"{name}, {clock}": float(np.median(fast["memmap"][clock] / fast[method][clock]))
              for name, method in (("sampler", "steps"), ("decisions", "decisions")) for clock in ("wall", "CPU")}
    result |= {f"against {name}": float(np.median(slow[method]["wall"] / slow["steps"]["wall"]))
               for name, method in (("zarr-python", "zarr"), ("tensorstore", "tensorstore")) if method in slow}
    del sampler, decisions, store, others, methods
    cold = _measure_cold(path, 3 * rounds)  # one batch each: a few milliseconds
    shutil.rmtree(path)
    return {**result, "cold, wall": cold, "append, CPU": alone, f"append of {TOGETHER}, CPU": together}


def _interleaved(
    methods: Mapping[str, Callable[[int], Any]], rounds: int, seconds: float
) -> dict[str, dict[str, np.ndarray]]:
    """Seconds per call of every method in every round, by the wall clock and of CPU; ``seconds`` each per round."""
    first = next(iter(methods.values()))
    first(0)
    begun = time.perf_counter()
    first(1)
    calls = max(1, round(seconds / max(time.perf_counter() - begun, 1e-5)))
    taken = {name: {"wall": np.empty(rounds), "CPU": np.empty(rounds)} for name in methods}
    for number in range(rounds):
        for name, method in methods.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for i in range(calls):
                method(number * calls + i)
            taken[name]["wall"][number] = (time.perf_counter() - wall) / calls
            taken[name]["CPU"][number] = (time.process_time() - cpu) / calls
    return taken


class _Others:
    """Other ways to read the windows that a plan names, into arrays that are made once."""

    def __init__(self, store: ReplayStore) -> None:
        fields = field_table(store.spec)
        self.columns = [*(f"rgb_{camera}" for camera in store.spec.cameras), *SMALL]
        self.out = {name: np.empty((BATCH, WINDOW, *fields[name]["shape"]), fields[name]["dtype"])
                    for name in self.columns}
        self.maps = {segment.name: {name: _memmap(segment.path, name, fields[name], segment.rows)
                                    for name in self.columns} for segment in store.segments}
        self.zarrs = {segment.name: {name: zarr.open_array(segment.path / name, mode="r") for name in self.columns}
                      for segment in store.segments}
        self.tensorstores: dict[str, dict[str, Any]] = {}
        try:
            import tensorstore
        except ImportError:
            self.has_tensorstore = False
            return
        self.has_tensorstore = True
        for segment in store.segments:
            self.tensorstores[segment.name] = {name: tensorstore.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{segment.path / name}/"}}, read=True
            ).result() for name in self.columns}

    def memmap(self, plan: Plan) -> None:
        """Copy from ``np.memmap``, one array per column and segment."""
        for j, (segment, begin, _, start) in enumerate(plan.places(plan.starts)):
            maps = self.maps[segment.name]
            for name in self.columns:
                self.out[name][j] = maps[name][begin + start : begin + start + WINDOW]

    def zarr(self, plan: Plan) -> None:
        """The Zarr library."""
        for j, (segment, begin, _, start) in enumerate(plan.places(plan.starts)):
            for name in self.columns:
                self.out[name][j] = self.zarrs[segment.name][name][begin + start : begin + start + WINDOW]

    def tensorstore(self, plan: Plan) -> None:
        """Tensorstore, all windows and columns asked for at once."""
        waiting = []
        for j, (segment, begin, _, start) in enumerate(plan.places(plan.starts)):
            waiting += [(name, j, self.tensorstores[segment.name][name][begin + start : begin + start + WINDOW].read())
                        for name in self.columns]
        for name, j, future in waiting:
            self.out[name][j] = future.result()


def _memmap(segment: Path, name: str, field: Mapping[str, Any], rows: int) -> np.memmap:
    return np.memmap(chunk_file(segment / name, 1 + len(field["shape"])), field["dtype"], "r",
                     shape=(rows, *field["shape"]))


def _measure_writing(path: Path, spec: Spec, episodes: int, steps: int, together: int) -> float:
    """Fill a store; the CPU time of ``pwrite`` of the same bytes over that of ``append``, median over appends."""
    statistics, ratios = unit_statistics(DIMENSIONS), []
    raw = path.with_suffix(".raw")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(raw, os.O_RDWR | os.O_CREAT)
    config = StoreConfig(segment_bytes=2**27)
    with ReplayStore.create(path, spec=spec, statistics=statistics, embodiment="arm", config=config) as store:
        offset = 0
        for first in range(0, episodes, together):
            source = list(Source)[first // together % 3]
            group = [_trajectory(spec, number, steps, source)
                     for number in range(first, min(first + together, episodes))]
            content = b"".join(_bytes(trajectory) for trajectory in group)
            begun = time.process_time()
            os.pwrite(descriptor, content, offset)
            middle = time.process_time()
            store.append(group)
            ratios.append((middle - begun) / (time.process_time() - middle))
            offset += len(content)
    os.close(descriptor)
    raw.unlink()
    return float(np.median(ratios))


def _bytes(trajectory: Trajectory) -> bytes:
    return b"".join([*(frames.tobytes() for frames in trajectory.frames.values()),
                     *(getattr(trajectory, name).tobytes() for name in SMALL)])


def _measure_cold(path: Path, rounds: int) -> float:
    """Time to read one batch that is not in the page cache: memmap with WILLNEED over the sampler, median of rounds."""
    ratios = []
    for number in range(rounds):
        taken = {}
        for name in ("memmap", "sampler") if number % 2 else ("sampler", "memmap"):
            _drop_from_cache(path)
            store = ReplayStore.open(path)
            sampler = StepSampler(store, sources=MIX, context=1, horizon=WINDOW - 1, seed=number)
            plan, others = sampler.plan(0, BATCH), _Others(store)
            begun = time.perf_counter()
            if name == "sampler":
                sampler.advise(plan)
                sampler.read(plan)
            else:
                _advise_memmaps(others, plan)
                others.memmap(plan)
            taken[name] = time.perf_counter() - begun
            del store, others, sampler, plan
            gc.collect()
        ratios.append(taken["memmap"] / taken["sampler"])
    return float(np.median(ratios))


def _advise_memmaps(others: _Others, plan: Plan) -> None:
    for segment, begin, _, start in plan.places(plan.starts):
        for name in others.columns:
            if name.startswith("rgb_"):
                will_need(others.maps[segment.name][name][begin + start : begin + start + WINDOW])


def _drop_from_cache(path: Path) -> None:
    for file in path.rglob("c.*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _trajectory(spec: Spec, number: int, steps: int, source: Source) -> Trajectory:
    rng = np.random.default_rng(number)
    shape = (steps + 1, spec.image_size, spec.image_size, 3)
    last = np.arange(steps) == steps - 1
    return Trajectory(
        frames={camera: np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)
                for camera in spec.cameras},
        proprio=rng.normal(size=(steps + 1, DIMENSIONS)).astype("f4"),
        action=rng.uniform(-1, 1, (steps, DIMENSIONS)).astype("f4"),
        action_token=rng.integers(0, 11, (steps, DIMENSIONS)).astype("i2"),
        log_prob=-rng.random((steps, DIMENSIONS), np.float32), decision=np.ones(steps, bool),
        reward=last.astype("f4"), terminated=last, truncated=np.zeros(steps, bool),
        policy_version=np.full(steps, number), uncertainty=np.zeros(steps, "f4"), timestamp=np.arange(steps + 1.0),
        source=source, task=f"task {number % 4}", instruction=f"do task {number % 4}",
        success=Success.YES, behaviour=Behaviour.LOGGED, embodiment="arm", world_model_version=-1, provenance={})
