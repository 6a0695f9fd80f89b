"""How the store's index scales: a store of very many episodes, whose pictures are holes on the disk."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from data.draw import Limits
from data.layout import (
    EPISODE,
    SCHEMA_VERSION,
    WORDS,
    chunk_file,
    field_table,
    shard_bytes,
    shard_index,
    sign,
    write_array,
    write_column_metadata,
    write_group,
)
from data.sampler import StepSampler
from data.store import ReplayStore
from data.types import Source, Spec, Statistics

SMALL_STORE, PER_SEGMENT, STEPS = 1000, 2500, 19


def measure_index(folder: Path, episodes: int, rounds: int) -> dict[str, Any]:
    """Seconds to open a store of so many episodes, and a draw's time beside that in a small one; medians."""
    stores = {}
    for count in (SMALL_STORE, episodes):
        path = folder / f"index-{count}"
        _sparse_store(path, count)
        taken, spent_opening = [], []
        for _ in range(min(rounds, 5)):
            begun, cpu = time.perf_counter(), time.process_time()
            stores[count] = ReplayStore.open(path)
            taken.append(time.perf_counter() - begun)
            spent_opening.append(time.process_time() - cpu)
    draws = {count: _sampler(store, count) for count, store in stores.items()}
    ratios = []
    for number in range(rounds):
        spent = {}
        for count, sampler in draws.items():
            begun = time.perf_counter()
            for i in range(50):
                sampler.plan(number * 50 + i, 32, version=count // 16 + number * 50 + i)
            spent[count] = time.perf_counter() - begun
        ratios.append(spent[episodes] / spent[SMALL_STORE])
    for count in stores:
        shutil.rmtree(folder / f"index-{count}")
    return {"episodes": episodes, "small_episodes": SMALL_STORE, "open_seconds": float(np.median(taken)),
            "open_cpu_seconds": float(np.median(spent_opening)),
            "draw_ratio": float(np.median(ratios)), "segments": len(stores[episodes].segments)}


def unit_statistics(dims: int) -> Statistics:
    """Those that change nothing."""
    zeros, ones = np.zeros(dims, np.float32), np.ones(dims, np.float32)
    return Statistics(action_low=-ones, action_high=ones, proprio_mean=zeros, proprio_std=ones)


def _sampler(store: ReplayStore, count: int) -> StepSampler:
    sampler = StepSampler(store, sources={"sim": 0.6, "real": 0.4}, context=1, horizon=15, seed=0,
                          priority_exponent=0.6, limits=Limits(max_lag=count, task_weights="failures"))
    sampler.plan(0, 32, version=count // 16)
    return sampler


def _sparse_store(path: Path, episodes: int) -> None:
    spec = Spec(cameras=("camera",), image_size=64, proprio_names=("x", "y"), action_names=("u", "v"), control_hz=10.0)
    ReplayStore.create(path, spec=spec, statistics=unit_statistics(2), embodiment="arm")
    fields = field_table(spec)
    size = min(PER_SEGMENT, episodes // 4)
    for number, first in enumerate(range(0, episodes, size)):
        count = min(size, episodes - first)
        rows = count * (STEPS + 1)
        folder = path / "seg" / f"{number:08d}"
        table = np.zeros((count, len(EPISODE)), np.int64)
        column = {name: table[:, i] for i, name in enumerate(EPISODE)}
        column["start"][:] = np.arange(count) * (STEPS + 1)
        column["length"][:], column["decisions"][:] = STEPS, STEPS
        column["source"][:] = number % 2
        column["task"][:] = column["instruction"][:] = np.arange(count) % 10
        column["commit_time"][:] = first + np.arange(count)
        column["policy_version"][:] = column["commit_time"] // 16
        column["provenance_end"][:] = 2 * np.arange(1, count + 1)
        for name, field in fields.items():
            (folder / name).mkdir(parents=True)
            index = shard_index(field, rows)
            with chunk_file(folder / name, 1 + len(field["shape"])).open("wb") as file:
                file.seek(shard_bytes(field, rows) - len(index))
                file.write(index)
            write_column_metadata(folder / name, field, rows)
        write_array(folder / "episode", table, dtype="<i8", dimensions=["episode", "episode_column"])
        write_array(folder / "provenance", np.frombuffer(b"{}" * count, np.uint8), dtype="|u1", dimensions=["byte"])
        words = [f"task {i}" for i in range(10)]
        write_group(folder, sign(folder, {
            "tier": "hot", "schema_version": SCHEMA_VERSION, "episodes": count, "rows": rows, "embodiment": "arm",
            "episode_source": list(Source)[number % 2], "episode_columns": list(EPISODE),
            "crc32c_columns": list(fields), **WORDS, "task": words, "instruction": words}, unsigned=fields))
