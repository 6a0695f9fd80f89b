"""A day of writing against a byte budget, as fast as the machine allows, to see what grows.

The rate is the highest that AcceRL (arXiv 2603.18464) reports: 104.2 samples per second, which its trainer consumes on
seven GPUs, here taken as control steps written per second, in pieces of 64 steps. A sample of two 224 x 224 views is
301 kB, so a day is 2.7 TB and turns a 2 GB budget over some 1,350 times. Frames are scaled down to 16 x 16 here, and
the budget and the segments with them: as many steps are written, as many segments sealed and evicted as at full size.
"""

from __future__ import annotations

import os
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data.budget import StoreConfig
from data.forked import Child, Say, told_to_stop
from data.layout import field_table, row_bytes
from data.store import ReplayStore
from data.types import Behaviour, Source, Spec, Statistics, Success, Trajectory

STEPS_PER_SECOND, STEPS = 104.2, 64
BUDGET, SEGMENT = 2_000_000_000, 256 * 2**20
"""Bytes at full size."""
SAMPLES = 96
"""How often it is measured: every quarter of an hour of a day."""
_REAL = 8
"""The first so many episodes are real logs, which the budget must keep."""
_WINDOWS, _WINDOW = 32, 16

STATISTICS = Statistics(action_low=-np.ones(7, np.float32), action_high=np.ones(7, np.float32),
                        proprio_mean=np.zeros(8, np.float32), proprio_std=np.ones(8, np.float32))


def spec(image_size: int) -> Spec:
    """Two views, as LIBERO has them."""
    return Spec(cameras=("front", "wrist"), image_size=image_size, proprio_names=tuple(f"p{i}" for i in range(8)),
                action_names=tuple(f"a{i}" for i in range(7)), control_hz=20.0)


SPEC = spec(16)
SCALE = sum(map(row_bytes, field_table(spec(224)).values())) / sum(map(row_bytes, field_table(SPEC).values()))
"""Bytes of a step at full size to those of one here."""


def config() -> StoreConfig:
    """Budget and segments scaled down; a quarter of the budget is the floor of imagined episodes."""
    budget = int(BUDGET / SCALE)
    return StoreConfig(segment_bytes=int(SEGMENT / SCALE), budget_bytes=budget,
                       floor_bytes={Source.REAL.value: float("inf"), Source.IMAGINED.value: budget / 4})


def run_day(path: Path, *, hours: float) -> dict[str, Any]:
    """Write ``hours`` worth of steps into a new store while another process reads; what was measured meanwhile."""
    ReplayStore.create(path, spec=SPEC, statistics=STATISTICS, embodiment="endurance")
    marks = np.linspace(0, hours, SAMPLES + 1)[1:]
    started = time.monotonic()
    reader = Child(partial(_read, path, marks))
    said = Child(partial(_write, path, marks)).wait()
    seconds = time.monotonic() - started
    said += reader.stop()
    samples = {who: [message for message in said if message.get("who") == who] for who in ("writer", "reader")}
    store, appends = ReplayStore.open(path), _appends(hours)
    problems = [problem for message in said for problem in message.get("problems", [])]
    if (store.episodes.source == Source.REAL.value).sum() != min(_REAL, appends):
        problems.append("lost: a real log was evicted")
    return {
        "hours": hours, "steps_per_second": STEPS_PER_SECOND, "scale": SCALE, "budget_bytes": config().budget_bytes,
        "appends": appends, "steps": appends * STEPS, "segments_evicted": len(store.evicted()),
        "most_bytes": max(sample["bytes"] for sample in samples["writer"]), "seconds": seconds,
        "windows_read": sum(message.get("windows", 0) for message in said), "problems": problems, "samples": samples}


def _appends(hours: float) -> int:
    return max(1, round(hours * 3600 * STEPS_PER_SECOND / STEPS))


def _hour(number: int) -> float:
    return (number + 1) * STEPS / STEPS_PER_SECOND / 3600


def _write(path: Path, marks: np.ndarray, say: Say) -> None:
    with ReplayStore.open(path, config()) as store:
        left = marks.tolist()
        for number in range(_appends(marks[-1])):
            store.append([_episode(number)])
            while left and number + 1 >= _appends(left[0]):
                say(_measure("writer", left.pop(0), store)
                    | {"bytes": store.used_bytes(), "files": sum(len(names) for *_, names in os.walk(path))})


def _read(path: Path, marks: np.ndarray, say: Say) -> None:
    """Draw windows over and over, compare what they show, and see what is new before each batch."""
    store, rng, left, windows = ReplayStore.open(path), np.random.default_rng(0), marks.tolist(), 0
    problems: list[str] = []
    while not problems and not told_to_stop(wait_s=0.005 if len(store) else 0.05):
        store.refresh()
        for index in rng.integers(0, max(1, len(store)), _WINDOWS if len(store) else 0):
            number, start = store.provenance(index)["number"], int(rng.integers(STEPS - _WINDOW))
            expected = (np.arange(start, start + _WINDOW) + number) % 256
            for camera in SPEC.cameras:
                window = store.column(index, f"rgb_{camera}")[start : start + _WINDOW].copy()
                if not (window == expected[:, None, None, None]).all():
                    problems.append(f"torn: episode {number} reads differently")
            windows += 1
        newest = _hour(store.provenance(len(store) - 1)["number"]) if len(store) else 0.0
        while left and newest >= left[0]:
            say(_measure("reader", left.pop(0), store))
    say({"windows": windows, "problems": problems})


def _measure(who: str, hour: float, store: ReplayStore) -> dict[str, Any]:
    """Of this process: memory that no file stands behind and all of it, descriptors, mappings."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    with open("/proc/self/maps") as maps:
        mappings = sum(1 for _ in maps)
    return {"who": who, "hour": hour, "rss_kb": int(status["VmRSS"].split()[0]), "episodes": len(store),
            "open_files": len(os.listdir("/proc/self/fd")), "mappings": mappings}


@lru_cache(4)
def _constant(source: Source) -> dict[str, Any]:
    last = np.arange(STEPS) == STEPS - 1
    return {
        "proprio": np.zeros((STEPS + 1, 8), np.float32), "action": np.zeros((STEPS, 7), np.float32),
        "action_token": np.zeros((STEPS, 7), np.int16), "log_prob": np.zeros((STEPS, 7), np.float32),
        "decision": np.arange(STEPS) % 8 == 0, "reward": last.astype(np.float32), "terminated": last,
        "truncated": np.zeros(STEPS, bool), "policy_version": np.zeros(STEPS, np.int64),
        "uncertainty": np.zeros(STEPS, np.float32), "timestamp": np.arange(STEPS + 1) / 20, "source": source,
        "task": "task", "instruction": "do it", "success": Success.YES, "behaviour": Behaviour.LOGGED,
        "embodiment": "endurance", "world_model_version": 0 if source is Source.IMAGINED else -1}


def _episode(number: int) -> Trajectory:
    """Every pixel of row ``i`` is ``i + number``."""
    source = Source.REAL if number < _REAL else Source.IMAGINED if number % 4 == 0 else Source.SIM
    shade = ((np.arange(STEPS + 1) + number) % 256).astype(np.uint8)
    frames = np.broadcast_to(shade[:, None, None, None], (STEPS + 1, 16, 16, 3)).copy()
    return Trajectory(frames=dict.fromkeys(SPEC.cameras, frames), provenance={"number": number},
                      **_constant(source))
