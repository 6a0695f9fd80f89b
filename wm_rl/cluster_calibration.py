"""What the parts of a run cost on this machine: the times that ``wm_rl.cluster_model`` works with.

Computing is measured as processor time, which other work on the machine changes little; the disk by the clock.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric import Fabric

from data.batches import to_torch
from data.prefetch import prefetch
from data.sampler import DecisionSampler
from data.store import ReplayStore
from data.types import Env, Observation, Source, Trajectory
from wm_rl.cluster.config import RayRuntime
from wm_rl.cluster.start import cluster
from wm_rl.cluster_model import REPORT_EVERY, ClusterModel
from wm_rl.learner import Learner
from wm_rl.loop import Loop
from wm_rl.policy import TinyVLA
from wm_rl.seeding import training_episode

ROWS = (1, 2, 4, 8, 16)
"""Sizes of batches whose forward pass is timed."""
_TIMES = 12
"""Repeats of what is short."""
_EPISODES = 16
"""Newest simulated episodes that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Seconds, bytes and counts, of one of each."""

    forward: Sequence[float]
    """Of a batch of as many rows as ``ROWS`` says."""
    step: float
    """Computing of a control step of one row, its share of the reset included."""
    update: float
    append: float
    """Until an episode is safe in the store."""
    call: float
    """Computing of a call with an observation, at both of its ends."""
    send: float
    """The same with an episode."""
    ask: float
    """Computing of a call without anything, at the end of whoever calls."""
    chunk: int
    episode_steps: float
    episode_deviation: float
    decisions: float
    """In a batch."""
    observation_bytes: float
    episode_bytes: float
    weights_bytes: float

    def model(
        self, loop: Loop, runtime: RayRuntime, *, rows: int, latency: float, cores: int | None
    ) -> ClusterModel:
        """``runtime`` with ``rows`` to a collector whose steps take ``latency`` more, on ``cores`` or on any number."""
        per_row, fixed = np.polyfit(ROWS, self.forward, 1)
        config = loop.config
        return ClusterModel(
            learners=1, servers=runtime.inference_servers, collectors=runtime.collectors, rows=rows, cores=cores,
            step_latency=latency, step_compute=self.step, chunk=self.chunk, episode_steps=self.episode_steps,
            episode_spread=min(0.99, math.sqrt(3) * self.episode_deviation / self.episode_steps), call=self.call,
            forward_fixed=max(float(fixed), 0.0), forward_per_row=max(float(per_row), 0.0),
            batch_size=runtime.batch_size, max_age=runtime.max_age_ms / 1e3, append=self.append + self.send,
            update=self.update, update_sharded=0.0, samples_per_update=self.decisions,
            publish_every=runtime.publish_every,
            updates_per_episode=(runtime.updates_per_episode
                                 or config.updates_per_iteration / config.episodes_per_iteration),
            episodes_ahead=config.episodes_per_iteration, max_lag=runtime.max_lag, report_every=REPORT_EVERY,
            driver_call=self.ask, observation_bytes=self.observation_bytes, episode_bytes=self.episode_bytes,
            weights_bytes=self.weights_bytes, bandwidth=math.inf, reduce_bandwidth=math.inf, latency=0.0)

    def to_dict(self) -> dict[str, object]:
        """JSON-able."""
        return asdict(self)


def calibrate(loop: Loop, make_env: Callable[[], Env], runtime: RayRuntime, scratch: Path) -> Calibration:
    """Measure on a ``loop`` that stands at its last stage. Leaves its store as it was.

    ``make_env`` gives rows in this process. The store must hold simulated episodes.

    ``scratch`` is a folder for a store that is written to; it must not exist.
    """
    store, policy = loop.store(), loop.trained_policy()
    played = [store.trajectory(i) for i in np.flatnonzero(store.episodes.source == Source.SIM.value)[-_EPISODES:]]
    lengths = [len(trajectory) for trajectory in played]
    with contextlib.closing(make_env()) as env:
        observation, step = _simulate(env, round(float(np.mean(lengths))))
    forward = [_forward(policy, observation, rows) for rows in ROWS]
    update, decisions = _update(loop, store)
    call, send, ask = _calls(runtime, observation, played[0])
    weights = sum(value.numel() * value.element_size() for value in policy.state_dict().values())
    return Calibration(
        forward=forward, step=step, update=update, append=_append(store, played, scratch), call=call, send=send,
        ask=ask, chunk=policy.chunk, episode_steps=float(np.mean(lengths)), episode_deviation=float(np.std(lengths)),
        decisions=decisions, observation_bytes=_size(observation.frames) + observation.proprio.nbytes,
        episode_bytes=float(np.mean([_size(trajectory.frames) for trajectory in played])), weights_bytes=weights)


def _simulate(env: Env, steps: int) -> tuple[Observation, float]:
    """What a policy sees of the first row, and the processor time of a control step of one, its reset's share too."""
    draw, over, played = np.random.default_rng(0), np.zeros(env.num_envs, bool), 0
    begun = time.process_time()
    seen, info = env.reset(seed=[training_episode(0, "calibration", 0, row) for row in range(env.num_envs)],
                           options={"reset_mask": ~over})
    for _ in range(steps):
        played += int((~over).sum())
        _, _, terminated, truncated, _ = env.step(
            draw.uniform(-1, 1, (env.num_envs, env.spec.action_dim)).astype(np.float32))
        over |= terminated | truncated
    seconds = (time.process_time() - begun) / played
    first = Observation(frames={name: frames[:1] for name, frames in seen["frames"].items()},
                        proprio=seen["proprio"][:1], instruction=list(info["instruction"][:1]), slot=[0])
    return first, seconds


def _forward(policy: TinyVLA, one: Observation, rows: int) -> float:
    """Median processor time of a pass over ``rows`` rows."""
    many = Observation(frames={name: np.repeat(frames, rows, 0) for name, frames in one.frames.items()},
                       proprio=np.repeat(one.proprio, rows, 0), instruction=list(one.instruction) * rows,
                       slot=list(range(rows)))
    taken = []
    for _ in range(_TIMES):
        begun = time.process_time()
        policy.act(many, list(range(rows)))
        taken.append(time.process_time() - begun)
    return float(np.median(taken))


def _update(loop: Loop, store: ReplayStore, updates: int = 8) -> tuple[float, float]:
    """Median processor time of an update, reading its batch included, and decisions in a batch."""
    fabric = Fabric(accelerator="cpu", devices=1)
    policy, reference = (TinyVLA.load(loop.folder / "warm_start") for _ in range(2))
    learner = Learner(loop.learner_config, fabric=fabric, policy=policy, reference=reference, objective=loop.objective,
                      trust=loop.trust)
    sampler = DecisionSampler(store, loop.mixture(store), chunk=policy.chunk, seed=0)
    plans = (sampler.plan(i, version=0, now=time.time()) for i in range(updates + 2))
    taken, decisions = [], []
    begun = time.process_time()
    for batch in islice(prefetch(sampler, plans, lambda: sampler.buffers(pin=False)), updates):
        learner.update(to_torch(batch, fabric.device))
        now = time.process_time()
        taken.append(now - begun)
        decisions.append(int(batch.mask.sum()))
        begun = now
    return float(np.median(taken[2:])), float(np.mean(decisions))


def _append(store: ReplayStore, played: Sequence[Trajectory], scratch: Path) -> float:
    """Median time by the clock."""
    other = ReplayStore.create(scratch, spec=store.spec, statistics=store.statistics, embodiment=store.embodiment)
    taken = []
    for i in range(_TIMES):
        begun = time.perf_counter()
        other.append([played[i % len(played)]])
        taken.append(time.perf_counter() - begun)
    other.close()
    return float(np.median(taken))


class _Echo:
    """An actor that does nothing."""

    def take(self, *things: object) -> float:
        """The processor time of this process so far."""
        return time.process_time()


def _calls(runtime: RayRuntime, observation: Observation, trajectory: Trajectory) -> tuple[float, float, float]:
    """Processor time of calls with an observation and with an episode, both ends, and of one with nothing, here."""
    with cluster(runtime, cpus=1):
        import ray  # late: optional

        echo: Any = ray.remote(_Echo).remote()

        def each(*things: object, times: int) -> tuple[float, float]:
            for _ in range(3):
                there = ray.get(echo.take.remote(*things))
            here = time.process_time()
            for _ in range(times):
                last = ray.get(echo.take.remote(*things))
            return (time.process_time() - here) / times, (last - there) / times

        return (sum(each(observation, times=200)), sum(each(trajectory, times=20)), each(times=200)[0])


def _size(frames: object) -> int:
    assert isinstance(frames, dict)
    return sum(values.nbytes for values in frames.values())


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def free_cores(seconds: float = 3.0) -> float:
    """How many of them can be had now, beside whatever else runs: processor time per time when all are asked for."""
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", _SPIN, str(seconds)], stdout=subprocess.PIPE)
                for _ in range(cores())]
    return sum(float(process.communicate()[0]) for process in spinning)


_SPIN = """
import sys, time
begun, used = time.perf_counter(), time.process_time()
while time.perf_counter() - begun < float(sys.argv[1]):
    pass
print((time.process_time() - used) / (time.perf_counter() - begun))
"""
